"""Predict the batch, the schedule and the memory of a run before it starts.

config, shards --plan_run--> first global batch, tokens of the fullest rank and chunk
model on the meta device --> ModelShape
ModelShape, RankWorkload --memory_per_rank--> bytes by purpose, for each schedule
                         --choose_schedule, graphs_that_fit--> what `auto` means
                         --describe--> the text of `--dry-run` and `diffembed plan`
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from pipeline.config import TrainConfig, as_tree
from pipeline.data.batch import GlobalBatch
from pipeline.data.text_loader import make_loader, open_dataset, require_negatives
from pipeline.errors import UserError
from pipeline.loss.tiles import DEFAULT_SCORE_BYTES, loss_cost
from pipeline.model.encoder import build_model
from pipeline.training.token_step import TILE_BYTES

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
        """Count an encoder, which may be on the meta device."""
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
class RankWorkload:
    """The largest share of a global batch on one rank, and the way it is computed."""

    world_size: int
    stage: int
    dtype: Literal["float32", "bfloat16"]
    rank_tokens: int  # of the fullest rank
    chunk_tokens: int  # of the largest chunk
    gradient_checkpointing: bool
    boundaries_on_host: bool = False
    offload_optimizer: bool = False
    score_bytes: int = 0  # for a tile of scores of the vocabulary; 0 where no tokens are predicted


def memory_per_rank(
    shape: ModelShape, workload: RankWorkload, schedule: Schedule
) -> dict[str, float]:
    """Estimate bytes on the device of one rank by purpose.

    Weights, fp32 master copies and moments follow the ZeRO paper (Rajbhandari et al.,
    arXiv 1910.02054, section 3). Gradients are whole on every rank until the one reduction of the
    step. A graph saves about 18 h + 4 i numbers per token and layer (attention, norms kept in
    fp32, gated MLP); with activation checkpointing one layer's worth and an h-wide input per layer.
    Real kernels save less.
    """
    width = 4 if workload.dtype == "float32" else 2
    # Numbers that a layer's backward needs, for one token.
    per_layer = (18 * shape.hidden_size + 4 * shape.intermediate_size) * width
    boundary = shape.hidden_size * width
    if workload.gradient_checkpointing:
        per_token = per_layer + shape.num_layers * boundary
    else:
        per_token = per_layer * shape.num_layers
    # Stages 1 and 2 keep whole weights on every rank.
    share = shape.parameters * width / (workload.world_size if workload.stage == 3 else 1)
    gathered = 0.0
    if workload.stage == 3:
        held = shape.parameters
        if schedule == "sweep":  # one layer, and what lies outside of the layers
            held -= (shape.num_layers - 1) * shape.layer_parameters
        gathered = float(held * width)
    memory = {
        "weights": share,
        "weights gathered for the step": gathered,
        # fp32 for any type of weights: sums over many chunks would lose bits.
        "gradients": 4.0 * shape.trainable,
        "fp32 master and AdamW moments": (
            0.0 if workload.offload_optimizer else 12 * shape.trainable / workload.world_size
        ),
    }
    if workload.score_bytes:
        memory["scores of one tile"] = float(workload.score_bytes)
    if schedule == "plain":
        memory["activations of all chunks"] = float(per_token * workload.rank_tokens)
    elif schedule == "cache":
        memory["activations of one chunk"] = float(per_token * workload.chunk_tokens)
    else:
        store = boundary * (shape.num_layers + 1) * workload.rank_tokens
        memory["inputs of all layers, all chunks"] = (
            0.0 if workload.boundaries_on_host else float(store)
        )
        memory["activations of one layer, one chunk"] = float(per_layer * workload.chunk_tokens)
    return memory


def loading_peak(shape: ModelShape, workload: RankWorkload) -> float:
    """Estimate the peak of a rank's weights in bytes while they are read.

    At stage 3 they arrive piece by piece, and a rank keeps its partition of each; all weights
    outside of the layers count as one piece. At stages 1 and 2 every rank reads the whole model.
    """
    held = float(shape.parameters)
    if workload.stage == 3:
        outside = shape.parameters - shape.num_layers * shape.layer_parameters
        held = shape.parameters / workload.world_size + max(shape.layer_parameters, outside)
    return held * (4 if workload.dtype == "float32" else 2)


def graphs_that_fit(
    shape: ModelShape, workload: RankWorkload, available: float, num_chunks: int
) -> int:
    """Return the number of chunks of a cached step that may keep their graph for pass 2.

    One chunk's graph is always there while its backward runs; each kept one adds as much.
    """
    memory = memory_per_rank(shape, workload, "cache")
    room = available - sum(memory.values())
    return min(num_chunks, max(0, int(room // memory["activations of one chunk"])))


def choose_schedule(
    shape: ModelShape,
    workload: RankWorkload,
    available: float,
    schedules: tuple[Schedule, ...] = SCHEDULES,
) -> Schedule:
    """Return the first schedule, fewest FLOPs first, whose estimate fits `available` bytes.

    Raises:
        UserError: none fits.
    """
    needs = {s: sum(memory_per_rank(shape, workload, s).values()) for s in schedules}
    for schedule in schedules:
        if needs[schedule] <= available and not (
            schedule == "sweep" and workload.gradient_checkpointing
        ):
            return schedule
    raise UserError(
        f"schedule: auto found none that fits into {available / 2**30:.1f} GiB per rank (needs "
        + ", ".join(f"{name} {size / 2**30:.1f}" for name, size in needs.items())
        + ")",
        fix="use more ranks, ZeRO stage 3, a smaller chunks.max_tokens, or boundaries: host",
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """A run's first global batch, as every rank would lay it out, and its schedule."""

    batch: GlobalBatch  # as rank 0 gets it
    num_examples: int
    shape: ModelShape
    workload: RankWorkload
    schedule: Schedule
    keep_graphs: int
    warning: str  # about queries without negatives, if any


