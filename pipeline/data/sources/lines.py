"""Files of lines: JSON objects or plain text, cut into blocks at any byte."""

from __future__ import annotations

import dataclasses
import json
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa

from pipeline.data.sources.blocks import BadRowError, Block, OnBadRow, Record, give_up
from pipeline.data.sources.files import FETCH_AGAIN, file_size, kind_of, open_bytes
from pipeline.errors import UserError


def next_line(handle: IO[bytes], file: str) -> bytes:
    """Return the next line with its end, or nothing at the end of the file.

    Raises:
        UserError: the file is compressed and damaged.
    """
    try:
        return handle.readline()
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise UserError(f"{file}: damaged compressed file ({error})", fix=FETCH_AGAIN) from error


def plan_lines(file: str, *, block_bytes: int, max_rows: int | None) -> Iterator[Block]:
    """Cut a file that is not compressed into blocks of bytes, up to `max_rows` lines."""
    stop = file_size(file) if max_rows is None else _end_of_rows(file, max_rows)
    for start in range(0, stop, block_bytes):
        yield Block(file=file, start=start, stop=min(start + block_bytes, stop))


def _end_of_rows(file: str, max_rows: int) -> int:
    """Byte at which the first `max_rows` lines that are not blank end."""
    position = found = 0
    with open_bytes(file) as handle:
        for line in handle:
            if found == max_rows:
                break
            position += len(line)
            found += bool(line.strip())
    return position


def read_lines(
    block: Block,
    *,
    on_bad: OnBadRow | None = None,
    as_text: bool = False,
    blank_lines: bool = False,
) -> Iterator[Record]:
    """Lines that start within the block; the line over its end belongs to it.

    Args:
        block: the stretch to read.
        on_bad: takes lines that hold no record; without it, the first one is raised.
        as_text: take lines as they are, whatever the file is called.
        blank_lines: also yield blank lines: as texts where each line is a text, with the value None
            where each line is JSON.
    """
    is_json = kind_of(block.file) == "json" and not as_text
    with open_bytes(block.file) as handle:
        position = 0
        if block.start:
            # Step back one byte: a line that starts exactly at `start` must not be skipped.
            handle.seek(block.start - 1)
            position = block.start - 1 + len(handle.readline())
        base, number, taken = position, 0, 0
        while (block.stop < 0 or position < block.stop) and taken != block.max_rows:
            line = next_line(handle, block.file)
            if not line:
                return
            number += 1
            position += len(line)
            blank = not line.strip()
            if not blank or blank_lines:
                taken += not blank
                raw = Record(value=line, file=block.file, number=number, base=base)
                try:
                    text = _decode(raw)
                    value = _value_of(text, raw, is_json=is_json)
                except BadRowError as bad:
                    give_up(bad, on_bad)
                else:
                    yield dataclasses.replace(raw, value=value)


def _decode(raw: Record) -> str:
    try:
        text: str = raw.value.decode()
    except UnicodeDecodeError as error:
        raise raw.fail(
            f"byte {error.start + 1} of the line is not UTF-8", fix="save the file as UTF-8"
        ) from error
    return text.removeprefix("\ufeff")


def _value_of(text: str, raw: Record, *, is_json: bool) -> dict[str, Any] | None:
    """Return the fields of a line; None for a blank line between JSON objects."""
    if not is_json:
        return {"text": text.rstrip("\r\n")}
    return _parse_json(text, raw) if text.strip() else None


def _parse_json(text: str, raw: Record) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise raw.fail(f"not JSON ({error})", allowed="one JSON object per line") from error
    if not isinstance(value, dict):
        raise raw.fail(f"a JSON {type(value).__name__}", allowed="one JSON object per line")
    return value
