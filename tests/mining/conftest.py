"""A small dataset with planted duplicates, and a real export that searches it."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import (
    MineConfig,
    ModelConfig,
    PrepareConfig,
    RetrieverConfig,
    SourceConfig,
    WindowConfig,
)
from pipeline.data.prepare import prepare
from tests.support import share_folder
from tests.tiny_models import export_tiny, tiny_starter

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


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    rows = make_rows(120)

    def make(folder: Path) -> None:
        path = write_rows(folder / "rows.jsonl", rows)
        model = tiny_starter(folder / "model", path, num_layers=1)
        prepare(
            PrepareConfig(
                output_dir=folder / "shards",
                tokenizer=str(model),
                sources=(
                    SourceConfig(
                        name="rows",
                        format="columns",
                        path=str(path),
                        columns={"concept": "concept"},
                        instruction="Find the thing",
                    ),
                ),
                max_query_length=96,
                max_document_length=256,
                shard_bytes=40_000,
            ),
            num_workers=1,
        )
        export_tiny(ModelConfig(path=str(model)), folder / "export", max_length=256)

    return World(share_folder(tmp_path_factory, "mining", make), rows)


MakeConfig = Callable[..., MineConfig]


@pytest.fixture
def make_config(world: World, tmp_path: Path) -> MakeConfig:
    def make(name: str = "mined", **changes: Any) -> MineConfig:
        return MineConfig(
            **{
                "data": world.shards,
                "output": tmp_path / name,
                "store": tmp_path / "store",
                "retrievers": (RetrieverConfig(name="model", path=str(world.export)),),
                "window": WindowConfig(last=30),
                "negatives": 5,
                **changes,
            }
        )

    return make
