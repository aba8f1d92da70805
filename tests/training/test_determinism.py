"""`deterministic` asks torch for fixed orders, and changes no bit where they are fixed anyway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.training.contrastive_step import accumulate_gradients
from pipeline.training.trainer import set_determinism
from tests.benchmarks.bench_support import (
    PlainEngine,
    draw_texts,
    load,
    make_batch,
    step_config,
    take_gradients,
)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    set_determinism(False)


@pytest.mark.parametrize("wanted", [True, False])
def test_an_operation_without_a_fixed_order_is_refused_not_only_reported(wanted: bool) -> None:
    """torch's attention kernels keep their atomics where they are only to warn."""
    set_determinism(wanted)
    assert torch.are_deterministic_algorithms_enabled() == wanted
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize("schedule", ["cache", "sweep"])
def test_a_cpu_computes_the_same_bits_with_and_without_it(schedule: str, model_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(2, 30, size=16)
    batch = make_batch(draw_texts(lengths, 500), 8, max_tokens=1000, min_chunks=3)
    gradients = []
    for wanted in (False, True):
        set_determinism(wanted)
        encoder = load(model_path)
        config = step_config(schedule)
        accumulate_gradients(PlainEngine(encoder), batch, config, device=torch.device("cpu"))
        gradients.append(take_gradients(encoder))
    without, with_it = gradients
    assert without.keys() == with_it.keys()
    assert all(torch.equal(without[name], with_it[name]) for name in without)
