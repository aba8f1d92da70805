"""The trainer of this checkout as a command, alone or on ranks of the deepspeed launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support import PATIENCE, free_port

ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def run_trainer(
    *arguments: str | Path, num_ranks: int = 1, script: str | Path = "pipeline/train.py"
) -> subprocess.CompletedProcess[str]:
    """Run it in the checkout's folder until it ends, whatever its exit code."""
    launcher: list[str | Path] = [sys.executable]
    if num_ranks > 1:
        launcher = [Path(sys.executable).with_name("deepspeed"), f"--master_port={free_port()}"]
        launcher += ["--num_accelerators", str(num_ranks)]
    return subprocess.run(
        [str(word) for word in (*launcher, script, *arguments)],
        cwd=ROOT,
        env={**os.environ, **_ENVIRONMENT},
        text=True,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
