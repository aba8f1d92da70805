"""A schedule runs every chunk as often, and keeps as much between its passes, as is planned for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.data.batch import GlobalBatch
from pipeline.planning.memory import RankWorkload, memory_terms
from pipeline.planning.shape import ModelShape
from pipeline.training.contrastive_step import accumulate_gradients
from pipeline.training.schedules import BoundaryStore
from tests.benchmarks.bench_support import PlainEngine, draw_texts, load, make_batch, step_config

PAIRS = 8


class Counting(PlainEngine):
    """Notes whether each chunk that it embeds gets a graph."""

    def __init__(self, path: Path) -> None:
        super().__init__(load(path))
        self.with_graph: list[bool] = []

    def embed(self, *chunk: Any) -> torch.Tensor:
        self.with_graph.append(torch.is_grad_enabled())
        return super().embed(*chunk)


def batch_of_four_chunks() -> GlobalBatch:
    lengths = np.random.default_rng(0).integers(2, 30, size=2 * PAIRS)
    return make_batch(draw_texts(lengths, 500), PAIRS, max_tokens=1000, min_chunks=4)


@pytest.mark.parametrize(
    ("schedule", "keep_graphs", "with_graph"),
    [
        ("plain", 0, [True] * 4),
        ("cache", 0, [False] * 4 + [True] * 4),
        ("cache", 1, [False] * 3 + [True] * 4),
        ("cache", 9, [True] * 4),
    ],
)
def test_only_chunks_whose_graph_is_not_kept_are_embedded_twice(
    model_path: Path, schedule: str, keep_graphs: int, with_graph: list[bool]
) -> None:
    engine = Counting(model_path)
    config = step_config(schedule, keep_graphs=keep_graphs)
    accumulate_gradients(engine, batch_of_four_chunks(), config, device=torch.device("cpu"))
    assert engine.with_graph == with_graph


def test_a_sweep_keeps_the_bytes_that_the_plan_counts(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    put = BoundaryStore.put

    def note(store: BoundaryStore, stage: int, chunk: int, hidden: torch.Tensor) -> None:
        sizes.append(hidden.nbytes)
        put(store, stage, chunk, hidden)

    monkeypatch.setattr(BoundaryStore, "put", note)
    engine, batch = Counting(model_path), batch_of_four_chunks()
    accumulate_gradients(engine, batch, step_config("sweep"), device=torch.device("cpu"))
    workload = RankWorkload(
        world_size=1,
        stage=3,
        dtype="float32",
        rank_tokens=batch.tokens,
        chunk_tokens=max(len(chunk.input_ids) for chunk in batch.chunks),
        gradient_checkpointing=False,
    )
    config = ModelConfig(path=str(model_path), dtype="float32")
    terms = memory_terms(ModelShape.of(engine.encoder, config), workload, "sweep")
    assert sum(sizes) == next(term.size for term in terms if term.part == "boundaries")
