"""Gradients of many chunks added up in bf16 stay near their fp32 sum; on a GPU if there is one."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.bench_support import tiny_qwen2
from tests.gpu import drift_worker
from tests.support import launch_ranks


def test_128_coalesced_bf16_chunks_drift_no_more_than_their_rounding(tmp_path: Path) -> None:
    # Each parameter adds up its own gradients: more layers or columns would show nothing else.
    path = tiny_qwen2(tmp_path, hidden_size=64, num_layers=1, vocab_size=drift_worker.VOCAB_SIZE)
    output = launch_ranks(1, Path(drift_worker.__file__), str(path))

    result = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    # Each chunk's gradient was rounded once, to 2**-9. A sum in bf16 would drift to 0.011.
    assert result["drift"] <= 2**-8
