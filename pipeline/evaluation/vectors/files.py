"""Files of vectors: Arrow, Parquet or NumPy, by the suffix of their name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.run_dir import atomic_path

SUFFIXES = (".arrow", ".parquet", ".npy")
_METADATA = b"diffembed"
_RECIPE = "recipe"


def ids_path(path: Path) -> Path:
    """Return the file that holds the ids of a NumPy file: vectors.npy has vectors.ids.json."""
    return path.with_suffix(".ids.json")


def schema_of(dtype: str, num_dimensions: int, recipe: str) -> pa.Schema:
    """Return the columns of a file of vectors; `recipe` identifies what was embedded, and how."""
    kind = pa.float32() if dtype == "float32" else pa.float16()
    fields = [("id", pa.string()), ("vector", pa.list_(kind, num_dimensions))]
    return pa.schema(fields, metadata={_METADATA: recipe})


def read_recipe(path: Path) -> str | None:
    """Return the recipe of a finished file; None for any other file."""
    try:
        if path.suffix == ".parquet":
            metadata = pq.read_schema(path).metadata or {}
        elif path.suffix == ".npy":
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
    writers = {".arrow": _arrow, ".parquet": _parquet, ".npy": _numpy}
    with writers[path.suffix](path, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


@contextlib.contextmanager
def _arrow(path: Path, schema: pa.Schema) -> Iterator[Any]:
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        yield writer


@contextlib.contextmanager
def _parquet(path: Path, schema: pa.Schema) -> Iterator[Any]:
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        yield writer


@contextlib.contextmanager
def _numpy(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """(N, D) vectors in the file, their ids in a JSON file that is written before it."""
    vectors = schema.field("vector").type
    dtype = np.dtype(vectors.value_type.to_pandas_dtype())
    # The vectors get their name last: their presence means that both files are whole.
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as file,
        atomic_path(ids_path(path)) as names,
        names.open("w") as ids,
    ):
        writer = _NumpyWriter(file, ids, dtype, vectors.list_size)
        writer.begin(schema.metadata[_METADATA].decode())
        yield writer
        writer.end()


class _NumpyWriter:
    """Appends rows; the header, which holds their number, is written last over a blank one."""

    def __init__(self, file: Any, ids: Any, dtype: np.dtype[Any], width: int) -> None:
        self._file, self._ids, self._dtype, self._width = file, ids, dtype, width
        self._num_rows = 0

    def begin(self, recipe: str) -> None:
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
