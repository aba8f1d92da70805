"""Loading into partitions on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.bench_support import tiny_qwen2
from tests.support import launch_ranks

pytestmark = pytest.mark.gpu
WORKER = Path(__file__).with_name("loading_worker.py")
MIB = 2**20


def test_pieces_go_to_the_gpu_and_equal_the_whole_model(tmp_path: Path) -> None:
    path = tiny_qwen2(tmp_path, hidden_size=1024, num_layers=8, vocab_size=20000)
    output = launch_ranks(1, WORKER, str(path))
    (result,) = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    assert result["equal"]
    # One rank's partitions are the model; a piece is whole in addition while it is cut up.
    assert result["peak"] <= result["model"] + 2 * result["piece"] + 16 * MIB
