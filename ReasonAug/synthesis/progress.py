"""Show how far a stage is: items, share kept, requests a second, cost and time left."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 30.0  # between two lines where there is no terminal


class StageProgress:
    """Counts of one stage, shown as a bar on a terminal, as lines elsewhere.

    Args:
        stage: its name.
        total: items that will enter it.
        sent: returns the requests answered so far.
        spent: returns the cost so far, in words.
    """

    def __init__(
        self, stage: str, total: int, *, sent: Callable[[], int], spent: Callable[[], str]
    ) -> None:
        self._stage, self._total, self._sent, self._spent = stage, total, sent, spent
        self._began, self._shown = time.monotonic(), time.monotonic()
        self._sent_before = sent()
        self.done = self.kept = 0
        self.dropped: Counter[str] = Counter()
        self._bar: Progress | None = None

    def advance(self, dropped: str | None) -> None:
        """Count one finished item: kept, or the reason why it was dropped."""
        self.done += 1
        self.kept += dropped is None
        if dropped is not None:
            self.dropped[dropped] += 1
        now = time.monotonic()
        if now - self._shown < (0.2 if self._bar else _LINE_SECONDS):
            return
        self._shown = now
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.done, note=self.note())
        else:
            left = (now - self._began) / self.done * (self._total - self.done)
            print(
                f"{self._stage}: {self.done:,} of {self._total:,}, {self.note()}, "
                f"{left / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )

    def note(self) -> str:
        """Return share kept, rate and cost in words."""
        seconds = max(time.monotonic() - self._began, 1e-3)
        sent = self._sent() - self._sent_before
        kept = f"{self.kept / self.done:.0%} kept" if self.done else "none yet"
        return ", ".join([kept, f"{sent / seconds:.1f} requests/s", *filter(None, [self._spent()])])

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar inside this block, and one line at its end."""
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                TextColumn(self._stage),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=console, transient=True) as self._bar:
                self._bar.add_task(self._stage, total=self._total, note="")
                yield
        else:
            yield
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        dropped = f" ({reasons})" if reasons else ""
        print(f"{self._stage}: {self.kept:,} of {self.done:,} items{dropped}, {self.note()}")
