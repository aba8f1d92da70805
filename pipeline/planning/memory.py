"""Predict the memory of a rank and of a host, and choose the schedule that fits, without torch.

ModelShape, RankWorkload --memory_terms--> one `Term` for each purpose, with its source
                         --peak--> the moment of a step that needs most
                         --choose_schedule, graphs_that_fit--> what `auto` means

A term is in memory during some moments of a step; the peak is the largest sum of one moment:

    passes    forward and backward of chunks      reduce    gradients to their ranks
    loss      between the two passes              update    clip and AdamW

P parameters, T of them trained, N ranks, w bytes of a number in the model's type.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

from pipeline.errors import UserError
from pipeline.planning.shape import (
    NUMBER_BYTES,
    Dtype,
    ModelShape,
    saved_by_layer,
    saved_outside,
    spared_by_first_layer,
)

Schedule = Literal["plain", "cache", "sweep"]
# From the fewest FLOPs and the most memory to the reverse.
SCHEDULES: tuple[Schedule, ...] = ("plain", "cache", "sweep")
Part = Literal[
    "weights",
    "gathered",
    "gradients",
    "optimizer",
    "activations",
    "boundaries",
    "loss",
    "buckets",
    "context",
]
PARTS: tuple[Part, ...] = get_args(Part)
Moment = Literal["passes", "loss", "reduce", "update"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)
GIB = 2**30
# Memory as torch reports it (total_memory), rounded down, in GiB.
GPU_GIB = {
    "h100": 79.1,
    "h200": 139.7,
    "a100-80": 79.1,
    "a100-40": 39.4,
    "l40s": 44.4,
    "b200": 178.3,
}
# The rest is lost between blocks of torch's allocator.
USABLE = 0.9
# Driver, kernels and cuBLAS's workspace: 0.5 to 1.3 GiB by driver and GPU.
CUDA_CONTEXT = 1.0 * GIB
# NCCL's channels and buffers: 1 to 2 GiB by GPUs of a host and network.
NCCL_BUFFERS = 1.5 * GIB
# A rank's Python, torch and CUDA libraries in host memory: 2 to 4 GiB.
HOST_PROCESS = 3.0 * GIB
# DeepSpeed's defaults, in elements.
REDUCE_BUCKET = 500_000_000
SUB_GROUP = 1_000_000_000
# Bytes that one rank sends in a gather of several small parameters: as in
# `training/collectives.py`, which needs torch.
GATHER_SHARE = 2 * 2**20


def gpu_named(text: str) -> str | None:
    """Return the key of `GPU_GIB` for a site's name of a GPU; None for an unknown one."""
    text = text.lower()
    # A GH200 has the chip of an H100 and 96 or 144 GB. A MIG instance, such as 1g.10gb, is a part
    # of its GPU.
    if re.search(r"gh200|\dg[.-]\d+gb", text):
        return None
    # Of `a100-80` both words, so that nvidia_a100-sxm4-80gb has a size and a100 alone has none.
    found = [name for name in GPU_GIB if all(word in text for word in name.split("-"))]
    return found[0] if len(found) == 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The machine that a plan is for.

    Attributes:
        available: bytes that a rank may use.
        name: for the user: the GPU, or what was assumed.
        on_gpu: False for ranks on a CPU.
        ranks_per_host: ranks that share a host's memory.
    """

    available: float
    name: str
    on_gpu: bool = True
    ranks_per_host: int = 8

    @classmethod
    def gpu(cls, name: str, *, ranks_per_host: int = 8, key: str = "--gpu") -> Target:
        """Plan for a GPU, by its name or its memory in GiB.

        Raises:
            UserError: the text is neither; `key` names the option.
        """
        known = GPU_GIB.get(name.lower())
        try:
            size = float(name) if known is None else known
        except ValueError:
            size = 0.0
        if not 0 < size < math.inf:
            raise UserError(
                f"{key} {name}", allowed=f"{', '.join(GPU_GIB)}, or the memory of a GPU in GiB"
            )
        label = f"{size:g} GiB" if known is None else f"{name.lower()} ({size:g} GiB)"
        return cls(
            available=USABLE * size * GIB,
            name=f"{USABLE:g} of {label}",
            ranks_per_host=ranks_per_host,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RankWorkload:
    """The largest share of a global batch on one rank, and the way it is computed.

    Attributes:
        rank_tokens: of the fullest rank.
        chunk_tokens: of the largest chunk.
        loss_bytes: scratch memory of the loss, its rows and gradients included.
        predicts_tokens: the loss is computed chunk by chunk, while the chunk's graph exists.
        hpz: ranks that share ZeRO-3's second copy (ZeRO++); 1 for none.
        reduce_bucket, sub_group: DeepSpeed's settings, in elements.
        overlap_comm: stages 1 and 2 fill a second bucket while the first is sent.
        share_bytes: of a number in the reduced gradients (`data_types.grad_accum_dtype`).
        on_gpu: False plans for a CPU, which has no CUDA context and maps memory when it is used.
        ranks_per_host: at most; they share its memory and its network.
    """

    world_size: int
    stage: int
    dtype: Dtype
    rank_tokens: int
    chunk_tokens: int
    gradient_checkpointing: bool
    boundaries_on_host: bool = False
    offload_optimizer: bool = False
    loss_bytes: float = 0.0
    predicts_tokens: bool = False
    hpz: int = 1
    reduce_bucket: int = REDUCE_BUCKET
    sub_group: int = SUB_GROUP
    overlap_comm: bool = False
    share_bytes: int = 2
    on_gpu: bool = True
    ranks_per_host: int = 8

    @property
    def width(self) -> int:
        """Bytes of a number in the model's type."""
        return NUMBER_BYTES[self.dtype]

    @property
    def ranks_on_host(self) -> int:
        """Ranks that run on one host: fewer than fit where there are no more."""
        return min(self.ranks_per_host, self.world_size)

    @property
    def num_hosts(self) -> int:
        """Hosts that the ranks run on."""
        return -(-self.world_size // self.ranks_on_host)


@dataclasses.dataclass(frozen=True, slots=True)
class Term:
    """Bytes of one purpose on one rank.

    Attributes:
        part: the row of the plan's table.
        name: the purpose.
        size: bytes.
        source: formula and origin.
        moments: of a step in which it is in memory.
    """

    part: Part
    name: str
    size: float
    source: str
    moments: tuple[Moment, ...] = MOMENTS


def memory_terms(
    shape: ModelShape, workload: RankWorkload, schedule: Schedule, keep_graphs: int = 0
) -> tuple[Term, ...]:
    """Predict the device memory of the fullest rank, one term for each purpose."""
    terms = [
        *_weights(shape, workload, schedule),
        *_gradients(shape, workload, schedule),
        *_optimizer(shape, workload),
        *_activations(shape, workload, schedule, keep_graphs),
        *_loss(shape, workload),
        *_buckets(shape, workload, schedule),
        *_context(workload),
    ]
    return tuple(term for term in terms if term.size)


def _weights(shape: ModelShape, workload: RankWorkload, schedule: Schedule) -> Iterator[Term]:
    whole = float(shape.parameters * workload.width)
    if workload.stage < 3:
        yield Term("weights", "whole model", whole, "P w: stages 1 and 2 divide no weights")
        return
    ranks = workload.world_size
    if ranks == 1:
        yield Term("weights", "whole model", whole, "P w: a single rank gathers nothing")
        return
    yield Term(
        "weights", "partition", whole / ranks, "P w / N (Rajbhandari et al., arXiv 1910.02054)"
    )
    if workload.hpz > 1:
        # DeepSpeed takes the world size where that is smaller.
        shared = min(workload.hpz, ranks)
        yield Term(
            "weights",
            "second copy",
            whole / shared,
            "P w / zero_hpz_partition_size (Wang et al., arXiv 2306.10209)",
            ("passes", "loss", "reduce"),
        )
    # Gathered once a step: once a chunk would multiply the traffic by the number of chunks.
    held, source = whole, "P w, for both passes of all chunks"
    if schedule == "sweep":
        layers = min(2, shape.num_layers) * shape.layer_parameters
        held = float((shape.outer_parameters + layers) * workload.width)
        source = "w (weights outside of layers + two layers: one computes, the next arrives)"
    # The gradients are reduced before the context that holds the weights ends.
    held_during: tuple[Moment, ...] = ("passes", "loss", "reduce")
    yield Term("gathered", "weights", held, source, held_during)
    # Large weights are gathered in place; a buffer of at most this size serves the small ones.
    size = min(held, float(ranks * GATHER_SHARE))
    yield Term("gathered", "gather buffer", size, "N x 2 MiB, copied out of", ("passes",))


def _gradients(shape: ModelShape, workload: RankWorkload, schedule: Schedule) -> Iterator[Term]:
    # The same for an fp32 model, whose sums are autograd's own `.grad`.
    summed, source = float(shape.trainable), "4 T: fp32 sums over chunks, whole on every rank"
    if schedule == "sweep":
        # A layer is reduced as soon as its backward is complete; the token table, which may also
        # be the head, at the end.
        layers = min(2, shape.num_layers) * shape.layer_trained
        summed = float(shape.outer_trained + layers)
        source = "4 (trained outside of layers + two layers: one sums, one is reduced)"
    yield Term("gradients", "fp32 sums", 4 * summed, source, ("passes", "reduce"))
    yield Term(
        "gradients",
        "of one weight",
        float(workload.width * shape.largest_trained),
        "w of the largest trained weight, from autograd to its sum",
        ("passes",),
    )
    share = workload.share_bytes * shape.trainable / workload.world_size
    # Its shares go to the host as they are reduced.
    if workload.stage == 3 and workload.offload_optimizer:
        return
    # Stage 3 allocates all shares at the start; a sweep reduces them during its passes.
    moments = MOMENTS if workload.stage == 3 or schedule == "sweep" else ("reduce", "update")
    yield Term("gradients", "reduced partition", share, "w T / N", moments)


def _optimizer(shape: ModelShape, workload: RankWorkload) -> Iterator[Term]:
    if workload.offload_optimizer:
        return
    share = shape.trainable / workload.world_size
    yield Term("optimizer", "fp32 weights and moments", 12 * share, "12 T / N (arXiv 1910.02054)")
    # AdamW is fused, and has no temporaries: only the gradient is converted to fp32, at stage 3 one
    # sub-group after another.
    group = min(share, workload.sub_group) if workload.stage == 3 else share
    yield Term("optimizer", "fp32 gradient", 4 * group, "4 min(T / N, sub_group_size)", ("update",))


def _activations(
    shape: ModelShape, workload: RankWorkload, schedule: Schedule, keep_graphs: int
) -> Iterator[Term]:
    width, chunk, h = workload.width, workload.chunk_tokens, shape.hidden_size
    layer = saved_by_layer(shape, width)
    token = saved_outside(shape, width) + layer * shape.num_layers
    token -= spared_by_first_layer(shape, width)
    source = "layers x bytes saved by a layer (planning/shape.py)"
    if workload.gradient_checkpointing:
        # The backward computes one layer at a time again, and only then has what that layer saves.
        token = saved_outside(shape, width) + layer + shape.num_layers * h * width
        source = "one layer, and w h for the input of each layer"
    if schedule == "plain":
        name, size = "all chunks", token * workload.rank_tokens
    elif schedule == "cache":
        name, size = "one chunk", token * chunk
    else:
        name, size = "one layer, one chunk", layer * chunk
        source = "bytes saved by a layer (planning/shape.py)"
    # `cache` has no graph between its passes, `plain` all of them.
    during: tuple[Moment, ...] = ("passes", "loss") if schedule == "plain" else ("passes",)
    yield Term("activations", name, size, source, during)
    yield Term(
        "activations",
        "kept graphs",
        keep_graphs * token * chunk,
        "chunks.keep_graphs chunks more",
        ("passes", "loss"),
    )
    inner = shape.architecture.intermediate_size
    # In a layer's backward: gradients of the MLP's product and of its two factors, and two fp32
    # tensors of a norm.
    yield Term(
        "activations",
        "gradients inside a layer",
        float((3 * inner * width + 2 * 4 * h) * chunk),
        "3 i w + 8 h a token: the MLP's inner tensors, and a norm in fp32",
        ("passes",),
    )
    if schedule == "sweep" and not workload.boundaries_on_host:
        yield Term(
            "boundaries",
            "inputs of all layers, all chunks",
            _boundaries(shape, workload),
            "w h (layers + 1) a token; their gradients replace them",
            ("passes", "loss"),
        )


def _boundaries(shape: ModelShape, workload: RankWorkload) -> float:
    # The input of every layer, and of the final norm.
    token = shape.hidden_size * workload.width * (shape.num_layers + 1)
    return float(token * workload.rank_tokens)


def _loss(shape: ModelShape, workload: RankWorkload) -> Iterator[Term]:
    if not workload.predicts_tokens:
        source = "tiles of scores, rows and their gradients (`diffembed plan loss`)"
        yield Term("loss", "scores and rows", workload.loss_bytes, source, ("loss",))
        return
    yield Term("loss", "scores of one tile", workload.loss_bytes, "16 bytes a score", ("passes",))


def _buckets(shape: ModelShape, workload: RankWorkload, schedule: Schedule) -> Iterator[Term]:
    needed = min(workload.reduce_bucket, shape.trainable)
    # DeepSpeed allocates the whole bucket, of which a CPU maps only what is used.
    elements = workload.reduce_bucket if workload.on_gpu else needed
    buffers = 1 + (workload.overlap_comm and workload.stage < 3)
    # A sweep reduces between its layers.
    during: tuple[Moment, ...] = ("passes", "reduce") if schedule == "sweep" else ("reduce",)
    yield Term(
        "buckets",
        "reduce bucket",
        float(buffers * elements * workload.width),
        "w reduce_bucket_size, twice with overlap_comm at stages 1 and 2",
        # Stage 3 allocates it at the start and keeps it.
        MOMENTS if workload.stage == 3 else during,
    )
    if workload.stage == 3 and workload.world_size > 1:
        size = float(needed * workload.width)
        yield Term("buckets", "reduce-scatter input", size, "w min(bucket, T), padded", during)


def _context(workload: RankWorkload) -> Iterator[Term]:
    if not workload.on_gpu:
        return
    yield Term("context", "CUDA", CUDA_CONTEXT, "0.5 to 1.3 GiB, not measured here")
    if workload.world_size > 1:
        yield Term("context", "NCCL", NCCL_BUFFERS, "1 to 2 GiB, not measured here")


def sum_of(terms: Iterable[Term], moment: Moment) -> float:
    """Return the bytes in memory at one moment."""
    return sum(term.size for term in terms if moment in term.moments)


def peak(terms: Iterable[Term]) -> tuple[Moment, float]:
    """Return the moment that needs most, and its bytes."""
    terms = tuple(terms)
    sizes = {moment: sum_of(terms, moment) for moment in MOMENTS}
    return max(sizes.items(), key=lambda item: item[1])


def loading_peak(shape: ModelShape, workload: RankWorkload) -> float:
    """Predict the peak of a rank's weights in bytes while they are read.

    At stage 3 they arrive piece by piece, and a rank keeps its partition of each; all weights
    outside of the layers count as one piece. At stages 1 and 2 every rank reads the whole model,
    and then DeepSpeed copies the trained weights into one flat tensor.
    """
    held = float(shape.parameters + shape.trainable)
    if workload.stage == 3:
        outside = shape.outer_parameters
        held = shape.parameters / workload.world_size + max(shape.layer_parameters, outside)
    return held * workload.width


def host_memory(shape: ModelShape, workload: RankWorkload, schedule: Schedule) -> dict[str, float]:
    """Predict the memory of one host by purpose, in bytes."""
    ranks = workload.ranks_on_host
    share = shape.trainable / workload.world_size
    sizes = {"processes": ranks * HOST_PROCESS}
    if workload.offload_optimizer:
        # fp32 weights, moments and gradients, and pinned gradients in the model's type.
        sizes["optimizer"] = ranks * share * (16 + workload.width)
    if schedule == "sweep" and workload.boundaries_on_host:
        sizes["boundaries"] = ranks * _pinned_boundaries(shape, workload)
    return sizes


def _pinned_boundaries(shape: ModelShape, workload: RankWorkload) -> float:
    """Return the bytes of one rank's boundaries in pinned memory.

    torch's allocator rounds each of them, one layer's of one chunk, up to a power of two.
    """
    chunk = min(workload.chunk_tokens, workload.rank_tokens)
    block = 2 ** math.ceil(math.log2(shape.hidden_size * workload.width * chunk))
    return float(block * (shape.num_layers + 1) * math.ceil(workload.rank_tokens / chunk))


def graphs_that_fit(
    shape: ModelShape, workload: RankWorkload, available: float, num_chunks: int
) -> int:
    """Return the number of chunks of a cached step that may keep their graph for pass 2.

    One chunk's graph is always there while its backward runs; each kept one adds as much.
    """
    terms = memory_terms(shape, workload, "cache")
    graph = next(term.size for term in terms if term.name == "one chunk")
    # Kept graphs live through these two moments; they are gone before the reduction.
    room = available - max(sum_of(terms, "passes"), sum_of(terms, "loss"))
    return min(num_chunks, max(0, int(room // graph)))


def needed(shape: ModelShape, workload: RankWorkload, schedule: Schedule) -> float:
    """Return the most bytes that a rank needs at any time, loading included."""
    loading = loading_peak(shape, workload) + sum(term.size for term in _context(workload))
    return max(peak(memory_terms(shape, workload, schedule))[1], loading)


def choose_schedule(
    shape: ModelShape,
    workload: RankWorkload,
    available: float,
    schedules: tuple[Schedule, ...] = SCHEDULES,
    *,
    assumed: str = "",
) -> Schedule:
    """Return the first schedule, fewest FLOPs first, whose estimate fits `available` bytes.

    `assumed` names the memory in the error.

    Raises:
        UserError: none fits; names the keys that would change it, with the memory they lead to.
    """
    allowed = allowed_schedules(workload, schedules)
    needs = {schedule: needed(shape, workload, schedule) for schedule in allowed}
    for schedule, size in needs.items():
        if size <= available:
            return schedule
    fitting = _what_fits(shape, workload, available, schedules)
    raise UserError(
        f"schedule: auto found none that fits into {available / GIB:.1f} GiB per rank"
        + (f", {assumed}" if assumed else "")
        + " (needs "
        + ", ".join(f"{name} {size / GIB:.1f}" for name, size in needs.items())
        + ")",
        fix="; or ".join(fitting) or "use far more ranks, a larger GPU or LoRA",
        docs="trouble.md#does-not-fit",
    )


def fitting_schedules(
    shape: ModelShape,
    workload: RankWorkload,
    available: float,
    schedules: tuple[Schedule, ...] = SCHEDULES,
) -> list[Schedule]:
    """Return the schedules whose estimate fits `available` bytes, fewest FLOPs first."""
    allowed = allowed_schedules(workload, schedules)
    return [schedule for schedule in allowed if needed(shape, workload, schedule) <= available]


def allowed_schedules(
    workload: RankWorkload, schedules: tuple[Schedule, ...] = SCHEDULES
) -> list[Schedule]:
    """Leave out a sweep with checkpointing, which a training config refuses."""
    return [s for s in schedules if s != "sweep" or not workload.gradient_checkpointing]


def _what_fits(
    shape: ModelShape, workload: RankWorkload, available: float, schedules: tuple[Schedule, ...]
) -> list[str]:
    """Name changes of keys that make a schedule fit: single ones if there are any, or pairs.

    Returns:
        At most four texts; none where no pair is enough.
    """
    half = workload.chunk_tokens // 2
    more = 2 * workload.world_size
    changes: dict[str, dict[str, Any]] = {
        "ZeRO stage 3 (ds_configs/zero3.json)": {"stage": 3},
        "model.gradient_checkpointing: true": {"gradient_checkpointing": True},
        "model.gradient_checkpointing: false": {"gradient_checkpointing": False},
        "chunks.boundaries: host": {"boundaries_on_host": True},
        f"chunks.max_tokens: {half}": {"chunk_tokens": half},
        "optimizer on the host (ds_configs/zero3_offload.json)": {
            "stage": 3,
            "offload_optimizer": True,
        },
        f"{more} ranks": {"world_size": more, "rank_tokens": -(-workload.rank_tokens // 2)},
    }
    # Those that the run has already would be no advice.
    useful = {
        name: change
        for name, change in changes.items()
        if any(getattr(workload, key) != value for key, value in change.items())
    }
    names = list(useful)
    pairs = [(a, b) for k, a in enumerate(names) for b in names[k + 1 :]]
    # Pairs only where no single change is enough: the shorter advice comes first.
    for candidates in ([(name,) for name in names], pairs):
        found = []
        for chosen in candidates:
            values = {key: value for name in chosen for key, value in useful[name].items()}
            changed = dataclasses.replace(workload, **values)
            sizes = {s: needed(shape, changed, s) for s in allowed_schedules(changed, schedules)}
            fitting = next((s for s, size in sizes.items() if size <= available), None)
            if fitting is not None:
                size = sizes[fitting] / GIB
                found.append(f"{' with '.join(chosen)} ({fitting} needs {size:.1f} GiB)")
        if found:
            return found[:4]
    return []
