"""A stretch of a file, a raw record of it with its place, and the error that a bad record is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from pipeline.data.sources.files import open_bytes
from pipeline.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A stretch of one file that one task reads.

    start and stop count bytes of line files and tables of text, and rows of Parquet files, Arrow
    files and hub datasets; stop is -1 for a compressed file, which is always read whole. At most
    max_rows records are taken.
    """

    file: str
    start: int
    stop: int
    max_rows: int | None = None


class BadRowError(UserError):
    """A record that cannot be used; the file as a whole can still be read.

    Attributes:
        where: `file:line` of the record.
        reason: what is wrong with it, without the place.
    """

    def __init__(self, where: str, found: str, *, allowed: str = "", fix: str = "") -> None:
        super().__init__(f"{where}: {found}", allowed=allowed, fix=fix)
        self.where = where
        self.reason = found + (f" | allowed: {allowed}" if allowed else "")


OnBadRow = Callable[[BadRowError], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One raw record and its place: number `number` (from 1) after byte `base` of the file."""

    value: Any
    file: str
    number: int
    base: int = 0

    @property
    def where(self) -> str:
        """`file:line`, worked out only when a message needs it."""
        return f"{self.file}:{_lines_above(self.file, self.base) + self.number}"

    def fail(self, found: str, allowed: str = "", fix: str = "") -> BadRowError:
        """Return an error that names this record's file and line."""
        return BadRowError(self.where, found, allowed=allowed, fix=fix)


def give_up(bad: BadRowError, on_bad: OnBadRow | None) -> None:
    """Hand a bad record to the one who counts them; raise it where nobody does."""
    if on_bad is None:
        raise bad
    on_bad(bad)


@functools.lru_cache(maxsize=16)
def _lines_above(file: str, base: int) -> int:
    if not base:
        return 0
    lines = 0
    with open_bytes(file) as handle:
        while base > 0 and (piece := handle.read(min(base, 2**20))):
            lines += piece.count(b"\n")
            base -= len(piece)
    return lines
