"""How far a training run has got, and how often a job has tried to get further."""

from __future__ import annotations

import contextlib
import datetime
import json
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run_dir import RunDir, checkpoint_step, read_latest, write_json

_UNKNOWN = "no word: a node failed, or the job was killed"
_START = {"time": "", "step": 0, "nodes": "", "end": _UNKNOWN, "unfit": False}


def last_step(output_dir: Path) -> int:
    """Steps in the newest whole checkpoint of a run; 0 without one.

    Raises:
        UserError: `latest` does not hold a checkpoint's name.
    """
    folder = RunDir(output_dir).checkpoints
    name = read_latest(folder)
    if name is None:
        return 0
    step = checkpoint_step(name)
    if step is None:
        raise UserError(f"{folder}/latest: {name!r}", allowed="the name of a checkpoint next to it")
    return step


class History:
    """Every start of one job: where it began, on which nodes, and how it ended.

    One file for each job in the run's folder, so that a new job counts from zero.
    """

    def __init__(self, output_dir: Path, job: str) -> None:
        self._path = output_dir / "jobs" / f"starts-{job}.json"
        self._starts: list[dict[str, Any]] = []
        if self._path.exists():
            # Counting from zero after damage is better than ending the run.
            with contextlib.suppress(ValueError, TypeError):
                self._starts = [{**_START, **start} for start in json.loads(self._path.read_text())]

    def start(self, step: int, nodes: str) -> None:
        """Note a start; it is on disk when this returns."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._starts.append({**_START, "time": now, "step": step, "nodes": nodes})
        write_json(self._path, self._starts)

    def end(self, how: str, *, unfit: bool = False) -> None:
        """Note how the newest start ended; `unfit` when it never came to training."""
        for entry in self._starts[-1:]:
            entry |= {"end": how, "unfit": unfit}
        write_json(self._path, self._starts)

    def hand_over(self, job: str) -> None:
        """Let another job that continues this one keep counting."""
        write_json(self._path.with_name(f"starts-{job}.json"), self._starts)

    @property
    def num_starts(self) -> int:
        """All of them."""
        return len(self._starts)

    @property
    def num_unfit(self) -> int:
        """Starts that never came to training."""
        return sum(entry["unfit"] for entry in self._starts)

    def idle_starts(self, step: int) -> int:
        """Starts to train that began at `step`."""
        return len(self.endings(step))

    def endings(self, step: int) -> list[str]:
        """How the starts that began at `step` ended."""
        starts = [entry for entry in self._starts if not entry["unfit"]]
        return [entry["end"] for entry in starts if entry["step"] == step]
