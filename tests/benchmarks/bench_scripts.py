"""Scores before and after the scripts of launch/, each in a copy of the checkout's layout.

`quick` trains for two steps: it shows the way from raw data to the report, not its scores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_support import Figure

ROOT = Path(__file__).parents[2]


def quickstart(quick: bool) -> list[Figure]:
    """Return the scores of launch/quickstart.sh, which is small already."""
    return _script("quickstart", "quickstart")


def finetune(quick: bool) -> list[Figure]:
    """Return the scores of launch/finetune_minilm.sh, with rows of a synthesis by default."""
    generations = os.environ.get("GENERATIONS", "synthesis")
    return _script("finetune_minilm", "minilm", generations, *_training(quick))


def long_documents(quick: bool) -> list[Figure]:
    """Return the scores of launch/long_documents.sh."""
    return _script("long_documents", "long_documents", *_training(quick))


def miniature(quick: bool) -> list[Figure]:
    """Return the scores of launch/miniature.sh."""
    return _script("miniature", "miniature", *_training(quick))


def _training(quick: bool) -> tuple[str, ...]:
    return ("num_steps=2", "optimizer.warmup_steps=0") if quick else ()


def _script(name: str, folder: str, *words: str) -> list[Figure]:
    """Run a script of launch/; return the scores of its report, in a folder of its runs/."""
    with _checkout() as root:
        done = subprocess.run(
            [f"launch/{name}.sh", *words], cwd=root, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"launch/{name}.sh: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        report = json.loads((root / "runs" / folder / "report" / "report.json").read_text())
    return _figures(report)


@contextmanager
def _checkout() -> Iterator[Path]:
    """Yield a folder with links to the checkout's files, in which a script makes its runs/."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(ROOT / "launch", root / "launch")  # scripts go to the folder above theirs
        for path in ROOT.iterdir():
            if path.name not in ("launch", "runs", ".git"):
                (root / path.name).symlink_to(path)
        yield root


def _figures(report: dict[str, Any]) -> list[Figure]:
    models = report["models"]
    return [
        Figure(
            name=f"{task['name']}, {task['metric']}: {pair['minus']} -> {pair['model']}",
            measured=f"{task[pair['minus']]:.3f} -> {task[pair['model']]:.3f}, "
            f"{pair['difference']:+.3f} [{pair['ci_low']:+.3f}, {pair['ci_high']:+.3f}]",
        )
        for task in report["tasks"]
        for pair in task.get("pairs", [{**task, "minus": models[0], "model": models[-1]}])
    ]
