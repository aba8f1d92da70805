"""A real sentence encoder, replicas of the benchmarks, and a config over both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import benchmark_replicas as replicas
import pytest
from evaluation_support import TASKS, BagOfLetters, MiniLM, wrap

from pipeline.config import EvaluateConfig, EvaluatedModel
from pipeline.evaluation.models import EvaluatedEncoder
from pipeline.evaluation.tasks import Element
from pipeline.model.export_folder import export_fingerprint


@pytest.fixture(autouse=True)
def own_data_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted data sets of this test alone.

    `datasets` knows a local folder by its name only: a cache of the user's home would answer for a
    replica with one that an earlier test, or an earlier version of it, has written.
    """
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="session")
def minilm() -> MiniLM:
    return MiniLM()


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replicas.write_all(tmp_path_factory.mktemp("snapshots"))


@pytest.fixture
def config(tmp_path: Path, snapshots: Path) -> EvaluateConfig:
    for name in ("weak", "strong"):
        export = tmp_path / name
        export.mkdir()
        (export / "model.safetensors").write_text(name)
    return EvaluateConfig(
        output_dir=tmp_path / "out",
        models=tuple(
            EvaluatedModel(name=name, path=tmp_path / name) for name in ("weak", "strong")
        ),
        tasks=TASKS,
        snapshots=snapshots,
        max_length=64,
    )


@pytest.fixture
def load(minilm: MiniLM) -> Callable[[EvaluateConfig, Element], EvaluatedEncoder]:
    def load(config: EvaluateConfig, element: Element) -> EvaluatedEncoder:
        encoder = minilm if element.model.name == "strong" else BagOfLetters()
        return wrap(encoder, element.model.name, export_fingerprint(element.model.path))

    return load


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few texts, so that a tiny corpus has many."""
    monkeypatch.setattr("pipeline.evaluation.embedding_plan._MIN_BLOCK_COST", 200.0)


@pytest.fixture
def strong(config: EvaluateConfig) -> EvaluateConfig:
    """One model on one task of each kind: candidates, all documents, excluded documents."""
    return dataclasses.replace(
        config,
        models=config.models[1:],
        tasks=(TASKS[0], "BrightBiologyLongRetrieval", "BrightAopsRetrieval"),
    )


@pytest.fixture
def one(config: EvaluateConfig) -> EvaluateConfig:
    return dataclasses.replace(config, models=config.models[:1], tasks=("BrightAopsRetrieval",))
