"""Two ranks on pretended devices: gradients of the whole batch, and collectives that NCCL takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import comm
from pipeline.config import LossConfig
from pipeline.training.contrastive_step import accumulate_gradients
from tests.benchmarks.bench_support import PlainEngine, gradient_error, load, take_gradients
from tests.fake_cuda.fake_cuda import to_cuda
from tests.fake_cuda.tracing import config_of, full_batch, step_on_device
from tests.support import run_ranks

# Waits of a step: the sizes of all ranks (twice), the sizes of all blocks, and the results; and for
# each rank's block of queries one in each direction and width, to find significant scores.
MAX_SYNCS = 4
CASES = {
    "cache, in-batch": ("cache", LossConfig(temperature=0.2)),
    "sweep, symmetric, learned temperature": (
        "sweep",
        LossConfig(temperature=0.2, symmetric=True, learn_temperature=True),
    ),
    "cache, own, Matryoshka": (
        "cache",
        LossConfig(temperature=0.2, negatives="own", matryoshka_dims=(8,)),
    ),
}


def trace_of_rank(folder: str) -> dict[str, dict[str, Any]]:
    """Trace every case; a collective that NCCL would refuse fails in it."""
    found = {}
    for name, (schedule, loss) in CASES.items():
        encoder = to_cuda(load(Path(folder)))
        batch = full_batch(rank=comm.rank(), world_size=comm.world_size())
        gradients, _, record = step_on_device(encoder, batch, config_of(schedule, loss=loss))
        found[name] = {
            "gradients": gradients,
            "syncs": dict(record.syncs),
            "collectives": record.collectives,
        }
    return found


@pytest.fixture(scope="module")
def traces(qwen2: Path) -> list[dict[str, Any]]:
    return run_ranks(2, trace_of_rank, str(qwen2))


@pytest.mark.parametrize("name", CASES)
def test_ranks_share_the_gradient_and_make_the_same_calls(
    name: str, traces: list[dict[str, Any]], qwen2: Path
) -> None:
    _, loss = CASES[name]
    encoder = load(qwen2)
    temperature = loss.temperature if loss.learn_temperature else None
    accumulate_gradients(
        PlainEngine(encoder),
        full_batch(),
        config_of("plain", loss=loss),
        device=torch.device("cpu"),
        temperature=temperature,
    )
    first, second = (trace[name] for trace in traces)
    mean = {
        key: (first["gradients"][key] + second["gradients"][key]) / 2 for key in first["gradients"]
    }

    assert gradient_error(mean, take_gradients(encoder)) <= 1e-4
    assert first["collectives"] == second["collectives"] != []
    most = MAX_SYNCS + 2 * (1 + loss.symmetric) * (1 + len(loss.matryoshka_dims))
    for trace in (first, second):
        assert sum(trace["syncs"].values()) <= most, trace["syncs"]
