"""Predict the seconds of a step by part, without torch: a projection from a GPU's data sheet.

ModelShape, StepWork, Schedule, Gpu --step_seconds--> seconds by part, hidden work left out

    compute     FLOPs by schedule / (peak x UTILISATION or LORA_UTILISATION)
    gather      ZeRO-3's weights, once a step, or twice in a sweep, which hides all but one layer
    reduce      gradients to their ranks; a sweep hides all but one layer
    host        boundaries on the host, as far as compute does not hide them; optimizer on the host
    loss        fp32 products of the scores; queries and their gradients between ranks
    update      AdamW's traffic to the GPU's memory

P parameters, T of them trained, N ranks, w bytes of a number, F FLOPs of one forward.
"""

from __future__ import annotations

import dataclasses

from pipeline.data.batch import IntArray
from pipeline.loss.tiles import LossCost
from pipeline.planning.memory import RankWorkload, Schedule
from pipeline.planning.shape import ModelShape

# Share of a GPU's peak that eager transformers reach in bfloat16 at width 3,584, all FLOPs done
# counted: 0.47 to 0.51 on an H200, training all weights or embedding (tests/benchmarks/RESULTS.md).
UTILISATION = 0.5
# With LoRA on every linear layer: 0.37 to 0.42 there. Adapters add few FLOPs, but many launches and
# passes over each output to scale and to add.
LORA_UTILISATION = 0.4
# Of the loss's products in fp32: 0.76 there.
LOSS_UTILISATION = 0.75
# Gb/s of a host, all its adapters together, where nothing is said.
DEFAULT_NETWORK = 400.0
# Share of a link that collectives reach; assumed, and not measured.
LINK_USE = 0.8
# FLOPs of attention's backward in forwards: kernels recompute the scores (five products to two).
ATTENTION_BACKWARD = 2.5
# Bytes that AdamW moves for one weight: it reads weight, moments and gradient in fp32 (16), and
# writes weight and moments (12) and the 16-bit copy (2).
UPDATE_BYTES = 30
# Memory bandwidth of a host's processors that its ranks share, in bytes a second; assumed.
HOST_MEMORY = 200e9


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """The data sheet of a GPU: peaks without sparsity, bytes a second of one direction."""

    bf16: float  # FLOP/s of tensor cores
    fp32: float  # FLOP/s without tensor cores
    memory: float
    link: float  # to the other GPUs of its host
    host: float  # to host memory

    def changed(self, *, compute: float, link: float) -> Gpu:
        """Return the same GPU with other speeds, in multiples of its own.

        Args:
            compute: in layers.
            link: between GPUs.
        """
        return dataclasses.replace(
            self, bf16=self.bf16 * compute, fp32=self.fp32 * compute, link=self.link * link
        )


