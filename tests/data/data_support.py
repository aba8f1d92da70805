"""Rows in published layouts for the tests of pipeline.data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import PrepareConfig

ConfigMaker = Callable[..., PrepareConfig]


WORDS = [
    "".join(random.Random(number).choices("abcdefghijklmnopqrstuvwxyz", k=2 + number % 7))
    for number in range(800)
]


def words(rng: random.Random, count: int) -> str:
    """A text of `count` words."""
    return " ".join(rng.choices(WORDS, k=count))


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def reasonaug_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in the published layout: 3 instructions, 7 concepts, shared and null documents."""
    rng = random.Random(seed)
    return [
        {
            "id": number,
            "domain": "algorithm",
            "instance": f"concept {number % 7}",
            "task_type": "p2ps",
            "task": f"Find a solution of kind {number % 3}",
            "user_query": words(rng, rng.randint(3, 30)),
            "positive_document": (
                f"definition of concept {number % 7}" if number % 5 == 0 else words(rng, 40)
            ),
            "hard_negative_document": words(rng, 20) if number % 4 else None,
            "negative_instance": "",
        }
        for number in range(count)
    ]
