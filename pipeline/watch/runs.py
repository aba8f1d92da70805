"""Describe a training run from its folder: steps, losses by source, pace, checkpoints, starts.

metrics.jsonl ──Metrics──> lines of the steps that count ──describe_run──> View
config.yaml, kinds.json, checkpoints/, evaluations/, jobs/ ──┘
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pipeline import run_folder
from pipeline.config import read_yaml
from pipeline.errors import UserError, several
from pipeline.run_folder import RunDir
from pipeline.watch.logs import jobs_grid, newest_log, read_json_or_none, starts_grid
from pipeline.watch.view import Fact, Grid, Plot, Tone, View, age, duration

Line = dict[str, Any]
# The newest steps, which means are over.
_RECENT = 50
# A step is late after this many usual pauses between two lines, but not before a minute.
_PATIENCE_STEPS, _PATIENCE_SECONDS = 10, 60.0


class Metrics:
    """The lines of a `metrics.jsonl` that is still being written; each look reads only new ones.

    Where steps go back (a resumed run, or files joined by hand), the later lines count, and
    earlier lines of the same and later steps do not.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self.lines: list[Line] = []
        self.num_replaced = 0
        self.num_damaged = 0
        self._offset = 0
        self._identity: tuple[int, int] | None = None

    def read(self) -> None:
        """Take in the lines written since the last call; half a last line waits for the next."""
        try:
            with self._path.open("rb") as file:
                # Of the file that is read: its path may name the next one already.
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                # A resumed run replaces the file, without the lines of steps that it repeats.
                if identity != self._identity or status.st_size < self._offset:
                    self._forget()
                    self._identity = identity
                file.seek(self._offset)
                *whole, rest = file.read().split(b"\n")
                self._offset = file.tell() - len(rest)
        except FileNotFoundError:
            self._forget()
            return
        for text in whole:
            self._add(text)

    def _add(self, text: bytes) -> None:
        if not text.strip():
            return
        line: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
        # By `type`: to `isinstance`, `true` is an int too.
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            self.num_damaged += 1
            return
        # A run that resumed from an older checkpoint logs steps again: the later lines are true.
        while self.lines and self.lines[-1]["step"] >= line["step"]:
            self.lines.pop()
            self.num_replaced += 1
        self.lines.append(line)


def numbers(lines: Sequence[Line], key: str) -> list[float]:
    """Return the finite numbers under a key."""
    found = (line.get(key) for line in lines)
    return [
        float(value)
        for value in found
        # The last test drops NaN, infinity, and whole numbers that no float holds.
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    ]


def describe_run(root: Path, metrics: Metrics) -> View:
    """Describe a training run as its files are now."""
    run = RunDir(root)
    metrics.read()
    lines = metrics.lines
    tree = _config(run)
    num_steps = _number(tree, "num_steps")
    step = lines[-1]["step"] + 1 if lines else 0  # metrics count from 0, the screen from 1
    recent = lines[-_RECENT:]
    # Of a step: the median, because the first one also builds what later ones reuse.
    seconds = median(numbers(recent, "seconds") or [0.0])
    # Steps from one line to the next: with `log_every: 10` a new line takes ten steps.
    gap = lines[-1]["step"] - lines[-2]["step"] if len(lines) > 1 else 1
    state, tone = _state(run, step=step, num_steps=num_steps, seconds=gap * seconds)
    facts = [
        *_progress(step, num_steps, seconds, finished=state == "finished"),
        *_pace(recent, _number(tree, "data", "global_batch_size")),
        *_values(lines, recent),
        *_checkpoints(run, step),
        *_warnings(run, metrics),
    ]
    scores, jobs = _scores(run), run.jobs
    return View(
        title=f"training run {root}",
        state=state,
        tone=tone,
        done=min(1.0, step / num_steps) if num_steps else None,
        facts=tuple(facts),
        grids=(_losses(run, lines), starts_grid(jobs), jobs_grid(jobs), _score_grid(scores)),
        plots=tuple(_plots(lines, scores)),
        curve=tuple(line for line in lines if numbers([line], "loss")),
    )


