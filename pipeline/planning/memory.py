"""What one rank holds in memory during a step, as a pure function of shapes and schedule."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pipeline.errors import UserError

Schedule = Literal["plain", "cache", "sweep"]
# From the fewest FLOPs and the most memory to the reverse.
SCHEDULES: tuple[Schedule, ...] = ("plain", "cache", "sweep")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The counts that memory depends on."""

    parameters: int
    trainable: int
    layer_parameters: int  # of one layer
    num_layers: int
    hidden_size: int
    intermediate_size: int

    @classmethod
    def of(cls, encoder: Any) -> ModelShape:
        """Read the counts off an encoder, which may be on the meta device."""
        config = encoder.backbone.config
        counts = [(p.numel(), p.requires_grad) for p in encoder.parameters()]
        hidden = int(config.hidden_size)
        return cls(
            parameters=sum(n for n, _ in counts),
            trainable=sum(n for n, trained in counts if trained),
            layer_parameters=sum(p.numel() for p in encoder.layers[0].parameters()),
            num_layers=len(encoder.layers),
            hidden_size=hidden,
            # GPT-2 has no such field: its inner width is four times the outer.
            intermediate_size=int(getattr(config, "intermediate_size", None) or 4 * hidden),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a rank's share of the global batch is computed."""

    world_size: int
    stage: int
    dtype: Literal["float32", "bfloat16"]
    rank_tokens: int  # of the fullest rank
    chunk_tokens: int  # of the largest chunk
    gradient_checkpointing: bool
    boundaries_on_host: bool = False
    offload_optimizer: bool = False
    score_bytes: int = 0  # for a tile of scores of the vocabulary; 0 where no tokens are predicted


def memory_per_rank(shape: ModelShape, layout: Layout, schedule: Schedule) -> dict[str, float]:
    """Bytes on the device of one rank by purpose.

    Weights, fp32 master copies and moments follow the ZeRO paper (Rajbhandari et al.,
    arXiv 1910.02054, section 3). Gradients are whole on every rank until the one reduction of the
    step. A graph saves about 18 h + 4 i numbers per token and layer (attention, norms kept in
    fp32, gated MLP); with activation checkpointing one layer's worth and an h-wide input per layer.
    An estimate: real kernels save less.
    """
    width = 4 if layout.dtype == "float32" else 2
    per_layer = (18 * shape.hidden_size + 4 * shape.intermediate_size) * width
    boundary = shape.hidden_size * width
    if layout.gradient_checkpointing:
        per_token = per_layer + shape.num_layers * boundary
    else:
        per_token = per_layer * shape.num_layers
    share = shape.parameters * width / (layout.world_size if layout.stage == 3 else 1)
    gathered = 0.0
    if layout.stage == 3:
        held = shape.parameters
        if schedule == "sweep":  # one layer, and what lies outside of the layers
            held -= (shape.num_layers - 1) * shape.layer_parameters
        gathered = float(held * width)
    memory = {
        "weights": share,
        "weights gathered for the step": gathered,
        # In fp32 whatever the weights are in: sums over many chunks would lose bits.
        "gradients": 4.0 * shape.trainable,
        "fp32 master and AdamW moments": (
            0.0 if layout.offload_optimizer else 12 * shape.trainable / layout.world_size
        ),
    }
    if layout.score_bytes:
        memory["scores of one tile"] = float(layout.score_bytes)
    if schedule == "plain":
        memory["activations of all chunks"] = float(per_token * layout.rank_tokens)
    elif schedule == "cache":
        memory["activations of one chunk"] = float(per_token * layout.chunk_tokens)
    else:
        store = boundary * (shape.num_layers + 1) * layout.rank_tokens
        memory["inputs of all layers, all chunks"] = (
            0.0 if layout.boundaries_on_host else float(store)
        )
        memory["activations of one layer, one chunk"] = float(per_layer * layout.chunk_tokens)
    return memory


def loading_peak(shape: ModelShape, layout: Layout) -> float:
    """Bytes that weights take on a rank at most while they are read.

    At stage 3 they arrive piece by piece, and a rank keeps its partition of each; what lies outside
    of the layers is taken for one piece. At stages 1 and 2 every rank reads the whole model.
    """
    held = float(shape.parameters)
    if layout.stage == 3:
        outside = shape.parameters - shape.num_layers * shape.layer_parameters
        held = shape.parameters / layout.world_size + max(shape.layer_parameters, outside)
    return held * (4 if layout.dtype == "float32" else 2)


def graphs_that_fit(shape: ModelShape, layout: Layout, available: float, num_chunks: int) -> int:
    """How many chunks of a cached step may keep their graph for pass 2.

    One chunk's graph is always there while its backward runs; each kept one adds as much.
    """
    memory = memory_per_rank(shape, layout, "cache")
    room = available - sum(memory.values())
    return min(num_chunks, max(0, int(room // memory["activations of one chunk"])))


def choose_schedule(
    shape: ModelShape,
    layout: Layout,
    available: float,
    schedules: tuple[Schedule, ...] = SCHEDULES,
) -> Schedule:
    """The first of the schedules, fewest FLOPs first, whose estimate fits into `available` bytes.

    Raises:
        UserError: none fits.
    """
    needs = {s: sum(memory_per_rank(shape, layout, s).values()) for s in schedules}
    for schedule in schedules:
        if needs[schedule] <= available and not (
            schedule == "sweep" and layout.gradient_checkpointing
        ):
            return schedule
    raise UserError(
        f"schedule: auto found none that fits into {available / 2**30:.1f} GiB per rank (needs "
        + ", ".join(f"{name} {size / 2**30:.1f}" for name, size in needs.items())
        + ")",
        fix="use more ranks, ZeRO stage 3, a smaller chunks.max_tokens, or boundaries: host",
    )
