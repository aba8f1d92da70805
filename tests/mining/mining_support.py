"""Rows with planted duplicates, and a prepared dataset of them with an export that reads it."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import MineConfig

TOPICS = ("river", "planet", "cheese", "engine", "violin")
WORDS = (
    *("big", "small", "red", "fast", "old", "new", "cold", "warm", "near", "far", "deep"),
    *("high", "loud", "calm", "bright", "odd", "thin"),
)


def make_rows(count: int) -> list[dict[str, Any]]:
    """Rows of a few topics; every tenth positive has a near duplicate among the documents."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        topic = TOPICS[number % len(TOPICS)]
        about = rng.sample(WORDS, 8)
        text = f"The {topic} number {number} is {' '.join(about)}, " + " ".join(
            rng.choices(WORDS, k=30)
        )
        row = {
            "query": f"Which {topic} is {about[0]} and {about[1]}?",
            "positives": [text],
            "concept": f"{topic} {number % 3}" if number % 4 == 0 else None,
            "negatives": [],
        }
        if number % 10 == 0:
            row["negatives"] = [f"{text} indeed"]
        rows.append(row)
    # One query with two positives in two rows.
    rows[1]["query"] = rows[6]["query"]
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclasses.dataclass(frozen=True)
class World:
    """A prepared dataset, its rows, and an export that reads it."""

    folder: Path
    rows: list[dict[str, Any]]

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def export(self) -> Path:
        return self.folder / "export"


MakeConfig = Callable[..., MineConfig]