def _config(run: RunDir) -> dict[str, Any]:
    """Return the run's config as it is in the file: an older version may have had other keys."""
    try:
        tree = read_yaml(run.config)
    except (UserError, OSError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _number(tree: Any, *keys: str) -> int | None:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if type(tree) is int and tree > 0 else None


def _state(run: RunDir, *, step: int, num_steps: int | None, seconds: float) -> tuple[str, Tone]:
    """Return what the run does, and its tone; `seconds` are usual between two lines of metrics."""
    locked = is_locked(run)
    # After its last step, a run that holds its lock still saves a checkpoint.
    if num_steps is not None and step >= num_steps and not locked:
        return "finished", "ok"
    quiet = age(run.metrics)
    late = quiet is not None and quiet > max(_PATIENCE_SECONDS, _PATIENCE_STEPS * seconds)
    if locked:
        if quiet is not None and late:
            return f"running, no step for {duration(quiet)}", "warn"
        return ("running" if step else "starting"), "ok"
    if (end := newest_log(run.jobs, "train")) and end.failed:
        return "ended with an error", "fail"
    if quiet is None or not step:
        return "no step yet", "warn"
    if not late:
        # Locks of other machines are not seen on every disk.
        return "running, or ended just now", ""
    return f"not running: last step {duration(quiet)} ago", "warn"


def is_locked(run: RunDir) -> bool:
    """Return True if a training holds the run's lock, as far as this machine can see it."""
    try:
        # Shared and for an instant: other watchers do the same, and a training that claims the
        # run meanwhile tries again.
        with (run.root / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a disk without locks
        return False
    return False


def _progress(
    step: int, num_steps: int | None, seconds: float, *, finished: bool
) -> Iterator[Fact]:
    if num_steps is None:
        yield Fact("step", f"{step:,} (config.yaml does not say of how many)")
        return
    yield Fact("step", f"{step:,} of {num_steps:,} ({step / num_steps:.0%})")
    if seconds and not finished:
        left = duration((num_steps - step) * seconds)
        yield Fact("time left", f"{left}, at {seconds:.3g} s a step (median of the last ones)")


def _pace(recent: Sequence[Line], batch: int | None) -> Iterator[Fact]:
    # Only lines with a time: tokens of others would count as if they had taken none.
    timed = [line for line in recent if numbers([line], "seconds") and line["seconds"] > 0]
    total = sum(numbers(timed, "seconds"))
    if not total:
        return
    tokens = sum(numbers(timed, "tokens")) / total
    examples = f", {batch * len(timed) / total:,.1f} examples/s" if batch else ""
    yield Fact("throughput", f"{tokens:,.0f} tokens/s{examples}")


# Names of numbers by key of metrics.jsonl, and their format; shown where the run logs them.
_SHOWN = {
    "mfu": ("MFU", "{:.1%}"),
    "lr": ("learning rate", "{:.3g}"),
    "grad_norm": ("gradient norm", "{:.4g}"),
    "temperature": ("temperature", "{:.4g}"),
    "chunks": ("chunks a rank", "{:,.0f}"),
    "documents": ("documents a step", "{:,.0f}"),
}


def _values(lines: Sequence[Line], recent: Sequence[Line]) -> Iterator[Fact]:
    for key, (name, form) in _SHOWN.items():
        if found := numbers(recent, key):
            yield Fact(name, form.format(found[-1]))
    if memory := numbers(lines, "peak_memory_gib"):
        yield Fact("memory", f"{max(memory):.2f} GiB at most, on rank 0")
    # Of a run that logs what was planned.
    for key in sorted(recent[-1] if recent else ()):
        name = key.removeprefix("predicted_")
        observed, predicted = numbers(recent, name), numbers(recent, key)
        if name != key and observed and predicted:
            value = f"{predicted[-1]:.4g} predicted, {median(observed):.4g} observed"
            yield Fact(name.replace("_", " "), value)


def _checkpoints(run: RunDir, step: int) -> Iterator[Fact]:
    try:
        name = run_folder.latest_name(run.checkpoints)
    except (UserError, OSError) as error:
        yield Fact("checkpoint", str(error), "fail")
        return
    names = run_folder.checkpoint_names(run.checkpoints)
    # Without it the next start is from step 0, whatever was saved.
    if name is None and names:
        yield Fact("checkpoint", f"{', '.join(names)}, but the file `latest` is missing", "fail")
        return
    if name is None:
        yield Fact("checkpoint", "none yet", "warn" if step else "")
        return
    saved = run_folder.checkpoint_step(name) or 0
    behind = step - saved
    when = age(run.checkpoints / name)
    if when is None:
        yield Fact("checkpoint", f"latest names {name}, which does not exist", "fail")
        return
    steps = several(abs(behind), "step")
    distance = f"{steps} behind" if behind >= 0 else f"{steps} ahead of metrics"
    yield Fact("checkpoint", f"{name}, {distance}, {duration(when)} old; {len(names)} kept")


def _warnings(run: RunDir, metrics: Metrics) -> Iterator[Fact]:
    if run.stop_request.exists():
        yield Fact("stop requested", "the run saves a checkpoint and stops", "warn")
    if skipped := len(numbers(metrics.lines, "skipped")):
        yield Fact("skipped steps", f"{skipped:,}, not finite", "warn")
    for dump in sorted(run.root.glob("non-finite-step-*-rank-*.json")):
        found = read_json_or_none(dump)
        what = found.get("what", "") if isinstance(found, dict) else ""
        yield Fact("not finite", f"{what} ({dump.name})", "fail")
    if metrics.num_replaced:
        value = f"{metrics.num_replaced:,} lines of steps that were logged again; the later count"
        yield Fact("repeated", value)
    if metrics.num_damaged:
        value = f"{metrics.num_damaged:,} lines of metrics.jsonl cannot be read"
        yield Fact("damaged", value, "warn")
    if (end := newest_log(run.jobs, "train")) and end.error:
        earlier = "" if end.failed else "before the present start: "
        yield Fact("last error", earlier + end.cited_error, "fail" if end.failed else "warn")


def _losses(run: RunDir, lines: Sequence[Line]) -> Grid:
    """Return the table of losses: a row per kind of batch, or one for all."""
    kinds: dict[str, list[Line]] = {}
    for line in lines:
        kinds.setdefault(str(line.get("kind", "")), []).append(line)
    described = read_json_or_none(run.kinds)
    rows = []
    for kind, own in sorted(kinds.items(), key=lambda item: -len(item[1])):
        losses = numbers(own, "loss")
        if not losses:
            continue
        right = numbers(own, "accuracy@1") or numbers(own, "accuracy")
        rows.append(
            (
                _name_of_kind(described, kind) or "all",
                f"{len(own):,}",
                f"{losses[0]:.4f}",
                f"{fmean(losses[-_RECENT:]):.4f}",
                f"{losses[-1]:.4f}",
                f"{fmean(right[-_RECENT:]):.3f}" if right else "",
            )
        )
    header = ("source", "steps", "first", f"mean of last {_RECENT}", "last", "accuracy")
    return Grid("loss", header, tuple(rows))


def _name_of_kind(described: Any, kind: str) -> str:
    """Return a kind of batch with its instruction, as far as kinds.json describes it."""
    entry = described.get(kind) if isinstance(described, dict) else None
    if not isinstance(entry, dict):
        return kind
    instructions = [text for text in entry.get("instructions") or [] if text]
    if len(instructions) > 1:
        return f"{kind}, {len(instructions)} instructions"
    return ": ".join([kind, *map(str, instructions)])


# Task, with @LENGTH -> (step, score).
Scores = dict[str, list[tuple[float, float]]]


def _scores(run: RunDir) -> Scores:
    """Return the scores of checkpoints made during training."""
    found: Scores = {}
    for path in sorted(RunDir(run.evaluations).results.glob("*/*/*/result.json")):
        name, task, length, _ = path.parts[-4:]
        step, result = run_folder.checkpoint_step(name), read_json_or_none(path)
        score = result.get("score") if isinstance(result, dict) else None
        if step is not None and isinstance(score, float):
            found.setdefault(f"{task}@{length}", []).append((step, score))
    return {task: sorted(points) for task, points in found.items()}


def _score_grid(scores: Scores) -> Grid:
    rows = tuple(
        (task, f"{len(points)}", f"{points[-1][0]:.0f}", f"{points[-1][1]:.4f}")
        for task, points in scores.items()
    )
    header = ("task", "scored checkpoints", "newest step", "its score")
    return Grid("scores during training", header, rows)


def _plots(lines: Sequence[Line], scores: Scores) -> Iterator[Plot]:
    for key, title in (
        ("tokens_per_second", "tokens per second"),
        ("grad_norm", "gradient norm"),
        ("peak_memory_gib", "peak memory in GiB"),
        ("mfu", "MFU"),
    ):
        points = [(float(line["step"]), y) for line in lines for y in numbers([line], key)]
        if points:
            yield Plot(title=title, x="step", y=title, lines={"": points})
    if scores:
        yield Plot(title="scores of checkpoints", x="step", y="score", lines=scores)
