"""Arrays and record batches on disk with a hash of their content: a changed byte is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from pipeline.errors import UserError, blame
from pipeline.run_dir import atomic_path

_SEAL = "sha256"


def save_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Write arrays to an npz file atomically, with a hash of their content."""
    sealed: dict[str, Any] = {
        **arrays,
        _SEAL: np.frombuffer(_hash_arrays(arrays).digest(), dtype=np.uint8),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **sealed)


def load_arrays(path: Path, *names: str, fix: str) -> dict[str, NDArray[Any]]:
    """Read arrays of an npz file by name; a file from before there was a hash is taken as it is.

    Raises:
        UserError: the file is missing or damaged.
    """
    with blame(f"{path}: damaged", fix=fix), np.load(path) as file:
        found = {name: file[name] for name in names}
        seal = file[_SEAL].tobytes() if _SEAL in file else None
    if seal is not None and _hash_arrays(found).digest() != seal:
        raise UserError(f"{path}: damaged (its content is not what its {_SEAL} says)", fix=fix)
    return found


def save_vectors(path: Path, vectors_ND: NDArray[Any]) -> None:
    """Write one array as a npy file atomically, followed by a hash, which numpy does not read."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, vectors_ND)
        file.write(hashlib.sha256(vectors_ND.tobytes()).digest())


def map_vectors(path: Path, *, fix: str) -> NDArray[Any]:
    """Map the array of a npy file; a file from before there was a hash is taken as it is.

    Raises:
        UserError: the file is missing or damaged.
    """
    with blame(f"{path}: damaged", fix=fix):
        vectors_ND: Any = np.load(path, mmap_mode="r")
        end = vectors_ND.offset + vectors_ND.nbytes
        with path.open("rb") as file:
            file.seek(end)
            seal = file.read(64)
        whole = not seal or hashlib.sha256(vectors_ND.tobytes()).digest() == seal
        if not whole or vectors_ND.ndim != 2:
            raise UserError(f"{path}: damaged (its content is not what was written)", fix=fix)
    return np.asarray(vectors_ND)


@contextmanager
def batch_writer(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """Yield a function that appends record batches, each with its hash, to a new Arrow file."""
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pyarrow.ipc.new_file(file, schema) as writer,
    ):
        yield lambda batch: writer.write_batch(
            batch, custom_metadata={_SEAL: _hash_batch(batch).hexdigest()}
        )


def read_batch(path: Path, number: int, *, fix: str) -> pa.RecordBatch:
    """Read one record batch of an Arrow file, and no other.

    Raises:
        UserError: the file is missing or damaged.
    """
    with blame(f"{path}: damaged", fix=fix), pa.memory_map(str(path)) as file:
        batch, metadata = pyarrow.ipc.open_file(file).get_batch_with_custom_metadata(number)
        batch.validate(full=True)
        found = _hash_batch(batch).hexdigest().encode()
        seal = (metadata or {}).get(_SEAL.encode(), found)
    if seal != found:
        raise UserError(f"{path}: damaged (batch {number} is not what its {_SEAL} says)", fix=fix)
    return batch


def _hash_arrays(arrays: dict[str, NDArray[Any]]) -> Any:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())  # in the order of rows, however the array lies in memory
    return digest


def _hash_batch(batch: pa.RecordBatch) -> Any:
    """Hash of the values; buffers may be padded or cut out of longer ones."""
    digest = hashlib.sha256(str(batch.schema.names).encode())
    for column in batch.columns:
        if pa.types.is_fixed_size_list(column.type):  # vectors: as Python numbers far too slow
            digest.update(column.flatten().to_numpy().tobytes())
        else:
            digest.update(repr(column.to_pylist()).encode())
    return digest
