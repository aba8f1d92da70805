"""Choose the fields of the texts to embed, and write vectors as Arrow, Parquet or NumPy.

records --survey, before any is embedded--> Fields: text, title, id
                                            warnings on stderr, one line each
ids, vectors --write_vectors--> .arrow | .parquet | .npy and .ids.json
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Role
from pipeline.data.sources.records import (
    BadRecords,
    BadRowError,
    Record,
    require_whole_characters,
)
from pipeline.errors import UserError
from pipeline.files import atomic_path, table_writer

# Defaults of `--id-field`: the usual name, then BEIR's.
_ID_FIELDS = ("id", "_id")
_TITLE = "title"
_TEXT = "text"
# Records that a message lists.
_SHOWN = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """The fields of a record that are used.

    Attributes:
        text: the text.
        title: precedes the text; None for no title.
        id: the record's id; None for row numbers.
    """

    text: str
    title: str | None
    id: str | None

    def text_of(self, record: Record) -> str:
        """Return the text to embed, behind its title; an empty text for a blank line."""
        text: str = record.value.get(self.text)
        title = record.value.get(self.title) if self.title else None
        # The same as in evaluations and training data.
        return f"{title} {text}".strip() if title else text

    def id_of(self, record: Record) -> str | None:
        """Return the record's id, or None for its row number."""
        return str(record.value[self.id]) if self.id else None


@dataclasses.dataclass(kw_only=True, slots=True)
class _Count:
    """The number of records of one kind, and where the first ones are."""

    total: int = 0
    shown: list[str] = dataclasses.field(default_factory=list)

    def add(self, record: Record) -> None:
        if self.total < _SHOWN:
            self.shown.append(record.where)
        self.total += 1

    def __str__(self) -> str:
        if self.total == 1:
            return self.shown[0]
        more = ", ..." if self.total > len(self.shown) else ""
        return f"{self.total} records: {', '.join(self.shown)}{more}"


def survey(
    records: Iterable[Record],
    bad: BadRecords,
    *,
    source: str,
    field: str,
    id_field: str | None,
    title_field: str | None,
    role: Role,
) -> Fields:
    """Read all records once, choose the fields, and print warnings.

    Args:
        records: with blank lines, whose value is None between JSON lines.
        bad: collects records that cannot be read or embedded.
        source: names the records in messages.
        field: of the text.
        id_field: None for the usual names, empty for row numbers.
        title_field: None for `title` before the `text` of a document, empty for no title.

    Raises:
        UserError: no record has a text, or some records lack a text or an id.
    """
    # A given field that no record has is a typo; a missing default one is normal.
    explicit_title = bool(title_field)
    if title_field is None:
        # Documents of a corpus in BEIR's layout have titles; queries and other fields have none.
        title_field = _TITLE if field == _TEXT and role == "document" else ""
    id_fields = _ID_FIELDS if id_field is None else (id_field,) if id_field else ()
    found = _Survey(field=field, title=title_field, id_fields=id_fields)
    for record in records:
        try:
            found.add(record)
        except BadRowError as fault:
            bad.add(fault)
    bad.refuse()
    if not found.num_texts:
        raise UserError(
            f"--input: {source} holds no text", fix="name a file with at least one record"
        )
    if explicit_title and not found.num_titles:
        raise UserError(f"--title-field: no record has a text in {title_field!r}")
    fields = Fields(
        text=field,
        title=title_field if found.num_titles else None,
        id=found.choose_id(explicit=bool(id_field)),
    )
    found.print_warnings(fields)
    return fields


class _Survey:
    """Counts over all records, from which the fields are chosen."""

    def __init__(self, *, field: str, title: str, id_fields: tuple[str, ...]) -> None:
        self._field, self._title, self._id_fields = field, title, id_fields
        self.num_records = self.num_texts = self.num_titles = 0
        self._blank_texts = self._skipped = 0
        self._without_id = {name: _Count() for name in id_fields}
        # 8 bytes per id, to count repetitions: the ids themselves might not fit in memory.
        self._ids = {name: array.array("Q") for name in id_fields}
        self._plain = True

    def add(self, record: Record) -> None:
        """Count a record.

        Raises:
            BadRowError: it cannot be embedded.
        """
        if record.value is None:
            self._skipped += 1
            return
        self.num_records += 1
        # Plain lines have no other fields, and need no warning about missing ids.
        self._plain &= set(record.value) == {_TEXT}
        text = record.value.get(self._field)
        if not isinstance(text, str):
            raise record.fail(
                f"{self._field}: {_describe(record, self._field)}",
                allowed=f"a text; fields are {', '.join(map(str, record.value))}",
                fix="" if self._field not in record.value else "leave such records out",
            )
        if text.strip():
            self.num_texts += 1
        else:
            self._blank_texts += 1
        title = record.value.get(self._title)
        if not isinstance(title, str | None):
            raise record.fail(f"{self._title}: {type(title).__name__}", allowed="a text")
        self.num_titles += bool(title)
        require_whole_characters(record, text, title or "")
        for name in self._id_fields:
            self._add_id(record, name)

    def _add_id(self, record: Record, name: str) -> None:
        value = record.value.get(name)
        if value is None:
            self._without_id[name].add(record)
        # In Python a bool is an int, but it identifies nothing.
        elif isinstance(value, bool) or not isinstance(value, str | int | float):
            raise record.fail(f"{name}: {type(value).__name__}", allowed="a text or a number")
        else:
            require_whole_characters(record, str(value))
            digest = hashlib.blake2b(str(value).encode(), digest_size=8)
            self._ids[name].append(int.from_bytes(digest.digest(), "little"))

    def choose_id(self, *, explicit: bool) -> str | None:
        """Return the first field that every record has; None if no record has any.

        Raises:
            UserError: some records have an id and others lack it.
        """
        for name in self._id_fields:
            missing = self._without_id[name]
            if not missing.total:
                return name
            # A default field may be missing everywhere, a given one nowhere.
            if explicit or missing.total < self.num_records:
                have = self.num_records - missing.total
                raise UserError(
                    f"{name}: missing in {missing}"
                    + (f"; {have} of {self.num_records} have it" if have else ""),
                    fix=f"give every record the field {name!r}, or number rows with --id-field ''",
                )
        return None

    def print_warnings(self, fields: Fields) -> None:
        """Print what users may not expect, one line each."""
        if self._blank_texts:
            _warn(
                f"{self._blank_texts} of {self.num_records} texts are blank; each keeps its row, "
                "with the vector of an empty text"
            )
        if self._skipped:
            _warn(f"blank lines between records, left out and not numbered: {self._skipped}")
        if fields.title:
            _warn(f"the field {fields.title!r} precedes the text (--title-field '' drops it)")
        if fields.id:
            # Two ids may share 8 bytes of hash, but the count is only a warning.
            repeated = self.num_records - len(np.unique(np.frombuffer(self._ids[fields.id], "Q")))
            if repeated:
                _warn(f"{repeated} of {self.num_records} records repeat an earlier {fields.id}")
        elif not self._plain:
            _warn("no record has an id; vectors are named by row numbers, from 0")


