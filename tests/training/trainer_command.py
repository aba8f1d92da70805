"""The trainer of this checkout as a command, alone or on ranks, and its numbers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests import forks
from tests.support import PATIENCE, run_together

ROOT = Path(__file__).parents[2]


def run_trainer(
    *arguments: str | Path, num_ranks: int = 1, script: str | Path = "pipeline/train.py"
) -> subprocess.CompletedProcess[str]:
    """Run it in the checkout's folder until it ends, whatever its exit code; all ranks' output."""
    words = [str(word) for word in (script, *arguments)]
    if num_ranks == 1:
        return forks.run(words, folder=ROOT, timeout=PATIENCE)
    ranks = run_together([words] * num_ranks, folder=ROOT)
    code = next((rank.returncode for rank in ranks if rank.returncode), 0)
    stdout, stderr = ("".join(rank.stdout for rank in ranks), "".join(r.stderr for r in ranks))
    return subprocess.CompletedProcess(words, code, stdout, stderr)


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the run's lines without measured times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["tokens_per_second"], line["peak_memory_gib"]
    return lines
