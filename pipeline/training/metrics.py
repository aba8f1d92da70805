"""Log one line of numbers per step, in order across interruptions: file, screen, trackers."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from tqdm import tqdm

from pipeline.errors import UserError, say_line
from pipeline.files import read_json_lines, write_text

# Logged steps of a start that are not compared with a prediction.
_WARM_UP_STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """The fields of `metrics.jsonl` that are read back."""

    step: int


class Tracker(Protocol):
    """Anything that takes numbers by step."""

    def log(self, step: int, values: dict[str, float], kind: str = "") -> None:
        """Take one step's numbers, and the kind of its batch (see Order.kinds)."""

    def close(self) -> None:
        """Write buffered numbers: a rank exits without Python's finalisation, which would."""


class JsonLines:
    """`metrics.jsonl`: one JSON object per step.

    `step` counts from 0, as the data order does: the line of step 0 is step 1 on the
    screen, and checkpoint `step-000001` holds its update.

    Args:
        path: the file, appended to.
        first_step: lines of this step and later are dropped first: they were written after the
            checkpoint that the run now resumes from, and will be written again.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        if path.exists():
            write_text(path, "".join(_lines_before(path, first_step)))
        self._path = path
        self._waiting = ""

    def log(self, step: int, values: dict[str, float], kind: str = "") -> None:
        """Append one line; where the disk is full, it waits for the next step."""
        # JSON has no NaN; a reader of another language would stop at it.
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        named = {"kind": kind} if kind else {}
        line = json.dumps({"step": step, **named, **finite}, ensure_ascii=False)
        self._waiting += line + "\n"
        self._try_to_write("its lines wait for the next step")

    def _write(self) -> None:
        """Append all waiting lines, or nothing."""
        # Unbuffered, in one call: the part that a full disk took can be cut off again.
        with self._path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            lines = self._waiting.encode()
            try:
                if file.write(lines) != len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            except OSError:
                file.truncate(end)
                raise
        self._waiting = ""

    def _try_to_write(self, otherwise: str) -> None:
        try:
            self._write()
        except OSError as error:
            say_line(f"{self._path}: {error.strerror}; {otherwise}")

    def close(self) -> None:
        """Write what still waits."""
        if self._waiting:
            self._try_to_write(f"{self._waiting.count(chr(10))} lines of it are lost")


def _lines_before(path: Path, first_step: int) -> list[str]:
    fix = "move it away; the resumed run then starts a new one"
    lines = read_json_lines(path, _Line, fix=fix)
    # The resumed run computes the other steps again, and logs them.
    kept = [text for text, line in lines if line["step"] < first_step]
    if first_step and not kept:
        say_line(f"{path}: no line of the steps before {first_step}", file=sys.stderr)
    return [f"{text}\n" for text in kept]


class Progress:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, first_step: int, num_steps: int) -> None:
        self._num_steps = num_steps
        self._last_print = 0.0
        self._first: tuple[int, float] | None = None  # step and time that the pace counts from
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=num_steps, initial=first_step, unit="step")

    def log(self, step: int, values: dict[str, float], kind: str = "") -> None:
        """Show one step."""
        now = time.monotonic()
        text = describe_step(values, kind)
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            # Not every step is logged.
            self._bar.update(step + 1 - self._bar.n)
        # A log file wants a line every few seconds, not thousands.
        elif now - self._last_print > 5 or step + 1 == self._num_steps:
            self._last_print = now
            say_line(f"step {step + 1}/{self._num_steps}  {text}{self._left(step, now)}")
        # Not from the start: the first step also builds everything that later steps reuse.
        self._first = self._first or (step, now)

    def _left(self, step: int, now: float) -> str:
        """Estimate the time of the remaining steps at the pace so far."""
        if self._first is None or step == self._first[0]:
            return ""
        pace = (now - self._first[1]) / (step - self._first[0])
        seconds = round(pace * (self._num_steps - step - 1))
        return f"  {datetime.timedelta(seconds=seconds)} left"

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class Comparison:
    """Compares steps with what was predicted of them, in one line at the end.

    Args:
        predicted: numbers of a step by their key in `metrics.jsonl`; may be empty.
    """

    def __init__(self, predicted: Mapping[str, float]) -> None:
        self._predicted = predicted
        self._first: int | None = None
        self._seconds: list[float] = []
        self._peak = 0.0

    def log(self, step: int, values: dict[str, float], kind: str = "") -> None:
        """Take one step's numbers."""
        self._first = step if self._first is None else self._first
        # The first steps also make buffers, and choose kernels.
        if step - self._first >= _WARM_UP_STEPS and "seconds" in values:
            self._seconds.append(values["seconds"])
        self._peak = max(self._peak, values.get("peak_memory_gib", 0.0))

    def close(self) -> None:
        """Print the comparison, if there is something to compare."""
        parts = []
        if "seconds" in self._predicted and self._seconds:
            parts.append(
                f"{self._predicted['seconds']:.3g} s predicted, {median(self._seconds):.3g} s "
                f"observed (median of {len(self._seconds)} steps after the first {_WARM_UP_STEPS})"
            )
        if "peak_memory_gib" in self._predicted and self._peak:
            predicted = self._predicted["peak_memory_gib"]
            parts.append(f"{predicted:.1f} GiB predicted, {self._peak:.1f} GiB observed at most")
        if parts:
            say_line(f"a step: {'; '.join(parts)}")


def describe_step(values: dict[str, float], kind: str) -> str:
    """Format a step's numbers for the screen."""
    parts = [f"loss {values['loss']:.4f}" + (f" ({kind})" if kind else "")]
    if "accuracy@1" in values:
        parts.append(f"accuracy@1 {values['accuracy@1']:.3f}")
    parts.append(f"lr {values['lr']:.2e}")
    parts.append(f"{values['tokens_per_second']:.0f} tokens/s")
    if "peak_memory_gib" in values:
        parts.append(f"{values['peak_memory_gib']:.1f} GiB")
    return "  ".join(parts)


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

    def log(self, step: int, values: dict[str, float], kind: str = "") -> None:
        self._run.log({**values, **_by_kind(values, kind)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Tensorboard:
    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers then skip steps written after the checkpoint that the run resumes from.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: dict[str, float], kind: str = "") -> None:
        for key, value in {**values, **_by_kind(values, kind)}.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


def _by_kind(values: dict[str, float], kind: str) -> dict[str, float]:
    """Repeat the loss under the name of its kind of batch, for a curve per kind."""
    return {f"loss/{kind}": values["loss"]} if kind else {}


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
        config: the run's config, to show next to its curves.
        first_step: the step that the run starts or resumes with.
    """
    return [
        _Wandb(run_dir, config) if name == "wandb" else _Tensorboard(run_dir, first_step)
        for name in names
    ]
