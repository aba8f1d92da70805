"""What a resumed run may change, and what would make it another run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import TrainConfig, load_config
from pipeline.training.run_identity import run_identity


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(
        "{output_dir: run, num_steps: 6, model: {path: model}, data: {path: shards},"
        " optimizer: {warmup_steps: 2}}"
    )
    return path


def identity(recipe: Path, *changes: str, shards: str = "these") -> dict[str, Any]:
    dataset: Any = SimpleNamespace(fingerprint=shards)  # all that is asked of it
    return run_identity(load_config(TrainConfig, recipe, changes), dataset)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("seed=7", "seed"),
        ("data.global_batch_size=4", "data.global_batch_size"),
        ("data.num_hard_negatives=3", "data.num_hard_negatives"),
        ("model.pooling=last_token", "model.pooling"),
        ("model.attention_dropout=0.2", "model.attention_dropout"),
        ("loss.temperature=0.2", "loss.temperature"),
        ("loss.symmetric=true", "loss.symmetric"),
        ("optimizer.weight_decay=0.2", "optimizer.weight_decay"),
        ("optimizer.warmup_steps=1", "optimizer.warmup_steps"),
    ],
)
def test_what_decides_the_curve_is_named_where_it_differs(
    recipe: Path, change: str, key: str
) -> None:
    before, after = identity(recipe), identity(recipe, change)
    assert [name for name in before if after[name] != before[name]] == [key]


def test_the_same_config_on_other_shards_is_another_run(recipe: Path) -> None:
    before, after = identity(recipe), identity(recipe, shards="others")
    assert [name for name in before if after[name] != before[name]] == ["data.fingerprint"]


@pytest.mark.parametrize(
    "change",
    [
        *("num_steps=9", "schedule=sweep", "chunks.max_tokens=50", "checkpoint.every=3"),
        *("log_every=5", "trackers=[wandb]", "non_finite=skip", "data.prefetch=false"),
        *("output_dir=elsewhere", "data.path=moved"),
    ],
)
def test_what_only_decides_how_fast_and_how_told_may_change(recipe: Path, change: str) -> None:
    assert identity(recipe, change) == identity(recipe)
