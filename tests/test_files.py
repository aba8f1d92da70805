"""Records on disk are read as they were written, and refused by name if changed since."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError, blame, explain_os_error
from pipeline.files import read_json, read_json_lines, read_record, write_sealed

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


def test_any_error_of_a_library_over_a_file_is_one_line_about_the_file() -> None:
    for error in (KeyError("x"), AttributeError("two\nlines"), RecursionError(), StopIteration()):
        with pytest.raises(UserError) as caught, blame("a.json: damaged", fix=FIX):
            raise error
        assert str(caught.value).startswith("a.json: damaged (")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="^own$"), blame("a.json: damaged"):
        raise UserError("own")
    with pytest.raises(KeyboardInterrupt), blame("a.json: damaged"):
        raise KeyboardInterrupt


def test_a_machine_without_memory_is_one_line_with_exit_1() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (MemoryError(), caught.value):
        explained = explain_os_error(error)
        assert explained is not None
        assert explained.exit_code == 1
        assert "memory" in str(explained)
