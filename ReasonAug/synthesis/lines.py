"""Read and write the JSON lines of stages without holding them in memory."""

from __future__ import annotations

import array
import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any


def iterate(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, one at a time."""
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


def alive(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the items of a stage that go further."""
    return (item for item in iterate(path) if item["dropped"] is None)


def encode(item: dict[str, Any]) -> bytes:
    """Return an object as one line."""
    return (json.dumps(item, ensure_ascii=False) + "\n").encode()


class Lines:
    """The objects of a file by number; only their places are in memory."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._starts = array.array("Q", [0])
        with path.open("rb") as file:
            for line in file:
                self._starts.append(self._starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def raw(self, number: int) -> bytes:
        """Return a line as it is in the file."""
        start, end = self._starts[number], self._starts[number + 1]
        return os.pread(self._descriptor, end - start, start)

    def __getitem__(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.raw(number))
        return found

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def write_shuffled(path: Path, rows: Iterable[dict[str, Any]], *, seed: str, scratch: Path) -> int:
    """Write rows in an order drawn by the seed, through a file in the order they come.

    Args:
        path: receives the rows.
        rows: in any order.
        seed: of the order.
        scratch: a file for the rows in the order they come, removed at the end.

    Returns:
        Number of rows.
    """
    try:
        with scratch.open("wb") as file:
            for row in rows:
                file.write(encode(row))
        lines = Lines(scratch)
        with contextlib.closing(lines):
            order = array.array("Q", range(len(lines)))
            Random(seed).shuffle(order)
            with path.open("wb") as file:
                for number in order:
                    file.write(lines.raw(number))
    finally:
        scratch.unlink(missing_ok=True)
    return len(order)
