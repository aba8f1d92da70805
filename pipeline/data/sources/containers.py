"""Read raw records in blocks from files of lines and delimited files; pass tables on.

    plan_blocks    file  -> blocks, which any process may read in any order
    read_records   block -> records, in file order
    read_file      file  -> records, in file order

A block of lines or of a delimited file is a range of bytes, so that no reader must count lines. A
JSON list has no such ranges: one task reads it whole.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from pipeline.data.sources.columnar import is_single_dataset, plan_table, read_table
from pipeline.data.sources.paths import (
    FETCH_AGAIN,
    READABLE,
    counts_rows,
    file_size,
    is_packed,
    kind_of,
    open_bytes,
)
from pipeline.data.sources.records import BadRowError, FileBlock, OnBadRow, Record, give_up
from pipeline.errors import UserError

_WHOLE_FILE = 2**62  # bytes of a block that no file fills


def plan_blocks(
    file: str, *, split: str | None, block_bytes: int, max_rows: int | None
) -> Iterator[FileBlock]:
    """Cut one file into blocks of about `block_bytes`, up to `max_rows` records."""
    if counts_rows(file):
        yield from plan_table(file, split=split, block_bytes=block_bytes, max_rows=max_rows)
    elif not kind_of(file):
        raise UserError(
            f"{file}: unknown kind of file", allowed=READABLE, docs="trouble.md#file-kinds"
        )
    elif is_packed(file) or _is_json_list(file):
        # One block: neither a compressed stream nor a JSON list can be read from the middle.
        yield FileBlock(file=file, start=0, stop=-1, max_rows=max_rows)
    elif kind_of(file) == "csv":
        yield from plan_delimited(file, block_bytes=block_bytes, max_rows=max_rows)
    else:
        yield from plan_lines(file, block_bytes=block_bytes, max_rows=max_rows)


def read_records(
    block: FileBlock,
    *,
    split: str | None,
    on_bad: OnBadRow | None = None,
    blank_lines: bool = False,
) -> Iterator[Record]:
    """Return the records of a block, in file order.

    Args:
        block: the stretch to read.
        split: of a hub dataset; None for its default.
        on_bad: takes faults of lines without a record, such as one that is not JSON; without it,
            the first fault is raised.
        blank_lines: also yield the blank lines of files of lines; see `read_lines`.
    """
    if counts_rows(block.file):
        return read_table(block, split=split)
    if kind_of(block.file) == "csv":
        return read_delimited(block, on_bad=on_bad)
    if _is_json_list(block.file):
        return _read_json_list(block, on_bad=on_bad)
    return read_lines(block, on_bad=on_bad, blank_lines=blank_lines)


def read_file(
    file: str, *, split: str | None, max_rows: int | None = None, on_bad: OnBadRow | None = None
) -> Iterator[Record]:
    """Yield the records of a whole file; for its arguments see `plan_blocks` and `read_records`."""
    for block in plan_blocks(file, split=split, block_bytes=_WHOLE_FILE, max_rows=max_rows):
        yield from read_records(block, split=split, on_bad=on_bad)


def next_line(handle: IO[bytes], file: str, most: int = -1) -> bytes:
    """Return the next line with its end, or its first `most` bytes; b"" at the end of the file.

    Raises:
        UserError: the file is compressed and damaged.
    """
    try:
        return handle.readline(most)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise UserError(f"{file}: damaged compressed file ({error})", fix=FETCH_AGAIN) from error


def plan_lines(file: str, *, block_bytes: int, max_rows: int | None) -> Iterator[FileBlock]:
    """Cut a file that is not compressed into blocks of bytes, up to `max_rows` records."""
    stop = file_size(file) if max_rows is None else _end_of_rows(file, max_rows)
    for start in range(0, stop, block_bytes):
        yield FileBlock(file=file, start=start, stop=min(start + block_bytes, stop))


def _end_of_rows(file: str, max_rows: int) -> int:
    """Return the byte at which the first `max_rows` lines that are not blank end."""
    position = found = 0
    with open_bytes(file) as handle:
        for line in handle:
            if found == max_rows:
                break
            position += len(line)
            found += bool(line.strip())
    return position


def read_lines(
    block: FileBlock,
    *,
    on_bad: OnBadRow | None = None,
    as_text: bool = False,
    blank_lines: bool = False,
) -> Iterator[Record]:
    """Yield the lines that start within the block, also the one that ends beyond it.

    Args:
        block: the stretch to read.
        on_bad: takes lines that hold no record; without it, the first one is raised.
        as_text: yield each line as a text, in JSON files, too.
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
        # `number` counts from here; `Record.where` adds the lines above `base` when it is asked.
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
    return text.removeprefix("\ufeff")  # the mark that some editors write before the first line


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


