"""A teacher's stored vectors and an example's candidates, read back and damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.shards import Dataset, verify_dataset
from pipeline.data.vectors import write_teacher_vectors
from pipeline.errors import UserError
from tests.mined_data import BANDS, WIDTH, candidates_of, draw_vectors


@pytest.fixture
def copied(mined: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mined, tmp_path / "copied"))


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = left.astype(np.float64), right.astype(np.float64)
    return (left @ right.T) / np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1))


def test_stored_vectors_are_found_by_number_and_give_the_cosines_of_the_teacher(
    mined: Path, dataset: Dataset
) -> None:
    opened = Dataset.open(mined, verify=True)
    assert len(opened.manifest.example_shards) > 1
    rng = np.random.default_rng(5)
    queries = rng.integers(opened.num_examples, size=200)
    documents = rng.integers(len(opened.documents), size=300)
    query_BW, document_KW = opened.teacher_vectors(queries=queries, documents=documents)
    assert np.allclose(np.linalg.norm(query_BW, axis=1), 1, atol=1e-6)
    expected = cosines(
        draw_vectors(opened.num_examples, WIDTH, 1)[queries],
        draw_vectors(len(opened.documents), WIDTH, 0)[documents],
    )
    # Rounded to fp16: 11 bits.
    assert np.abs(query_BW @ document_KW.T - expected).max() < 2**-10


def test_candidates_are_columns_of_the_examples(mined: Path) -> None:
    opened = Dataset.open(mined)
    for example in (0, 7, opened.num_examples - 1):
        ids = np.array([example])
        row = {name: opened.examples.ragged(name, ids).values.tolist() for name in COLUMNS}
        expected = candidates_of(
            example,
            listed=[*row["positives"], *row["negatives"]],
            num_documents=len(opened.documents),
            count=10,
        )
        assert row["candidates"] == expected
        assert len(row["candidate_scores"]) == len(expected)
        assert set(row["candidate_bands"]) <= set(range(len(BANDS)))


COLUMNS = ("positives", "negatives", "candidates", "candidate_scores", "candidate_bands")


def test_a_dataset_without_mining_has_the_manifest_of_before(dataset: Dataset) -> None:
    tree = json.loads((dataset.folder / "manifest.json").read_text())
    assert "mining" not in tree
    assert "mining" not in json.loads(dataset.manifest.to_json())
    with pytest.raises(UserError, match="no teacher vectors"):
        dataset.teacher_vectors(queries=np.array([0]), documents=np.array([0]))


def test_verify_reads_the_vectors(copied: Path) -> None:
    assert "files of teacher vectors" in verify_dataset(copied)
    path = next((copied / "vectors").iterdir())
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=path.name):
        verify_dataset(copied)


def shape(path: Path) -> None:
    array = np.load(path)
    np.save(path, array.reshape(-1, WIDTH * 2))


def nan(path: Path) -> None:
    array = np.load(path)
    array[:] = np.nan
    np.save(path, array)


def longer(path: Path) -> None:
    np.save(path, np.load(path) * np.float16(2))


def no_array(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.parametrize("damage", [shape, nan, longer, no_array, Path.unlink])
def test_damaged_vectors_are_refused_by_name(damage: Callable[[Path], Any], copied: Path) -> None:
    path = copied / "vectors" / "documents-00000.npy"
    damage(path)
    with pytest.raises(UserError, match=path.name) as caught:
        Dataset.open(copied).teacher_vectors(queries=np.array([0]), documents=np.array([0]))
    assert "\n" not in str(caught.value)
    assert "mine the dataset again" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"width": 0}, "width 0"),
        ({"queries": []}, "queries in other files"),
        ({"norm": "raw"}, "norm"),
    ],
)
def test_vectors_that_do_not_belong_to_the_shards_are_refused(
    change: dict[str, Any], named: str, copied: Path
) -> None:
    tree = json.loads((copied / "manifest.json").read_text())
    tree.pop("sha256")
    tree["mining"]["teacher"] |= change
    (copied / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=named):
        Dataset.open(copied)


@pytest.mark.parametrize(
    ("value", "named"), [(np.nan, "NaN"), (np.inf, "NaN or infinity"), (0.0, "length 0")]
)
def test_a_vector_without_a_direction_is_not_written(
    value: float, named: str, tmp_path: Path
) -> None:
    blocks = [np.ones((3, 4), np.float32), np.ones((2, 4), np.float32)]
    blocks[1][1] = value
    with pytest.raises(UserError, match=f"row 4: .*{named}"):
        write_teacher_vectors(tmp_path, "queries-00000.npy", blocks, rows=5, width=4)
    assert not list(tmp_path.rglob("*.npy*"))


def test_vectors_of_another_width_are_not_written(tmp_path: Path) -> None:
    blocks = [np.ones((3, 4), np.float32), np.ones((2, 5), np.float32)]
    with pytest.raises(UserError, match=r"shape \(2, 5\)"):
        write_teacher_vectors(tmp_path, "queries-00000.npy", blocks, rows=5, width=4)
