from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ReasonAug.replicas import write_replicas
from ReasonAug.synthesis.run import Run, synthesize
from ReasonAug.templates import write_templates
from tests.reasonaug.language_server import serving
from tests.reasonaug.small_synthesis import config_of, records
from tests.support import share_folder

Rows = list[dict[str, Any]]


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def released() -> Path:
    """A folder with the released `generations.jsonl` and `definitions.jsonl`."""
    folder = os.environ.get("GENERATIONS")
    if not folder:
        pytest.skip("needs GENERATIONS=FOLDER with the released generations")
    return Path(folder)


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default data set."""

    def make(out: Path) -> None:
        write_templates(out, seed=0, problems_per_concept=64, max_tokens=1500)

    return share_folder(tmp_path_factory, "templates", make)


@pytest.fixture(scope="session")
def hub(generated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:

    def make(out: Path) -> None:
        write_replicas(generated, out, seed=0, max_tokens=1024)

    return share_folder(tmp_path_factory, "replicas", make)


@pytest.fixture(scope="session")
def rows_of(generated: Path) -> Callable[[str], Rows]:
    """Rows of a generated file, by its name without suffix."""
    cache: dict[str, Rows] = {}

    def rows(name: str) -> Rows:
        if name not in cache:
            cache[name] = read(generated / f"{name}.jsonl")
        return cache[name]

    return rows


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report on the data takes as long as everything else; it has its own tests."""
    monkeypatch.setattr(Run, "_require_quality", lambda run, rows: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run against a server that behaves well."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    with serving() as (url, server):
        synthesize(config_of(folder, url))
        # Nothing was asked twice.
        assert set(server.answered.values()) == {1}
        assert server.answered.total() == len(records(folder))
    return folder
