"""A step on the pretended device, and what every trace must show."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import ChunkConfig, LossConfig, ModelConfig, TrainConfig
from pipeline.data.batch import GlobalBatch, Ragged
from pipeline.loss.targets import LossOutput
from pipeline.model.encoder import Encoder
from pipeline.training.contrastive_step import accumulate_gradients
from tests.benchmarks.bench_support import (
    Gradients,
    PlainEngine,
    draw_texts,
    make_batch,
    step_config,
    take_gradients,
)
from tests.fake_cuda.fake_cuda import CudaTensor, FakeCuda, Record

# How often the host may wait for the device in one step, with any number of chunks. Each wait
# empties the device's queue of work: raise these numbers only if there is no other way.
MAX_SYNCS = {"plain": 4, "cache": 4, "sweep": 4}
# Parts of the encoder that a sweep calls one by one.
_PARTS = ("embed", "run_layer", "finish")


def watch(encoder: Any, record: Record) -> None:
    """Let the record refuse waits within each part of an encoder, forwards run again included."""

    def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record.never_waits(f"forward ({name})"):
                return work(*args, **kwargs)

        return call

    for name in _PARTS:
        setattr(encoder, name, watched(name, getattr(encoder, name)))


class WatchedEngine(PlainEngine):
    """An engine in which neither forward nor backward may make the host wait."""

    def __init__(self, encoder: Any, record: Record) -> None:
        super().__init__(encoder)
        self._record = record
        watch(encoder, record)

    def backward(self, surrogate: torch.Tensor) -> None:
        """Accumulate gradients."""
        with self._record.never_waits("backward"):
            super().backward(surrogate)


def step_on_device(
    encoder: Encoder, batch: GlobalBatch, config: TrainConfig
) -> tuple[Gradients, LossOutput, Record]:
    """Run a step of an encoder that lies on the device; return its gradients on the CPU."""
    temperature = config.loss.temperature if config.loss.learn_temperature else None
    with FakeCuda() as record:
        output = accumulate_gradients(
            WatchedEngine(encoder, record),
            batch,
            config,
            device=torch.device("cuda", 0),
            temperature=temperature,
        )
    require_one_device(encoder)
    assert not record.hot_syncs, f"the host waits within {dict(record.hot_syncs)}"
    gradients: Any = take_gradients(encoder)
    return {name: g.inner.float() for name, g in gradients.items()}, output, record


def require_one_device(encoder: torch.nn.Module) -> None:
    """Check that weights, buffers and gradients are on the device."""
    for name, parameter in encoder.named_parameters():
        assert isinstance(parameter.data, CudaTensor), name
        assert parameter.grad is None or isinstance(parameter.grad, CudaTensor), name
    for name, buffer in encoder.named_buffers():
        assert isinstance(buffer, CudaTensor), name


def config_of(
    schedule: str,
    *,
    loss: LossConfig | None = None,
    keep_graphs: int = 0,
    boundaries: Any = "device",
) -> TrainConfig:
    """Return what a step reads of a training config."""
    base = step_config(schedule)
    return TrainConfig(
        output_dir=Path("unused"),
        num_steps=1,
        model=ModelConfig(path="unused", dtype="float32"),
        data=base.data,
        schedule=base.schedule,
        chunks=ChunkConfig(keep_graphs=keep_graphs, boundaries=boundaries),
        loss=loss or base.loss,
    )


def full_batch(
    num_queries: int = 6, *, rank: int = 0, world_size: int = 1, max_tokens: int = 70
) -> GlobalBatch:
    """A batch with two positives for a query, negatives, masked documents and teacher scores."""
    rng = np.random.default_rng(0)
    num_documents = num_queries + 3
    texts = draw_texts(rng.integers(2, 20, size=num_queries + num_documents), 200)
    batch = make_batch(
        texts, num_queries, max_tokens=max_tokens, min_chunks=2, rank=rank, world_size=world_size
    )
    extra = [num_queries + i % 3 for i in range(num_queries)]
    positives = Ragged.from_rows(
        [np.array([i] if i else [0, num_queries]) for i in range(num_queries)]
    )
    negatives = Ragged.from_rows([np.array([e] if i else []) for i, e in enumerate(extra)])
    masked = Ragged.from_rows([np.array([2] if i == 1 else []) for i in range(num_queries)])
    return replaced(batch, positives, negatives, masked, rng)


def replaced(
    batch: GlobalBatch, positives: Ragged, negatives: Ragged, masked: Ragged, rng: Any
) -> GlobalBatch:
    """Give a batch these lists, and random scores of a teacher."""
    lists = {"positives": positives, "negatives": negatives, "masked": masked}
    as_int = {
        name: Ragged(offsets=x.offsets, values=x.values.astype(np.int64))
        for name, x in lists.items()
    }
    scores = {
        f"{name.removesuffix('s')}_scores": Ragged(
            offsets=as_int[name].offsets,
            values=rng.standard_normal(len(as_int[name].values)).astype(np.float32),
        )
        for name in ("positives", "negatives")
    }
    return dataclasses.replace(batch, **as_int, **scores)


def all_pairs(factors: dict[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Choose cases in which any two values of any two factors meet at least once."""
    rng = random.Random(seed)
    names = list(factors)

    def pairs_of(case: dict[str, Any]) -> set[Any]:
        return {((a, case[a]), (b, case[b])) for a, b in itertools.combinations(names, 2)}

    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
    }
    cases = []
    while missing:
        wanted = dict(min(missing, key=repr))
        tries = [
            {**{name: rng.choice(factors[name]) for name in names}, **wanted} for _ in range(40)
        ]
        best = max(tries, key=lambda case: len(pairs_of(case) & missing))
        cases.append(best)
        missing -= pairs_of(best)
    return cases
