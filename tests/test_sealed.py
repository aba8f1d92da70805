"""Arrays and texts of an evaluation: a changed byte never becomes another score."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import UserError
from pipeline.files import (
    batch_writer,
    load_arrays,
    map_vectors,
    read_batch,
    save_arrays,
    save_vectors,
)

FIX = "embed again"


def flipped(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def test_vectors_are_read_as_written_or_refused(tmp_path: Path) -> None:
    path, rng = tmp_path / "block.npy", random.Random(0)
    vectors = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float16)
    save_vectors(path, vectors)
    np.testing.assert_array_equal(map_vectors(path, fix=FIX), vectors)
    np.testing.assert_array_equal(np.load(path), vectors)  # for other readers, a plain npy
    whole = path.read_bytes()
    refused = 0
    for trial in range(200):
        cut = trial % 4 == 0
        path.write_bytes(whole[: rng.randrange(len(whole))] if cut else flipped(whole, rng))
        try:
            np.testing.assert_array_equal(map_vectors(path, fix=FIX), vectors)
        except UserError as error:
            refused += 1
            assert "block.npy" in str(error)
            assert FIX in str(error)
    assert refused > 150
    np.save(path, vectors)
    with pytest.raises(UserError, match=r"block\.npy: damaged"):
        map_vectors(path, fix=FIX)


def test_an_index_of_another_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.npz"
    digests = np.asfortranarray(np.arange(6, dtype=np.uint64).reshape(3, 2))
    save_arrays(path, digests=digests, costs=np.ones(3))
    found = load_arrays(path, "digests", "costs", fix=FIX)
    np.testing.assert_array_equal(found["digests"], digests)
    with np.load(path) as file:
        arrays = dict(file)
    for changed in ({"costs": np.ones(2)}, {"costs": np.zeros(3)}, {"digests": digests[::-1]}):
        np.savez(path, **{**arrays, **changed})
        with pytest.raises(UserError, match=r"index\.npz: damaged"):
            load_arrays(path, "digests", "costs", fix=FIX)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"index\.npz: damaged"):
        load_arrays(path, "digests", fix=FIX)


def test_a_batch_of_texts_is_read_as_written_or_refused(tmp_path: Path) -> None:
    path, rng = tmp_path / "texts.arrow", random.Random(1)
    schema = pa.schema([("text", pa.large_string()), ("length", pa.int32())])
    rows = [[{"text": f"text {i} of {b}", "length": i} for i in range(4)] for b in range(2)]
    with batch_writer(path, schema) as write:
        for batch in rows:
            write(pa.RecordBatch.from_pylist(batch, schema=schema))
    assert [read_batch(path, number, fix=FIX).to_pylist() for number in range(2)] == rows
    whole = path.read_bytes()
    for _ in range(200):
        path.write_bytes(flipped(whole, rng))
        try:
            assert read_batch(path, 1, fix=FIX).to_pylist() == rows[1]
        except UserError as error:
            assert "texts.arrow" in str(error)