def plan_run(
    config: TrainConfig, ds_config: dict[str, Any], *, world_size: int, available: float
) -> RunPlan:
    """Lay out the first batch and choose the schedule where the config has `auto`.

    Args:
        config: the run.
        ds_config: the resolved DeepSpeed config.
        world_size: ranks to plan for.
        available: bytes of device memory on the rank with the least.

    Raises:
        UserError: the data cannot be read, the batch is impossible, or no schedule fits.
    """
    dataset = open_dataset(config, verify=False)  # verifying all shards would take too long
    loader = make_loader(dataset, config, rank=0, world_size=world_size)
    warning = require_negatives(loader, config)
    tokens = loader.chunk_tokens(0)  # of every rank's chunks: all ranks plan the same
    zero = ds_config["zero_optimization"]
    workload = RankWorkload(
        world_size=world_size,
        stage=zero["stage"],
        dtype=config.model.dtype,
        rank_tokens=max(map(sum, tokens)),
        chunk_tokens=max(map(max, tokens)),
        gradient_checkpointing=config.model.gradient_checkpointing,
        boundaries_on_host=config.chunks.boundaries == "host",
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        score_bytes=0 if config.objective is None else TILE_BYTES["cuda"],
    )
    # Shapes without weights, so that a login node can plan.
    encoder = build_model(config, meta=True)
    config.loss.require_fit(width=encoder.num_dimensions, has_scores=dataset.manifest.has_scores)
    shape = ModelShape.of(encoder)
    schedule = config.schedule
    if schedule == "auto":
        # Tokens are predicted chunk by chunk, which needs the memory of `cache`.
        allowed = SCHEDULES if config.objective is None else SCHEDULES[1:]
        schedule = choose_schedule(shape, workload, available, allowed)
    return RunPlan(
        batch=loader.batch(0),
        num_examples=sum(unit.size for unit in loader.order.units),
        shape=shape,
        workload=workload,
        schedule=schedule,
        keep_graphs=_keep_graphs(config, shape, workload, schedule, available, len(tokens[0])),
        warning=warning,
    )


