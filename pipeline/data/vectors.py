"""Write and read a teacher's vectors: npy files of fp16 rows, one per shard of a dataset.

    vectors/documents-00000.npy    (rows of documents-00000.arrow, W)
    vectors/queries-00000.npy      (rows of examples-00000.arrow, W)

Vectors are divided by their length before they are rounded to fp16, and again when they are read,
so that a dot product is a cosine.

Shapes: R rows, W width of the teacher's embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipeline.data.manifest import ShardInfo, find_rows, require_files
from pipeline.errors import UserError
from pipeline.files import atomic_path

VECTORS_FOLDER = "vectors"
_DTYPE = np.dtype("<f2")  # little-endian fp16, whatever the machine
_FIX = "mine the dataset again"
# fp16 keeps a length within 0.1 %: vectors further off were not written by this package.
_LENGTH_ERROR = 0.01


def vector_file(kind: str, number: int) -> str:
    """Return the name of the file with the vectors of a shard; `kind` is documents or queries."""
    return f"{kind}-{number:05d}.npy"


def write_teacher_vectors(
    folder: Path, name: str, blocks: Iterable[NDArray[Any]], *, rows: int, width: int
) -> ShardInfo:
    """Write the vectors of one shard atomically; return their entry for the manifest.

    Args:
        folder: the dataset folder.
        name: from `vector_file`.
        blocks: (R, W) floating-point vectors of any length, in the order of the shard's rows.
        rows: of the shard.
        width: W.

    Raises:
        UserError: a vector is not finite, has length 0 or another width; no file is left.
    """
    path = folder / VECTORS_FOLDER / name
    written = 0
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        # Not by `np.save`, which would need all rows in memory.
        header = {"descr": _DTYPE.str, "fortran_order": False, "shape": (rows, width)}
        npy.write_array_header_1_0(file, header)
        for block in blocks:
            if block.ndim != 2 or block.shape[1] != width:
                raise UserError(
                    f"{path}: a teacher's vectors of shape {block.shape}",
                    allowed=f"(rows, {width}), as the first vectors",
                    fix="use one teacher for all documents and queries",
                )
            file.write(_to_unit(block, first=written, path=path).astype(_DTYPE).tobytes())
            written += len(block)
        assert written == rows, (path, written, rows)
    return ShardInfo.of(path, rows)


def _to_unit(vectors_RW: NDArray[Any], *, first: int, path: Path) -> NDArray[np.float32]:
    """Divide vectors by their lengths; refuse vectors without a direction."""
    wide = vectors_RW.astype(np.float32)
    # In float64, because squares of large float32 numbers overflow.
    length_R = np.sqrt(np.einsum("rw,rw->r", wide, wide, dtype=np.float64))
    bad = np.flatnonzero(~(np.isfinite(length_R) & (length_R > 0)))
    if len(bad):
        found = "length 0" if length_R[bad[0]] == 0 else "NaN or infinity"
        raise UserError(
            f"{path}: row {first + int(bad[0])}: a teacher's vector with {found} "
            f"({len(bad)} such in this block)",
            allowed="finite vectors with a length above 0",
            fix="use another teacher, or float32 for this one",
        )
    unit: NDArray[np.float32] = (wide / length_R[:, None]).astype(np.float32)
    return unit


class VectorFiles:
    """Vectors by the number of their document or example, from the files of all shards."""

    def __init__(self, folder: Path, infos: Sequence[ShardInfo], *, width: int) -> None:
        self._folder, self._infos, self._width = folder / VECTORS_FOLDER, tuple(infos), width
        # Mapped on first use, as shards are.
        self._open: dict[int, NDArray[np.float16]] = {}
        require_files(self._folder, infos, fix=_FIX)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """(R, W) vectors of length 1 by number.

        Raises:
            UserError: a file is damaged; the message names it.
        """
        out = np.empty((len(ids), self._width), dtype=np.float32)
        for number, positions, rows in find_rows(self._infos, ids):
            out[positions] = self._map(number)[rows]
            part = out[positions]
            length_R = np.sqrt(np.einsum("rw,rw->r", part, part))
            # Negated, so that NaN is refused as well.
            if not (np.abs(length_R - 1) < _LENGTH_ERROR).all():
                raise self._damaged(number, "a vector whose length is not 1")
            out[positions] = part / length_R[:, None]
        return out

    def _map(self, number: int) -> NDArray[np.float16]:
        if number not in self._open:
            info = self._infos[number]
            try:
                array = np.load(self._folder / info.file, mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                raise self._damaged(number, str(error).splitlines()[0]) from error
            expected = (info.rows, self._width)
            if array.dtype != _DTYPE or array.shape != expected:
                raise self._damaged(
                    number, f"{array.dtype} {array.shape} where the manifest has fp16 {expected}"
                )
            self._open[number] = array
        return self._open[number]

    def _damaged(self, number: int, reason: str) -> UserError:
        path = self._folder / self._infos[number].file
        return UserError(f"{path}: damaged ({reason})", fix=f"copy the file again, or {_FIX}")
