"""Batch arithmetic and memory of a run, printed by `--dry-run` before anything is trained."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pipeline.config import TrainConfig
from pipeline.data.loader import Loader
from pipeline.data.shards import Dataset
from pipeline.model.encoder import build_encoder
from pipeline.planning.memory import ModelShape, memory_per_rank


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """The numbers of one global batch, from the real data of step 0."""

    world_size: int
    num_queries: int
    num_documents: int
    num_examples: int
    tokens: int
    chunks: int
    largest_chunk: int
    max_chunk_tokens: int


def plan_batch(config: TrainConfig, dataset: Dataset, *, world_size: int) -> BatchPlan:
    """Plan the first global batch as every rank would."""
    batches = [
        Loader(
            dataset,
            config.data,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            max_chunk_tokens=config.chunks.max_tokens,
            min_chunks=config.chunks.min_chunks,
        ).batch(0)
        for rank in range(world_size)
    ]
    return BatchPlan(
        world_size=world_size,
        num_queries=batches[0].num_queries,
        num_documents=batches[0].num_documents,
        num_examples=dataset.num_examples,
        tokens=batches[0].tokens,
        chunks=len(batches[0].chunks),
        largest_chunk=max(len(c.input_ids) for batch in batches for c in batch.chunks),
        max_chunk_tokens=config.chunks.max_tokens,
    )


def describe_run(config: TrainConfig, ds_config: dict[str, Any], *, world_size: int) -> str:
    """The whole dry run as text: batch arithmetic, schedule, memory per rank.

    Raises:
        UserError: the data cannot be read, or the batch is impossible.
    """
    batch = plan_batch(config, Dataset.open(config.data.path), world_size=world_size)
    stage = ds_config["zero_optimization"]["stage"]
    encoder = build_encoder(config.model, meta=True)
    shape = ModelShape.of(encoder)
    memory = memory_per_rank(
        shape,
        world_size=world_size,
        stage=stage,
        dtype=config.model.dtype,
        chunk_tokens=batch.largest_chunk,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    lines = [
        ("global batch", f"{batch.num_queries} queries, {batch.num_documents} distinct documents"),
        (
            "tokens",
            f"{batch.tokens:,} = {batch.chunks} chunks x <= {batch.largest_chunk:,} tokens x "
            f"{world_size} ranks (budget {batch.max_chunk_tokens:,} a chunk)",
        ),
        ("steps", _steps(config, batch)),
        ("learning rate", _learning_rate(config)),
        (
            "model",
            f"{shape.parameters:,} parameters, {shape.trainable:,} trained, "
            f"{config.model.dtype}, {config.model.attention}, {config.model.pooling} pooling",
        ),
        ("ZeRO", f"stage {stage} on {world_size} ranks, schedule {config.schedule}"),
        *((f"memory: {name}", _bytes(size)) for name, size in memory.items()),
        ("memory: sum per rank", _bytes(sum(memory.values()))),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _steps(config: TrainConfig, batch: BatchPlan) -> str:
    queries = config.num_steps * batch.num_queries
    return (
        f"{config.num_steps} x {batch.num_queries} = {queries:,} queries = "
        f"{queries / batch.num_examples:.2f} epochs of {batch.num_examples:,} examples"
    )


def _learning_rate(config: TrainConfig) -> str:
    optimizer = config.optimizer
    return f"{optimizer.lr:g} after {optimizer.warmup_steps} warm-up steps, then {optimizer.decay}"


def _bytes(size: float) -> str:
    if size < 1:
        return "0 B"
    power = min(int(math.log(size, 1024)), 4)
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