def _is_json_list(file: str) -> bool:
    """Return whether a .json file holds one list of objects instead of an object per line."""
    # Not .jsonl or .ndjson, whose names promise an object per line.
    if kind_of(file) != "json" or ".json" not in Path(file.lower()).suffixes:
        return False
    with open_bytes(file) as handle:
        # Such a list is often one line of gigabytes.
        while line := next_line(handle, file, most=2**10):
            # Blank lines may precede it.
            if start := line.removeprefix(b"\xef\xbb\xbf").strip():
                return start.startswith(b"[")
    return False


def _read_json_list(block: FileBlock, *, on_bad: OnBadRow | None) -> Iterator[Record]:
    """Yield the entries of a JSON list; a record's number counts entries, not lines.

    Raises:
        UserError: the file as a whole is not JSON.
    """
    with open_bytes(block.file) as handle:
        content = b"".join(iter(functools.partial(next_line, handle, block.file), b""))
    try:
        entries = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        allowed = "a list of JSON objects, or one JSON object per line"
        raise UserError(f"{block.file}: not JSON ({error})", allowed=allowed) from error
    for number, value in enumerate(entries[: block.max_rows], 1):
        record = Record(value=value, file=block.file, number=number)
        if isinstance(value, dict):
            yield record
        else:
            give_up(record.fail(f"a JSON {type(value).__name__}", allowed="JSON objects"), on_bad)


_DELIMITERS = ",;\t|"
# A field may be as long as a book; the library's own limit is 131,072 characters.
_LONGEST_FIELD = 2**30


class _Lines:
    """Decoded lines of a file for `csv.reader`, which reads on inside a quoted field."""

    def __init__(self, handle: IO[bytes], file: str, position: int) -> None:
        self._handle, self._file = handle, file
        # Where the lines start, and the byte after the last line that was read.
        self._base = self.position = position
        self._number = 0
        self._fault = ""
        self._waiting = b""  # a line that `peek` has read ahead

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._waiting or next_line(self._handle, self._file)
        self._waiting = b""
        if not line:
            raise StopIteration
        is_first = not self.position
        self.position += len(line)
        self._number += 1
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            self._fault = f"byte {error.start + 1} of line {self._number} is not UTF-8"
            # Replaced, not raised: csv must read on, so that only this record is lost.
            text = line.decode(errors="replace")
        return text.removeprefix("\ufeff") if is_first else text

    def peek(self) -> str:
        """Return the next line without consuming it."""
        self._waiting = self._waiting or next_line(self._handle, self._file)
        return self._waiting.decode(errors="replace")

    def records(self, delimiter: str) -> Iterator[tuple[int, Record, str]]:
        """Yield position, record (a list of fields) and fault of each following record."""
        csv.field_size_limit(_LONGEST_FIELD)
        reader = csv.reader(self, delimiter=delimiter, strict=True)
        while True:
            position, number = self.position, self._number + 1
            self._fault, fields = "", None
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # As files of old Macs end their lines, and as some writers leave it in a cell.
                bare = "new-line character seen" in str(error)
                reason = "a carriage return outside of quotes" if bare else str(error)
                # After a quote that is never closed: rows that would be lost without being counted.
                lines = self._number - number + 1
                of = f", in a record of {lines} lines" if lines > 1 else ""
                self._fault = self._fault or f"not a line of a table ({reason}{of})"
            record = Record(value=fields, file=self._file, number=number, base=self._base)
            if "unexpected end of data" in self._fault:
                # The rest of the file was taken for one text: no record follows.
                raise UserError(
                    f"{record.where}: a quoted field that never ends",
                    fix='close it, and write a quote inside a field as ""',
                )
            if fields != []:  # a blank line
                yield position, record, self._fault


