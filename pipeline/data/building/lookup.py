"""Documents by id, for sources whose records name documents instead of holding them."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.batch import IntArray
from pipeline.data.building.dropped import count_dropped, write_dropped
from pipeline.data.building.plan import Build
from pipeline.data.sources import (
    BadRows,
    Record,
    Shelf,
    corpus_records,
    read_judgements,
    refers_to_documents,
    refuse_bad_rows,
    survey_queries,
)
from pipeline.data.sources.row import stable_hash
from pipeline.run_dir import atomic_path, write_json

_SCHEMA = pa.schema([("id", pa.large_string()), ("text", pa.large_string())])
_ROWS_PER_BATCH = 1024


def shelve_documents(build: Build, task: int) -> None:
    """Write the documents a source refers to as one table, and an index of their ids.

    Raises:
        UserError: a document, or a judgement of one, cannot be used.
    """
    source = build.plan.sources[task]
    rows = BadRows(source)
    result: dict[str, Any] = {"documents": 0, "first_texts": {}, "unjudged": 0}
    if refers_to_documents(source):
        keys = _write_documents(build, task, corpus_records(source, rows.add))
        documents = _open_documents(
            build.beside("lookup", task, "documents"), build.beside("lookup", task, "index")
        )
        result["documents"] = len(keys)
        if len(np.unique(keys)) < len(keys):
            _report_repeated(corpus_records(source, lambda bad: None), documents.find, rows)
        if source.format == "mteb":
            survey = survey_queries(source, documents.find, rows)
            result |= {"first_texts": survey.first_texts, "unjudged": survey.num_unjudged}
    refuse_bad_rows(source.name, [rows.summary], 0)
    write_dropped(build, "lookup", task, rows.dropped)
    write_json(build.output("lookup", task), result | {"dropped": count_dropped(rows.dropped)})


def _write_documents(
    build: Build, task: int, records: Iterator[tuple[str, str, Record]]
) -> IntArray:
    """Write table and index; returns the hashes of the ids."""
    parts: list[IntArray] = []
    path = build.beside("lookup", task, "documents")
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, _SCHEMA) as writer,
    ):
        for rows in _batches((name, text) for name, text, _ in records):
            parts.append(np.array([stable_hash(name) for name, _ in rows], dtype=np.int64))
            columns = [list(part) for part in zip(*rows, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    keys = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    index = build.beside("lookup", task, "index")
    with atomic_path(index) as temporary, temporary.open("wb") as handle:
        np.save(handle, np.stack([keys[order], order]))
    return keys


def _report_repeated(
    records: Iterator[tuple[str, str, Record]], find: Callable[[str], str | None], rows: BadRows
) -> None:
    """List the documents whose id another one with another text has before them."""
    for name, text, record in records:
        if find(name) != text:
            rows.drop(record.where, "document", "another text of the same id precedes it", text)


def _batches(pairs: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    while rows := list(itertools.islice(pairs, _ROWS_PER_BATCH)):
        yield rows


class _Documents:
    """The table of `shelve_documents`, memory-mapped."""

    def __init__(self, path: Path, index: Path) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batch = functools.lru_cache(maxsize=64)(self._reader.get_batch)
        self._keys, self._rows = np.load(index, mmap_mode="r")

    def find(self, name: str) -> str | None:
        """The text of a document id."""
        key = stable_hash(name)
        place = int(np.searchsorted(self._keys, key))
        while place < len(self._keys) and self._keys[place] == key:
            batch, row = divmod(int(self._rows[place]), _ROWS_PER_BATCH)
            columns = self._batch(batch)
            if columns["id"][row].as_py() == name:
                text: str = columns["text"][row].as_py()
                return text
            place += 1
        return None


@functools.lru_cache(maxsize=4)
def _open_documents(path: Path, index: Path) -> _Documents:
    return _Documents(path, index)


def open_shelf(build: Build, number: int) -> Shelf | None:
    """What a source's reader looks things up in; None where its records are complete."""
    source = build.plan.sources[number]
    if not refers_to_documents(source):
        return None
    documents = _open_documents(
        build.beside("lookup", number, "documents"), build.beside("lookup", number, "index")
    )
    found = json.loads(build.output("lookup", number).read_text())
    return Shelf(
        document=documents.find,
        judgements=read_judgements(source),
        first_texts=found["first_texts"],
    )
