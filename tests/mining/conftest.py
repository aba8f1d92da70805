"""A small dataset with planted duplicates, and a real export that searches it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mining_support import MakeConfig, World, make_rows, write_rows

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