# Data sheets of the SXM boards: `link` is one direction of NVLink, and `host` is PCIe. The L40S has
# no NVLink: PCIe is both.
GPUS = {
    "h100": Gpu(bf16=989e12, fp32=67e12, memory=3.35e12, link=450e9, host=50e9),
    "h200": Gpu(bf16=989e12, fp32=67e12, memory=4.8e12, link=450e9, host=50e9),
    "b200": Gpu(bf16=2250e12, fp32=75e12, memory=8e12, link=900e9, host=50e9),
    "a100-80": Gpu(bf16=312e12, fp32=19.5e12, memory=2.0e12, link=300e9, host=25e9),
    "a100-40": Gpu(bf16=312e12, fp32=19.5e12, memory=1.55e12, link=300e9, host=25e9),
    "l40s": Gpu(bf16=362e12, fp32=91e12, memory=0.86e12, link=25e9, host=25e9),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """The arithmetic and traffic of a step, in addition to its memory.

    Attributes:
        workload: of the fullest rank.
        chunks: (C,) text lengths of each chunk of one rank; balanced ranks are nearly equal.
        causal: a token sees only earlier ones.
        kept: share of the chunks whose graph is kept.
        loss: cost of the contrastive loss; None where tokens are predicted.
        network: bytes a second of one host, one direction, all adapters together.
    """

    workload: RankWorkload
    chunks: tuple[IntArray, ...]
    causal: bool
    kept: float
    loss: LossCost | None
    network: float

    @property
    def squares(self) -> float:
        """The sum of squared text lengths."""
        return sum(float((lengths.astype(float) ** 2).sum()) for lengths in self.chunks)


@dataclasses.dataclass(frozen=True, slots=True)
class Seconds:
    """One part of a step, and its origin."""

    part: str
    seconds: float
    source: str


def step_flops(shape: ModelShape, work: StepWork, schedule: Schedule) -> float:
    """Return the FLOPs of the layers of one rank, recomputation included."""
    linear, attention = forward_flops(
        shape, tokens=work.workload.rank_tokens, squares=work.squares, causal=work.causal
    )
    forward = linear + attention
    # A gradient costs as much as the forward's product: by the input always, by the weights only
    # where they are trained.
    trained = shape.layer_trained / shape.layer_parameters
    backward = linear * (1 + trained) + attention * ATTENTION_BACKWARD
    return forwards_of(work, schedule) * forward + backward


def forward_flops(
    shape: ModelShape, *, tokens: float, squares: float, causal: bool
) -> tuple[float, float]:
    """Return the FLOPs of one forward of the layers: products with weights, and attention.

    Args:
        shape: the model.
        tokens: of all texts.
        squares: the sum of squared text lengths.
        causal: a token sees only earlier ones.
    """
    # A multiplication and an addition for each weight and token. Norms and biases, which count as
    # weights here, are below a thousandth of a layer.
    linear = 2.0 * shape.layer_parameters * shape.num_layers * tokens
    # For a text of L tokens, scores and weighted values are two products of 2 L L q FLOPs; half of
    # them under a causal mask.
    seen = 0.5 if causal else 1.0
    return linear, 4.0 * shape.architecture.query_width * squares * seen * shape.num_layers


def forwards_of(work: StepWork, schedule: Schedule) -> float:
    """Return the number of forwards of a step, recomputation included."""
    forwards = 1.0 if schedule == "plain" else 2.0
    if schedule == "cache":
        # Token prediction needs no first pass; a kept graph needs no second one.
        forwards = 1.0 if work.loss is None else 2.0 - work.kept
    # Checkpointing computes every layer once more, in its backward.
    return forwards + work.workload.gradient_checkpointing


def step_seconds(
    shape: ModelShape, work: StepWork, schedule: Schedule, gpu: Gpu
) -> tuple[Seconds, ...]:
    """Predict the consecutive parts of one step."""
    workload, width = work.workload, work.workload.width
    utilisation = UTILISATION if shape.adapters is None else LORA_UTILISATION
    compute = step_flops(shape, work, schedule) / (gpu.bf16 * utilisation)
    if workload.dtype == "float32":
        compute *= gpu.bf16 / gpu.fp32
    sweep = schedule == "sweep"
    parts = [Seconds("compute", compute, f"FLOPs / (peak x {utilisation:g})")]
    layer = shape.layer_parameters * width
    if workload.stage == 3:
        # A sweep holds what lies outside of the layers throughout, so that it is gathered once.
        outer = _exchange(shape.outer_parameters * width, work, gpu)
        layers = shape.num_layers * _exchange(layer, work, gpu)
        waiting, source = outer + layers, "P w, once, before the first chunk"
        if sweep:
            waiting = outer + exposed(2 * layers, compute, 2 * shape.num_layers)
            source = "2 P w, next layer while one computes"
        parts.append(Seconds("gather", waiting, source))
    reduced = _exchange(shape.trainable * width, work, gpu)
    source = "T w, after the last backward"
    if sweep:
        outer = _exchange(shape.outer_trained * width, work, gpu)
        # Only the backward sweep has reductions to hide: at least half of the compute.
        reduced = outer + exposed(reduced - outer, compute / 2, shape.num_layers)
        source = "T w, one layer while the next computes"
    if workload.stage < 3:
        # Each rank has updated its share; at stage 3 the next step's gather brings the others.
        reduced += _exchange(shape.trainable * width, work, gpu)
        source += "; updated weights to all ranks"
    parts.append(Seconds("reduce", reduced, source))
    parts.append(Seconds("host", *offload_seconds(shape, work, schedule, compute, gpu.host)))
    if work.loss is not None:
        seconds = work.loss.matmul_flops / (gpu.fp32 * LOSS_UTILISATION)
        seconds += _exchange(work.loss.received_bytes, work, gpu)
        parts.append(Seconds("loss", seconds, "fp32 products; queries from all ranks"))
    if not workload.offload_optimizer:
        share = shape.trainable / workload.world_size
        source = f"{UPDATE_BYTES} T / N bytes"
        parts.append(Seconds("update", share * UPDATE_BYTES / gpu.memory, source))
    return tuple(part for part in parts if part.seconds)


def _exchange(size: float, work: StepWork, gpu: Gpu) -> float:
    """Return the seconds to gather or reduce a number of bytes over all ranks.

    Rings: each rank receives all but its own share from its neighbour, and each host all but its
    own from another host. The slower of the two decides.
    """
    on_host, hosts = work.workload.ranks_on_host, work.workload.num_hosts
    inside = size * (on_host - 1) / on_host / gpu.link if on_host > 1 else 0.0
    between = size * (hosts - 1) / hosts / work.network if hosts > 1 else 0.0
    return max(inside, between) / LINK_USE


def exposed(seconds: float, compute: float, pieces: int) -> float:
    """Return the part of a transfer in equal pieces that compute does not hide.

    A piece travels while another one computes. Nothing hides the first; if a piece takes longer to
    travel than to compute, every later one adds the difference.
    """
    return max(seconds / pieces, seconds - compute * (pieces - 1) / pieces)


def offload_seconds(
    shape: ModelShape, work: StepWork, schedule: Schedule, compute: float, bandwidth: float
) -> tuple[float, str]:
    """Return the seconds that a step waits for host memory, and their origin.

    Args:
        shape, work, schedule: of the step.
        compute: seconds that may hide copies.
        bandwidth: bytes a second to host memory.
    """
    workload, width = work.workload, work.workload.width
    seconds, sources = 0.0, []
    if schedule == "sweep" and workload.boundaries_on_host:
        stored = shape.hidden_size * width * (shape.num_layers + 1) * workload.rank_tokens
        # Each layer's out in the forward and back in the backward, while the GPU computes.
        seconds += exposed(2 * stored / bandwidth, compute, 2 * shape.num_layers)
        sources.append("boundaries out and back, while the GPU computes")
    if workload.offload_optimizer:
        share = shape.trainable / workload.world_size
        ranks = workload.ranks_on_host
        # Gradients to the host and weights back; the updates of all its ranks share its memory.
        seconds += 2 * share * width / bandwidth + share * UPDATE_BYTES * ranks / HOST_MEMORY
        sources.append("AdamW on the host")
    return seconds, "; ".join(sources)
