"""The search returns the documents of a plain float64 search, whatever its tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.exact_search import Corpus, VectorFile, top_of_row
from pipeline.files import save_vectors


def store(folder: Path, vectors: NDArray[np.float16], rows: int) -> list[VectorFile]:
    """The vectors in files of some rows each."""
    files = []
    for start in range(0, len(vectors), rows):
        part = vectors[start : start + rows]
        path = folder / f"{rows}-{start:06d}.npy"
        save_vectors(path, part)
        files.append(VectorFile(path=path, start=start, rows=len(part)))
    return files


def unit(count: int, width: int, seed: int) -> NDArray[np.float16]:
    vectors = np.random.default_rng(seed).standard_normal((count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def brute(
    queries: NDArray[np.float16], documents: NDArray[np.float16], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All pairs in float64, ties by number: one plain sum for each pair."""
    scores = np.stack(
        [(documents.astype(np.float64) * q).sum(axis=1) for q in queries.astype(np.float64)]
    )
    order = np.array([np.lexsort((np.arange(len(row)), -row))[:k] for row in scores])
    return order, np.take_along_axis(scores, order, axis=1)


@pytest.mark.parametrize("rows", [3000, 700, 64])
@pytest.mark.parametrize("tile", [8192, 256, 33])
def test_any_files_and_tiles_give_the_bits_of_all_pairs_in_float64(
    tmp_path: Path, rows: int, tile: int
) -> None:
    documents, queries = unit(3000, 48, 0), unit(37, 48, 1)
    expected = brute(queries, documents, 100)

    found = Corpus(store(tmp_path, documents, rows), tile=tile).search(queries, 100)

    assert np.array_equal(found.documents, expected[0])
    assert found.scores.tobytes() == expected[1].tobytes()


def test_queries_of_one_block_and_of_many_give_the_same_bits(tmp_path: Path) -> None:
    documents, queries = unit(2000, 32, 0), unit(41, 32, 1)
    corpus = Corpus(store(tmp_path, documents, 500))
    whole = corpus.search(queries, 50)
    parts = [corpus.search(queries[start : start + 7], 50) for start in range(0, 41, 7)]

    assert np.concatenate([part.scores for part in parts]).tobytes() == whole.scores.tobytes()
    assert np.array_equal(np.concatenate([part.documents for part in parts]), whole.documents)


@pytest.mark.parametrize("copies", [20, 400, 1500])
def test_equal_documents_are_taken_in_the_order_of_their_numbers(
    tmp_path: Path, copies: int
) -> None:
    """Also where more are equal than float32 finds in addition: 32, then 1,024."""
    documents, queries = unit(2000, 16, 0), unit(3, 16, 1)
    best = brute(queries, documents, 1)[0][0, 0]
    places = np.random.default_rng(2).permutation(2000)[:copies]
    documents[places] = documents[best]
    expected = brute(queries, documents, 10)

    found = Corpus(store(tmp_path, documents, 300), tile=128).search(queries, 10)

    assert np.array_equal(found.documents, expected[0])
    assert np.array_equal(found.scores, expected[1])


def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    documents, queries = unit(1500, 64, 0), unit(20, 64, 1)
    corpus, before = Corpus(store(tmp_path, documents, 1000)), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(corpus.search(queries, 30))
    finally:
        torch.set_num_threads(before)

    assert found[0].scores.tobytes() == found[1].scores.tobytes()
    assert np.array_equal(found[0].documents, found[1].documents)


def test_fewer_documents_than_asked_for_are_all_returned(tmp_path: Path) -> None:
    documents, queries = unit(7, 8, 0), unit(2, 8, 1)
    found = Corpus(store(tmp_path, documents, 3)).search(queries, 100)

    assert sorted(found.documents[0].tolist()) == list(range(7))


def test_listed_pairs_get_the_scores_of_the_search(tmp_path: Path) -> None:
    documents, queries = unit(500, 24, 0), unit(9, 24, 1)
    corpus = Corpus(store(tmp_path, documents, 128))
    found = corpus.search(queries, 20)
    listed = found.documents.copy()
    listed[2, 5:] = -1

    scores = corpus.score(queries, listed)

    assert np.array_equal(scores[listed >= 0], found.scores[listed >= 0])
    assert np.isnan(scores[listed < 0]).all()


def test_vectors_of_two_widths_in_one_store_are_refused(tmp_path: Path) -> None:
    one, other = unit(10, 8, 0), unit(10, 12, 1)
    save_vectors(tmp_path / "a.npy", one)
    save_vectors(tmp_path / "b.npy", other)
    files = [
        VectorFile(path=tmp_path / f"{n}.npy", start=10 * k, rows=10) for k, n in enumerate("ab")
    ]

    with pytest.raises(UserError, match=r"b\.npy: vectors of width 12, the others have 8"):
        Corpus(files).search(one, 3)


def test_a_changed_byte_of_a_vector_is_refused(tmp_path: Path) -> None:
    files = store(tmp_path, unit(50, 8, 0), 50)
    content = bytearray(files[0].path.read_bytes())
    content[300] ^= 1
    files[0].path.write_bytes(content)

    with pytest.raises(UserError, match="its content does not match its hash"):
        Corpus(files).search(unit(1, 8, 1), 3)


def test_top_of_row_takes_positive_scores_and_the_first_of_equal_ones() -> None:
    scores = np.array([0.0, 2.0, 1.0, 2.0, 1.0, 1.0, -1.0])

    assert top_of_row(scores, 3).tolist() == [1, 3, 2]
    assert top_of_row(scores, 10).tolist() == [1, 3, 2, 4, 5]
