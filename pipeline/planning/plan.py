"""Batch arithmetic, schedule and memory of a run, printed before anything is trained."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pipeline.config import TrainConfig, as_tree
from pipeline.data.batch import GlobalBatch
from pipeline.data.text_loader import make_loader, open_dataset, require_negatives
from pipeline.loss.contrastive import check_loss
from pipeline.loss.tiles import DEFAULT_SCORE_BYTES, loss_cost
from pipeline.loss.tokens import TILE_BYTES
from pipeline.model.language import build_model
from pipeline.planning.memory import (
    SCHEDULES,
    Layout,
    ModelShape,
    Schedule,
    choose_schedule,
    graphs_that_fit,
    loading_peak,
    memory_per_rank,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """A run's first global batch, laid out as every rank would, and the schedule for it."""

    batch: GlobalBatch  # as rank 0 gets it
    num_examples: int
    shape: ModelShape
    layout: Layout
    schedule: Schedule
    keep_graphs: int
    warning: str  # about queries without negatives, if any


def plan_run(
    config: TrainConfig, ds_config: dict[str, Any], *, world_size: int, available: float
) -> RunPlan:
    """Lay out the first batch and choose the schedule where the config says `auto`.

    Args:
        config: the run.
        ds_config: the resolved DeepSpeed config.
        world_size: ranks to plan for.
        available: bytes of device memory of the rank that has least.

    Raises:
        UserError: the data cannot be read, the batch is impossible, or no schedule fits.
    """
    dataset = open_dataset(config, verify=False)
    loader = make_loader(dataset, config, rank=0, world_size=world_size)
    warning = require_negatives(loader, config)
    tokens = loader.chunk_tokens(0)
    zero = ds_config["zero_optimization"]
    layout = Layout(
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
    encoder = build_model(config, meta=True)
    check_loss(config.loss, width=encoder.num_dimensions, has_scores=dataset.manifest.has_scores)
    shape = ModelShape.of(encoder)
    schedule = config.schedule
    if schedule == "auto":
        # Tokens are predicted chunk by chunk, which in memory is what `cache` needs.
        allowed = SCHEDULES if config.objective is None else SCHEDULES[1:]
        schedule = choose_schedule(shape, layout, available, allowed)
    return RunPlan(
        batch=loader.batch(0),
        num_examples=sum(unit.size for unit in loader.order.units),
        shape=shape,
        layout=layout,
        schedule=schedule,
        keep_graphs=_keep_graphs(config, shape, layout, schedule, available, len(tokens[0])),
        warning=warning,
    )


def _keep_graphs(
    config: TrainConfig,
    shape: ModelShape,
    layout: Layout,
    schedule: Schedule,
    available: float,
    num_chunks: int,
) -> int:
    kept = config.chunks.keep_graphs
    if schedule != "cache" or config.objective is not None:
        return 0
    return graphs_that_fit(shape, layout, available, num_chunks) if kept == "auto" else kept


def describe(plan: RunPlan, config: TrainConfig) -> str:
    """A plan as aligned lines of text."""
    batch, layout, shape = plan.batch, plan.layout, plan.shape
    memory = memory_per_rank(shape, layout, plan.schedule)
    optimizer = config.optimizer
    lines = [
        *_objective(batch, config),
        (
            "tokens",
            f"{batch.tokens:,} = {len(batch.chunks)} chunks x <= {layout.chunk_tokens:,} tokens x "
            f"{layout.world_size} ranks (budget {config.chunks.max_tokens:,} a chunk)",
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
            f"{plan.keep_graphs} graphs kept, ZeRO stage {layout.stage} "
            f"on {layout.world_size} ranks",
        ),
        *([("warning", plan.warning)] if plan.warning else []),
        *((f"memory: {name}", _bytes(size)) for name, size in memory.items() if size),
        ("memory: sum per rank", _bytes(sum(memory.values()))),
        ("memory: peak while loading", _bytes(loading_peak(shape, layout))),
    ]
    return _align(lines)


def _objective(batch: GlobalBatch, config: TrainConfig) -> list[tuple[str, str]]:
    if config.objective is None:
        text = f"{batch.num_queries} queries, {batch.num_documents} distinct documents"
        return [("global batch", text)]
    sections = {key: value for key, value in as_tree(config.objective).items() if value is not None}
    return [("objective", str(sections)), ("global batch", f"{batch.num_documents} texts")]


def _steps(plan: RunPlan, config: TrainConfig) -> str:
    """Steps x batch = examples, in epochs."""
    unit = "queries" if config.objective is None else "texts"
    size = config.data.global_batch_size
    total = config.num_steps * size
    return (
        f"{config.num_steps} x {size} = {total:,} {unit} = "
        f"{total / plan.num_examples:.2f} epochs of {plan.num_examples:,} examples"
    )


def describe_loss(*, num_queries: int, num_documents: int, width: int, world_size: int) -> str:
    """What the loss alone costs each rank at a size that need not exist yet."""
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
