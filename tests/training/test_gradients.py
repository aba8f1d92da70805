"""The merge gate: gradients through caching, chunking and ZeRO equal plain autograd's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import launch_ranks
from tests.training.parity_worker import list_cases

WORKER = Path(__file__).with_name("parity_worker.py")
CASES = [(world_size, name) for world_size in (1, 2, 3) for name in list_cases(world_size)]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, model_path: Path) -> dict[str, dict[str, float]]:
    """Return the results of all cases on so many ranks, by name.

    One launch does them all, except for compiled layers: their ranks are forked from one process.
    """
    world_size = request.param
    output = launch_ranks(world_size, WORKER, str(model_path))
    if any(case.get("compiled") for case in list_cases(world_size).values()):
        output += launch_ranks(1, WORKER, str(model_path), str(world_size))
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {result["case"]: result for result in found}


@pytest.mark.parametrize(
    ("results", "name"),
    CASES,
    ids=[f"{ranks} ranks, {name}" for ranks, name in CASES],
    indirect=["results"],
    scope="module",  # one launch for all cases, not one per case
)
def test_cached_sharded_gradients_equal_plain_gradients(
    results: dict[str, dict[str, float]], name: str
) -> None:
    result = results[name]
    assert result["error"] <= 1e-5
    assert result["loss"] == pytest.approx(result["reference_loss"], rel=1e-6)
