"""The merge gate: gradients through caching, chunking and ZeRO equal plain autograd's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import launch_ranks

WORKER = Path(__file__).with_name("parity_worker.py")


@pytest.mark.parametrize("world_size", [1, 2])
def test_cached_sharded_gradients_equal_plain_gradients(model_path: Path, world_size: int) -> None:
    output = launch_ranks(world_size, WORKER, str(model_path))
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(results) == 3 * 8 * 2 + (3 if world_size == 1 else 0)
    for result in results:
        assert result["error"] <= 1e-5, result
        assert result["loss"] == pytest.approx(result["reference_loss"], rel=1e-6), result
