"""One line of numbers per step, kept in order across interruptions."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from pipeline.run_dir import write_text


class Tracker(Protocol):
    """Anything that takes numbers by step."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take one step's numbers."""


class JsonLines:
    """`metrics.jsonl`: one JSON object per step.

    Args:
        path: the file, appended to.
        first_step: lines of this step and later are dropped first: they were written after the
            checkpoint that the run now resumes from, and will be written again.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        if path.exists():
            write_text(path, "".join(_lines_before(path, first_step)))
        self._file = path.open("a", buffering=1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line."""
        # JSON has no NaN; a reader of another language would stop at it.
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")


def _lines_before(path: Path, first_step: int) -> list[str]:
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        # A killed process may leave half a last line.
        if line.endswith("\n") and json.loads(line)["step"] < first_step:
            kept.append(line)
    return kept


class Progress:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, first_step: int, num_steps: int) -> None:
        self._num_steps = num_steps
        self._last_print = 0.0
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=num_steps, initial=first_step, unit="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show one step."""
        text = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            self._bar.update()
            return
        now = time.monotonic()
        # A log file wants a line every few seconds, not thousands.
        if now - self._last_print > 5 or step + 1 == self._num_steps:
            self._last_print = now
            print(
                f"step {step + 1}/{self._num_steps}  {text}  "
                f"{values['tokens_per_second']:.0f} tokens/s",
                flush=True,
            )


class _Wandb:
    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        import wandb

        # The run's folder names the run, so that a resumed job continues its curve.
        self._run = wandb.init(
            project="diffembed", id=run_dir.name, resume="allow", dir=run_dir, config=config
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)


class _Tensorboard:
    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)


def open_trackers(names: Sequence[str], *, run_dir: Path, config: dict[str, Any]) -> list[Tracker]:
    """Start the trackers of the training config; their packages are in the `track` extra."""
    trackers: list[Tracker] = []
    for name in names:
        trackers.append(_Wandb(run_dir, config) if name == "wandb" else _Tensorboard(run_dir))
    return trackers