def _keep_graphs(
    config: TrainConfig,
    shape: ModelShape,
    workload: RankWorkload,
    schedule: Schedule,
    available: float,
    num_chunks: int,
) -> int:
    kept = config.chunks.keep_graphs
    if schedule != "cache" or config.objective is not None:
        return 0
    return graphs_that_fit(shape, workload, available, num_chunks) if kept == "auto" else kept


def describe(plan: RunPlan, config: TrainConfig) -> str:
    """Format a plan as aligned lines of text."""
    batch, workload, shape = plan.batch, plan.workload, plan.shape
    memory = memory_per_rank(shape, workload, plan.schedule)
    optimizer = config.optimizer
    lines = [
        *_objective(batch, config),
        (
            "tokens",
            f"{batch.tokens:,} = {len(batch.chunks)} chunks x <= {workload.chunk_tokens:,} tokens "
            f"x {workload.world_size} ranks (budget {config.chunks.max_tokens:,} a chunk)",
        ),
        ("steps", _steps(plan, config)),
        (
            "learning rate",
            f"{optimizer.lr:g} after {optimizer.warmup_steps} warm-up steps, "
            f"then {optimizer.decay}",
        ),
        (
            "model",
            f"{shape.parameters:,} parameters, {shape.trainable:,} trained, "
            f"{config.model.dtype}, {config.model.attention}, {config.model.pooling} pooling",
        ),
        (
            "schedule",
            f"{plan.schedule}{' (auto)' if config.schedule == 'auto' else ''}, "
            f"{plan.keep_graphs} graphs kept, ZeRO stage {workload.stage} "
            f"on {workload.world_size} ranks",
        ),
        *([("warning", plan.warning)] if plan.warning else []),
        *((f"memory: {name}", _bytes(size)) for name, size in memory.items() if size),
        ("memory: sum per rank", _bytes(sum(memory.values()))),
        ("memory: peak while loading", _bytes(loading_peak(shape, workload))),
    ]
    return _align(lines)


def _objective(batch: GlobalBatch, config: TrainConfig) -> list[tuple[str, str]]:
    if config.objective is None:
        text = f"{batch.num_queries} queries, {batch.num_documents} distinct documents"
        return [("global batch", text)]
    sections = {key: value for key, value in as_tree(config.objective).items() if value is not None}
    return [("objective", str(sections)), ("global batch", f"{batch.num_documents} texts")]


def _steps(plan: RunPlan, config: TrainConfig) -> str:
    """Format steps x batch = examples, in epochs."""
    unit = "queries" if config.objective is None else "texts"
    size = config.data.global_batch_size
    total = config.num_steps * size
    return (
        f"{config.num_steps} x {size} = {total:,} {unit} = "
        f"{total / plan.num_examples:.2f} epochs of {plan.num_examples:,} examples"
    )


def describe_loss(*, num_queries: int, num_documents: int, width: int, world_size: int) -> str:
    """Format the cost of the loss alone, at a size for which no data need exist."""
    cost = loss_cost(
        num_queries=num_queries,
        num_documents=num_documents,
        width=width,
        world_size=world_size,
        score_bytes=DEFAULT_SCORE_BYTES["cuda"],
    )
    naive = 4.0 * num_queries * num_documents
    lines = [
        ("loss", f"{num_queries:,} queries x {num_documents:,} documents, {world_size} ranks"),
        ("query blocks", f"{cost.num_blocks:,}, {cost.num_tiles:,} tiles scored by each rank"),
        ("peak memory", f"{_bytes(cost.peak_bytes)} per rank (all scores: {_bytes(naive)})"),
        ("received per step", f"{_bytes(cost.received_bytes)} per rank"),
        ("matrix products", f"{cost.matmul_flops:.3g} FLOP per rank"),
    ]
    return _align(lines)


def _align(lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _bytes(size: float) -> str:
    if size < 1:
        return "0 B"
    power = min(int(math.log(size, 1024)), 4)
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
