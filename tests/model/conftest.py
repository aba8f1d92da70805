"""Small models of several families, with weights large enough that attention matters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.model.export_check import OutsideProcess
from tests.tiny_models import tiny_starter

CORPUS = [
    "The gradient of a global mean loss does not depend on how rows are dealt to ranks.",
    "Sort the list, then walk it once: for each value, look up its complement.",
    "A body in uniform circular motion accelerates towards the centre, a = v**2 / r.",
    "Naïve café, 3.14159, x_1 = -b ± sqrt(b**2 - 4ac), don't",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain-text corpus."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(CORPUS * 5))
    return path


@pytest.fixture(scope="session")
def starter(corpus: Path) -> Path:
    """A tiny Dream-layout model folder."""
    return tiny_starter(corpus.parent / "starter", corpus, vocab_size=400)


@pytest.fixture(scope="session")
def outside() -> Iterator[OutsideProcess]:
    """A process without this package, for all tests: its imports are slow."""
    with OutsideProcess() as process:
        yield process
