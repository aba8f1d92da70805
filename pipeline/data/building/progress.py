"""Lines about a build on the terminal or in a job's log: rows done, their rate, and the end."""

from __future__ import annotations

import collections
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.manifest import REPORT_NAME, Manifest

_SECONDS_BETWEEN_LINES = 10.0
# What each step counts, and how many of it the summary of a finished task holds.
_COUNTED: dict[str, tuple[str, Callable[[Any], int]]] = {
    "lookup": ("documents", lambda done: done["documents"]),
    "collect": ("rows", lambda done: done["read"]),
    "dedup": ("texts", lambda done: done["found"]),
    "sign": ("documents", lambda done: done["documents"]),
    "pair": ("pairs", lambda done: done["pairs"]),
    "tokenise": ("documents", lambda done: done["kept"]),
    "relate": ("examples", lambda done: sum(done["groups"].values())),
    "pack": ("rows", lambda done: done["shard"]["rows"]),
}


def say(text: str) -> None:
    """Print one line about the work."""
    print(f"prepare: {text}", file=sys.stderr, flush=True)


class Progress:
    """Counts what the tasks of one step have done, from their outputs."""

    def __init__(self, step: str, outputs: Sequence[Path]) -> None:
        self._step, self._outputs = step, outputs
        self._left = set(range(len(outputs)))
        self._done = 0
        self._count()
        self._was_done, self._had_work = self._done, bool(self._left)
        self._began = self._last = time.monotonic()

    def _count(self) -> None:
        for task in [task for task in self._left if self._outputs[task].exists()]:
            if self._step in _COUNTED:
                summary = json.loads(self._outputs[task].read_text())
                self._done += _COUNTED[self._step][1](summary)
            self._left.remove(task)

    def update(self) -> None:
        """Print a line if the last one is old enough."""
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        self._count()
        if self._left:
            total = len(self._outputs)
            self._say(f", part {total - len(self._left)} of {total}")

    def finish(self) -> None:
        """Print what the step did, if it had anything to do."""
        self._count()
        if self._had_work and self._done:
            self._say("")

    def _say(self, part: str) -> None:
        if self._step not in _COUNTED:
            return
        seconds = time.monotonic() - self._began
        rate = (self._done - self._was_done) / max(seconds, 1e-3)
        unit = _COUNTED[self._step][0]
        say(f"{self._step}: {self._done:,} {unit}{part}, {seconds:.1f} s, {rate:,.0f}/s")


def describe(manifest: Manifest, folder: Path) -> str:
    """One line: what is kept, how many texts were dropped and why, and where to read more."""
    reasons: collections.Counter[str] = collections.Counter()
    for source in manifest.sources:
        for name, count in source.dropped.items():
            reasons[name.rpartition(": ")[2]] += count
    dropped = f"{reasons.total():,} dropped"
    if reasons:
        dropped += f" ({', '.join(f'{count:,} {name}' for name, count in reasons.most_common())})"
    if manifest.num_near_duplicates:
        dropped += f", {manifest.num_near_duplicates:,} near-duplicate documents merged"
    return (
        f"{manifest.num_examples:,} examples, {manifest.num_documents:,} documents, {dropped} "
        f"-> {folder / REPORT_NAME}"
    )