def _describe(record: Record, field: str) -> str:
    if field not in record.value:
        return "no such field"
    value = record.value[field]
    return "null" if value is None else type(value).__name__


def _warn(line: str) -> None:
    print(f"encode: {line}", file=sys.stderr, flush=True)


SUFFIXES = (".arrow", ".parquet", ".npy")
_METADATA = b"diffembed"
_RECIPE = "recipe"


def ids_path(path: Path) -> Path:
    """Return the file that holds the ids of a NumPy file: vectors.npy has vectors.ids.json."""
    return path.with_suffix(".ids.json")


def schema_of(dtype: str, num_dimensions: int, recipe: str) -> pa.Schema:
    """Return the columns of a file of vectors; `recipe` identifies its content."""
    kind = pa.float32() if dtype == "float32" else pa.float16()
    fields = [("id", pa.string()), ("vector", pa.list_(kind, num_dimensions))]
    return pa.schema(fields, metadata={_METADATA: recipe})


def read_recipe(path: Path) -> str | None:
    """Return the recipe of a finished file; None for any other file."""
    try:
        if path.suffix == ".parquet":
            metadata = pq.read_schema(path).metadata or {}
        elif path.suffix == ".npy":
            # Raises for a file that is not whole.
            np.load(path, mmap_mode="r")
            recipe = json.loads(ids_path(path).read_bytes())[_RECIPE]
            return recipe if isinstance(recipe, str) else None
        else:
            with pa.memory_map(str(path)) as source:
                metadata = pa.ipc.open_file(source).schema.metadata or {}
        return metadata[_METADATA].decode() if _METADATA in metadata else None
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None


def write_vectors(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write batches of ids and vectors to a new file; memory holds one batch at a time."""
    writers = {".arrow": table_writer, ".parquet": _parquet, ".npy": _numpy}
    with writers[path.suffix](path, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


@contextlib.contextmanager
def _parquet(path: Path, schema: pa.Schema) -> Iterator[Any]:
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        yield writer


@contextlib.contextmanager
def _numpy(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """Write (N, D) vectors to the file, and their ids to a JSON file."""
    vectors = schema.field("vector").type
    dtype = np.dtype(vectors.value_type.to_pandas_dtype())
    # The file of vectors is renamed last: its presence means that both files are whole.
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as file,
        atomic_path(ids_path(path)) as names,
        names.open("w") as ids,
    ):
        writer = _NumpyWriter(file, ids, dtype, vectors.list_size)
        writer.start(schema.metadata[_METADATA].decode())
        yield writer
        writer.end()


class _NumpyWriter:
    """Append rows; the header, which holds their number, is overwritten at the end."""

    def __init__(self, file: Any, ids: Any, dtype: np.dtype[Any], width: int) -> None:
        self._file, self._ids, self._dtype, self._width = file, ids, dtype, width
        self._num_rows = 0

    def start(self, recipe: str) -> None:
        self._ids.write(f'{{"{_RECIPE}": {json.dumps(recipe)}, "ids": [')
        self._write_header()

    def write_batch(self, batch: pa.RecordBatch) -> None:
        for name in batch["id"].to_pylist():
            self._ids.write(("," if self._num_rows else "") + f"\n{json.dumps(name)}")
            self._num_rows += 1
        self._file.write(batch["vector"].flatten().to_numpy(zero_copy_only=False).tobytes())

    def end(self) -> None:
        self._ids.write("\n]}\n")
        self._file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        # NumPy pads headers so that the number of rows may grow without moving the data.
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._num_rows, self._width),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
