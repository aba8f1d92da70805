"""Rows in published layouts for the tests of pipeline.data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import DataConfig, PrepareConfig, SourceConfig
from pipeline.data.batch import GlobalBatch
from pipeline.data.loader import Loader
from pipeline.data.shards import Dataset
from pipeline.data.sources import expand_sources, plan_source, read_rows
from pipeline.data.sources.corpus import References
from pipeline.data.sources.records import Row

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


def make_source(path: Path | str, format: str = "columns", **options: Any) -> SourceConfig:
    """A source called `set`."""
    return SourceConfig(name="set", format=format, path=str(path), **options)


def rows_of(
    source: SourceConfig, *, block_bytes: int = 10**9, references: References | None = None
) -> list[Row]:
    """All rows of a source, block by block."""
    return [
        row
        for expanded in expand_sources([source])
        for block in plan_source(expanded, block_bytes=block_bytes)
        for _, row in read_rows(expanded, block, references)
    ]


def make_loader(dataset: Dataset, *, batch: int = 32, **changes: object) -> Loader:
    """A loader of small batches and chunks; changes are keys of the data config, or arguments."""
    data = {key: changes.pop(key) for key in list(changes) if hasattr(DataConfig, key)}
    config = DataConfig(path=dataset.folder, global_batch_size=batch, **data)  # type: ignore[arg-type]
    settings = {"max_chunk_tokens": 400, "seed": 3, **changes}
    return Loader(dataset, config, **settings)  # type: ignore[arg-type]


def texts_of(batches: list[GlobalBatch]) -> dict[int, tuple[int, ...]]:
    """Tokens of every text of the batch, by global text index."""
    found: dict[int, tuple[int, ...]] = {}
    for chunk in (chunk for batch in batches for chunk in batch.chunks):
        if not chunk.is_dummy:
            pieces = np.split(chunk.input_ids, np.cumsum(chunk.lengths)[:-1])
            for text, piece in zip(chunk.texts.tolist(), pieces, strict=True):
                assert text not in found
                found[text] = tuple(piece.tolist())
    return found
