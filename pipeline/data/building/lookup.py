"""Documents by id, for sources whose records name documents instead of holding them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.data.building.plan import Build
from pipeline.data.sources import Shelf, corpus_records, read_judgements, refers_to_documents
from pipeline.data.sources.row import stable_hash
from pipeline.run_dir import atomic_path, write_json

_SCHEMA = pa.schema([("id", pa.large_string()), ("text", pa.large_string())])
_ROWS_PER_BATCH = 1024


def shelve_documents(build: Build, task: int) -> None:
    """Write the documents a source refers to as one table, and an index of their ids."""
    source = build.plan.sources[task]
    if not refers_to_documents(source):
        write_json(build.output("lookup", task), {"documents": 0})
        return
    keys: list[np.ndarray] = []
    path = build.beside("lookup", task, "documents")
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, _SCHEMA) as writer,
    ):
        for rows in _batches(corpus_records(source)):
            keys.append(np.array([stable_hash(name) for name, _ in rows], dtype=np.int64))
            columns = [list(part) for part in zip(*rows, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    every = np.concatenate(keys) if keys else np.empty(0, dtype=np.int64)
    order = np.argsort(every, kind="stable")
    index = build.beside("lookup", task, "index")
    with atomic_path(index) as temporary, temporary.open("wb") as handle:
        np.save(handle, np.stack([every[order], order]))
    write_json(build.output("lookup", task), {"documents": len(every)})


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
    return Shelf(document=documents.find, judgements=read_judgements(source))