class _DelimitedFile:
    """An opened delimited file: its delimiter and the names of its columns."""

    def __init__(self, handle: IO[bytes], file: str) -> None:
        self.lines = _Lines(handle, file, 0)
        self.names: list[str] = []
        while (head := self.lines.peek()) and not head.strip("\r\n"):
            next(self.lines)  # the header tells the delimiter, not a blank line before it
        # A TSV is cut at tabs alone, even if its header has more commas.
        is_tsv = ".tsv" in Path(file.lower()).suffixes
        self.delimiter = "\t" if is_tsv else _delimiter_of(head)
        for _, record, fault in self.lines.records(self.delimiter):
            names = record.value or []
            if fault:
                raise UserError(f"{record.where}: {fault}", fix=_table_fix(fault))
            if repeated := {name for name in names if name and names.count(name) > 1}:
                raise UserError(f"{record.where}: a column twice: {', '.join(sorted(repeated))}")
            self.names = names
            break


def _table_fix(fault: str) -> str:
    """Return the cure of a line that is not one of a table; empty where none is known."""
    if "not UTF-8" in fault:
        return "save the file as UTF-8"
    if "carriage return" in fault:
        return "quote cells that hold one, and end lines with a line feed"
    return ""


def _delimiter_of(head: str) -> str:
    """Return the character that cuts a header line into most fields."""
    csv.field_size_limit(_LONGEST_FIELD)  # of the whole process
    counts = dict.fromkeys(_DELIMITERS, 0)
    for mark in _DELIMITERS:
        # A line that cannot be parsed is refused when it is read as the header.
        with contextlib.suppress(csv.Error):
            # Parsed, not counted: a delimiter inside quotes does not count.
            counts[mark] = len(next(csv.reader([head], delimiter=mark), []))
    return max(counts, key=lambda mark: counts[mark])


def plan_delimited(file: str, *, block_bytes: int, max_rows: int | None) -> Iterator[FileBlock]:
    """Cut a delimited file that is not compressed into blocks that start where records start."""
    with open_bytes(file) as handle:
        # A quoted field may hold line ends, so only a parse from the start finds records.
        table = _DelimitedFile(handle, file)
        start = end = table.lines.position
        for taken, (position, _, _) in enumerate(table.lines.records(table.delimiter)):
            if taken == max_rows:
                break
            # `position` is where this record starts, so that no block cuts a quoted field.
            if position - start >= block_bytes:
                yield FileBlock(file=file, start=start, stop=position)
                start = position
            end = table.lines.position
        if end > start:
            yield FileBlock(file=file, start=start, stop=end)


def read_delimited(block: FileBlock, *, on_bad: OnBadRow | None = None) -> Iterator[Record]:
    """Yield the records of a block as texts by column; skip blank lines."""
    with open_bytes(block.file) as handle:
        table = _DelimitedFile(handle, block.file)
        lines, taken = table.lines, 0
        if block.start > lines.position:
            handle.seek(block.start)
            # The header, read above, gave the names; records start here.
            lines = _Lines(handle, block.file, block.start)
        records = lines.records(table.delimiter)
        while (block.stop < 0 or lines.position < block.stop) and taken != block.max_rows:
            entry = next(records, None)
            if entry is None:
                return
            position, record, fault = entry
            # Behind blank lines at the end of this block: the first record of the next one.
            if 0 <= block.stop <= position:
                return
            taken += 1
            if not fault and len(record.value) != len(table.names):
                fault = f"{len(record.value)} fields, the header has {len(table.names)}"
            if fault:
                give_up(record.fail(fault, fix=_table_fix(fault)), on_bad)
            else:
                value = dict(zip(table.names, record.value, strict=True))
                yield Record(value=value, file=record.file, number=record.number, base=record.base)


def split_to_read(file: str, split: str | None, *, default: str) -> str | None:
    """Return the split to read of a hub dataset; a single saved dataset has no default."""
    return split or (None if is_single_dataset(file) else default)


def block_bytes_of(block: FileBlock) -> int:
    """Estimate the bytes of text in a block: a kilobyte for a row of a table."""
    if block.stop < 0:
        # Compressed text is taken to be four times as long as its file.
        return file_size(block.file) * (4 if is_packed(block.file) else 1)
    return (block.stop - block.start) * (1024 if counts_rows(block.file) else 1)
