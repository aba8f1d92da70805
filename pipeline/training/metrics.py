"""One line of numbers per step, kept in order across interruptions."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.files import read_json_lines
from pipeline.run_dir import write_text


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """What every line of `metrics.jsonl` holds, among others."""

    step: int


class Tracker(Protocol):
    """Anything that takes numbers by step."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take one step's numbers."""

    def close(self) -> None:
        """Write what is not written yet: a rank ends without Python's own end, which would."""


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

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines_before(path: Path, first_step: int) -> list[str]:
    fix = "move it away; the resumed run then begins another one"
    lines = read_json_lines(path, _Line, fix=fix)
    kept = [text for text, line in lines if line["step"] < first_step]
    if first_step and not kept:
        print(f"{path}: no line of the steps before {first_step}", file=sys.stderr, flush=True)
    return [f"{text}\n" for text in kept]


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

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class _Wandb:
    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        import wandb

        # The folder is the run, so that a resumed job continues its curve. The whole path: runs of
        # several tasks end in the same name.
        folder = run_dir.resolve()
        self._run = wandb.init(
            project="diffembed",
            id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
            name="/".join(folder.parts[-2:]),
            resume="allow",
            dir=run_dir,
            config=config,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _Tensorboard:
    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers then leave out what was written after the checkpoint that the run resumes from.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing, before anything is loaded.

    Raises:
        UserError: names the first one.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"trackers: {name} is not installed here",
                fix="pip install -e '.[track]', or remove it from trackers",
            )


def open_trackers(
    names: Sequence[str], *, run_dir: Path, config: dict[str, Any], first_step: int
) -> list[Tracker]:
    """Start the trackers of the training config; their packages are in the `track` extra.

    Args:
        names: `wandb`, `tensorboard`.
        run_dir: the run's folder, which they write to.
        config: what the run was asked, to show beside its curves.
        first_step: the step that the run begins or resumes with.
    """
    trackers: list[Tracker] = []
    for name in names:
        trackers.append(
            _Wandb(run_dir, config) if name == "wandb" else _Tensorboard(run_dir, first_step)
        )
    return trackers
