"""Tables of text: CSV and TSV with a header line, cut into blocks between records."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.data.sources.blocks import Block, OnBadRow, Record, give_up
from pipeline.data.sources.files import open_bytes
from pipeline.data.sources.lines import next_line
from pipeline.errors import UserError

_DELIMITERS = ",;\t|"
# A field may be as long as a book; the library's own limit is 131,072 characters.
_LONGEST_FIELD = 2**30


class _Lines:
    """Decoded lines of a file for `csv.reader`, which asks for more inside a quoted field."""

    def __init__(self, handle: IO[bytes], file: str, position: int) -> None:
        self._handle, self._file = handle, file
        self._base = self.position = position
        self._number = 0
        self._fault = ""
        self._waiting = b""  # a line that was looked at and not yet read

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
            text = line.decode(errors="replace")
        return text.removeprefix("\ufeff") if is_first else text

    def peek(self) -> str:
        """The next line, which stays the next one."""
        self._waiting = self._waiting or next_line(self._handle, self._file)
        return self._waiting.decode(errors="replace")

    def records(self, delimiter: str) -> Iterator[tuple[int, Record, str]]:
        """Position, fields with their place, and what is wrong, of each record from here on."""
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
                self._fault = self._fault or f"not a line of a table ({error})"
            record = Record(value=fields, file=self._file, number=number, base=self._base)
            if "unexpected end of data" in self._fault:
                # All that follows it was taken for one text, so there is nothing to go on with.
                raise UserError(
                    f"{record.where}: a quoted field that never ends",
                    fix='close it, and write a quote inside a field as ""',
                )
            if fields != []:  # a blank line
                yield position, record, self._fault


class _Table:
    """An opened table: its delimiter and the names of its columns."""

    def __init__(self, handle: IO[bytes], file: str) -> None:
        self.lines = _Lines(handle, file, 0)
        self.names: list[str] = []
        is_tsv = ".tsv" in Path(file.lower()).suffixes
        self.delimiter = "\t" if is_tsv else _delimiter_of(self.lines.peek())
        for _, record, fault in self.lines.records(self.delimiter):
            names = record.value or []
            if fault:
                raise UserError(f"{record.where}: {fault}", fix="save the file as UTF-8")
            if repeated := {name for name in names if name and names.count(name) > 1}:
                raise UserError(f"{record.where}: a column twice: {', '.join(sorted(repeated))}")
            self.names = names
            break


def _delimiter_of(head: str) -> str:
    """The character that cuts a header line into most fields."""
    counts = {mark: len(next(csv.reader([head], delimiter=mark), [])) for mark in _DELIMITERS}
    return max(counts, key=lambda mark: counts[mark])


def plan_delimited(file: str, *, block_bytes: int, max_rows: int | None) -> Iterator[Block]:
    """Cut a table that is not compressed into blocks that begin where records begin."""
    with open_bytes(file) as handle:
        table = _Table(handle, file)
        start = end = table.lines.position
        for taken, (position, _, _) in enumerate(table.lines.records(table.delimiter)):
            if taken == max_rows:
                break
            if position - start >= block_bytes:
                yield Block(file=file, start=start, stop=position)
                start = position
            end = table.lines.position
        if end > start:
            yield Block(file=file, start=start, stop=end)


def read_delimited(block: Block, *, on_bad: OnBadRow | None = None) -> Iterator[Record]:
    """The records of a block as texts by column; a blank line is none."""
    with open_bytes(block.file) as handle:
        table = _Table(handle, block.file)
        lines, taken = table.lines, 0
        if block.start > lines.position:
            handle.seek(block.start)
            lines = _Lines(handle, block.file, block.start)
        records = lines.records(table.delimiter)
        while (block.stop < 0 or lines.position < block.stop) and taken != block.max_rows:
            entry = next(records, None)
            if entry is None:
                return
            _, record, fault = entry
            taken += 1
            if not fault and len(record.value) != len(table.names):
                fault = f"{len(record.value)} fields, the header has {len(table.names)}"
            if fault:
                give_up(record.fail(fault), on_bad)
            else:
                value = dict(zip(table.names, record.value, strict=True))
                yield Record(value=value, file=record.file, number=record.number, base=record.base)
