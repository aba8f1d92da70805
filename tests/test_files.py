"""Records, arrays and batches are read as written, and refused by name if changed since."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import UserError
from pipeline.files import (
    batch_writer,
    load_arrays,
    map_vectors,
    read_batch,
    read_json,
    read_json_lines,
    read_record,
    save_arrays,
    save_vectors,
    write_sealed,
)

FIX = "write it again"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A record with one value of each kind."""

    name: str
    step: int
    share: float
    parts: tuple[int, ...]


WHOLE = {"name": "é😀", "step": 3, "share": 0.1, "parts": [1, 2]}


def test_a_sealed_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_sealed(tmp_path / "entry.json", WHOLE)
    entry = read_record(tmp_path / "entry.json", Entry, fix=FIX)
    assert entry == Entry(name="é😀", step=3, share=0.1, parts=(1, 2))


def test_a_record_from_before_there_were_seals_is_read(tmp_path: Path) -> None:
    (tmp_path / "entry.json").write_text(json.dumps(WHOLE))
    assert read_record(tmp_path / "entry.json", Entry, fix=FIX).step == 3


def test_every_changed_character_of_a_sealed_record_is_found(tmp_path: Path) -> None:
    path = tmp_path / "entry.json"
    write_sealed(path, WHOLE)
    text = path.read_text()
    for place, character in enumerate(text):
        if character.isspace():
            continue
        path.write_text(text[:place] + ("7" if character != "7" else "8") + text[place + 1 :])
        try:
            entry = read_record(path, Entry, fix=FIX)
        except UserError as error:
            assert "entry.json" in str(error)
            assert "fix: " in str(error)
        else:  # the name of the seal itself: the record is then as one without a seal
            assert entry == Entry(name="é😀", step=3, share=0.1, parts=(1, 2))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("step", "3"), ("step", True), ("step", 3.5), ("step", None), ("name", 3)),
        *(("share", "0.1"), ("parts", 1), ("parts", [None]), ("parts", {"0": 1})),
    ],
)
def test_a_value_of_another_type_is_named_by_file_and_key(
    key: str, value: Any, tmp_path: Path
) -> None:
    (tmp_path / "entry.json").write_text(json.dumps({**WHOLE, key: value}))
    with pytest.raises(UserError, match=rf"entry\.json: damaged \({key}.*fix: {FIX}"):
        read_record(tmp_path / "entry.json", Entry, fix=FIX)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged"),
        (b"{", "damaged"),
        (b'{"a": 1, "a": 2}', "key 'a' twice"),
        (b"\xff{}", "not UTF-8"),
        (b"[" * 100_000, "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_a_file_that_is_no_json_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_json(tmp_path / "a.json", fix=FIX)
    assert "a.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lines_are_read_without_the_half_one_of_a_killed_writer(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Line:
        step: int

    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 0, "loss": 1.5, "note": "a\\u2028b"}\n{"step": 1}\n{"ste')
    lines = [tree for _, tree in read_json_lines(path, Line, fix=FIX)]
    assert lines == [{"step": 0, "loss": 1.5, "note": "a\u2028b"}, {"step": 1}]
    path.write_text('{"step": 0}\n{"step": "1"}\n')
    with pytest.raises(UserError, match=r"lines\.jsonl:2: damaged \(step"):
        read_json_lines(path, Line, fix=FIX)


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
