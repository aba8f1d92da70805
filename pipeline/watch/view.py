"""Hold the numbers that `watch` shows, in the form that the terminal and the page share."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Literal

_NUMBER = re.compile(r"[,.-]*\d[\d,.-]*")
# Decides the colour: good, worth a look, failed.
Tone = Literal["", "ok", "warn", "fail"]


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """One line: a name and its value."""

    name: str
    value: str
    tone: Tone = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """One table, not shown without rows; `tones` has the tone of each row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    tones: tuple[Tone, ...] = ()

    def tone_of(self, row: int) -> Tone:
        """Return the tone of a row."""
        return self.tones[row] if row < len(self.tones) else ""

    def is_numeric(self, column: int) -> bool:
        """Return True if a column holds numbers; the first one names its row."""
        cells = [row[column] for row in self.rows]
        return column > 0 and all(not cell or _NUMBER.fullmatch(cell) for cell in cells)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One plot of the page: points (x, y) by the name of their line."""

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Everything about one folder at one moment.

    Attributes:
        title: kind and path.
        state: in a few words: running, finished, ...
        done: the share of the work that is done, if it is known.
        curve: lines of metrics with a loss, for the page's plot of it.
    """

    title: str
    state: str
    tone: Tone = ""
    done: float | None = None
    facts: tuple[Fact, ...] = ()
    grids: tuple[Grid, ...] = ()
    plots: tuple[Plot, ...] = ()
    curve: tuple[dict[str, float], ...] = ()

    def fact(self, name: str) -> str:
        """Return the value of the fact with a name; empty without one."""
        return next((fact.value for fact in self.facts if fact.name == name), "")


def duration(seconds: float) -> str:
    """Return a duration as people say it: `45 s`, `12 min`, `3:05 h`, `2 days 4 h`."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60}:{minutes % 60:02} h"
    return f"{minutes // 1440} days {minutes % 1440 // 60} h"


def age(path: Path) -> float | None:
    """Return the seconds since a file was last changed; None without the file."""
    try:
        # A file server's clock may be ahead of this one.
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None
