"""Read rows of typed tables: Parquet and Arrow files, and hub datasets.

A cell becomes a Python value only when it is read, so that columns that no format uses cannot fail:
bytes that are not UTF-8, dates outside of Python's years, unknown time zones, damaged pages.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.sources.paths import (
    FETCH_AGAIN,
    HUB,
    canonical,
    file_size,
    find_split,
    is_remote,
    kind_of,
    open_bytes,
)
from pipeline.data.sources.records import BadRowError, FileBlock, Record
from pipeline.errors import UserError
from pipeline.files import FileState, file_state

_ROWS_PER_PIECE = 1024  # converted to Python values together
_ROWS_PER_BLOCK = 10_000  # of a hub dataset, whose bytes are unknown


class _Columns:
    """A piece of a table; each column is converted when one of its cells is first read."""

    def __init__(self, table: Any, broken: Mapping[str, UserError]) -> None:
        self.names: list[str] = [*table.schema.names, *broken]
        self._table, self._broken = table, broken
        self._converted: dict[str, Any] = {}

    def cell(self, name: str, row: int) -> Any:
        """Return the Python value of a cell.

        Raises:
            UserError: no cell of the column can be decoded.
            Exception: the conversion of this cell failed, in one of several libraries.
        """
        if name in self._broken:
            raise self._broken[name]
        if name not in self._converted:
            # By position, because Arrow refuses a name that two columns have.
            column = self._table.column(self.names.index(name))
            try:
                self._converted[name] = column.to_pylist()
            except Exception:  # perhaps because of one cell: convert each when it is read
                self._converted[name] = column
        value = self._converted[name][row]
        # A column that was not converted as a whole yields Arrow's scalars.
        return value.as_py() if isinstance(value, pa.Scalar) else value


class _TableRow(Mapping[str, Any]):
    """One row; reading a field that cannot be converted is a `BadRowError`."""

    __slots__ = ("_columns", "_file", "_number", "_row")

    def __init__(self, columns: _Columns, row: int, *, file: str, number: int) -> None:
        self._columns, self._row, self._file, self._number = columns, row, file, number

    def __getitem__(self, name: str) -> Any:
        if name not in self._columns.names:
            raise KeyError(name)
        try:
            return self._columns.cell(name, self._row)
        except UserError:  # a fault of the file, not of this record
            raise
        except UnicodeDecodeError as error:
            raise self._fail(name, f"byte {error.start + 1} of it is not UTF-8") from error
        except Exception as error:  # conversions raise errors of several libraries
            reason = str(error).splitlines()[0]
            if "zoneinfo" in reason:  # Arrow's words for a zone that is not in the database
                reason = "its time zone is unknown on this machine"
            raise self._fail(name, reason) from error

    def _fail(self, name: str, reason: str) -> BadRowError:
        return BadRowError(f"{self._file}:{self._number}", f"{name!r} cannot be read ({reason})")

    def __contains__(self, name: object) -> bool:
        # `Mapping` would read the cell, and so fail where it cannot be converted.
        return name in self._columns.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.names)

    def __len__(self) -> int:
        return len(self._columns.names)


def plan_table(
    file: str, *, split: str | None, block_bytes: int, max_rows: int | None
) -> Iterator[FileBlock]:
    """Cut a table into blocks of rows, of about `block_bytes` each."""
    if kind_of(file) == "hub":
        rows, per_block = len(hub_dataset(file, split)), _ROWS_PER_BLOCK
    else:
        if kind_of(file) == "parquet":
            with open_bytes(file) as handle:
                metadata = _parquet(file, handle).metadata
                rows = metadata.num_rows
                groups = range(metadata.num_row_groups)
                size = sum(metadata.row_group(k).total_byte_size for k in groups)
        else:
            rows, size = sum(batch.num_rows for batch in _arrow_batches(file)), file_size(file)
        # As many rows as hold `block_bytes` on average.
        per_block = max(1, int(rows * block_bytes / max(size, 1)))
    rows = rows if max_rows is None else min(rows, max_rows)
    for start in range(0, rows, per_block):
        yield FileBlock(file=file, start=start, stop=min(start + per_block, rows))


def read_table(block: FileBlock, *, split: str | None) -> Iterator[Record]:
    """Yield the rows of a block, in order."""
    file = block.file
    if kind_of(file) == "hub":
        pieces, name = _hub_pieces(block, split), f"{file}[{split}]" if split else file
    else:
        pieces, name = _file_pieces(block), file
    for first, piece, broken in pieces:
        columns = _Columns(piece, broken)
        # Only rows of the block: its first and last pieces may reach beyond it.
        for row in range(max(block.start - first, 0), min(piece.num_rows, block.stop - first)):
            number = first + row + 1
            value = _TableRow(columns, row, file=name, number=number)
            yield Record(value=value, file=name, number=number)


# Number of the first row, the rows, and errors of the columns that are missing because of damage.
_Piece = tuple[int, Any, Mapping[str, UserError]]


def _file_pieces(block: FileBlock) -> Iterator[_Piece]:
    """Yield the pieces of a file that overlap a block."""
    if kind_of(block.file) == "arrow":
        yield from _overlapping(((batch, {}) for batch in _arrow_batches(block.file)), 0, block)
        return
    with open_bytes(block.file) as handle:
        file = _parquet(block.file, handle)
        try:
            first = 0
            for group in range(file.metadata.num_row_groups):
                last = first + file.metadata.row_group(group).num_rows
                if first < block.stop and last > block.start:
                    yield from _overlapping(_group_batches(file, group, block.file), first, block)
                first = last
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{block.file}: damaged Parquet file ({error})", fix=FETCH_AGAIN
            ) from error


def _group_batches(
    file: Any, group: int, name: str
) -> Iterator[tuple[Any, Mapping[str, UserError]]]:
    """Yield the batches of a row group; a damaged column is an error only when it is read."""
    done = 0
    try:
        for batch in file.iter_batches(batch_size=_ROWS_PER_PIECE, row_groups=[group]):
            done += batch.num_rows
            yield batch, {}
        return
    except (pa.ArrowException, OSError):
        # Read the others alone. Rows already yielded are counted, and not yielded again.
        broken = _broken_columns(file, group, name)
        whole = [column for column in file.schema_arrow.names if column not in broken]
        if not broken or not whole:
            raise
    seen = 0
    for batch in file.iter_batches(batch_size=_ROWS_PER_PIECE, row_groups=[group], columns=whole):
        seen += batch.num_rows
        # The slice keeps the part of this batch that was not yielded before the damage.
        if seen > done:
            yield batch.slice(max(0, batch.num_rows - (seen - done))), broken


def _broken_columns(file: Any, group: int, name: str) -> dict[str, UserError]:
    broken = {}
    for column in file.schema_arrow.names:
        try:
            # Each column alone: an error of a group names none of them.
            file.read_row_group(group, columns=[column])
        except (pa.ArrowException, OSError) as error:
            broken[column] = UserError(
                f"{name}: damaged Parquet file (column {column!r}: {error})", fix=FETCH_AGAIN
            )
    return broken


def _overlapping(
    batches: Iterator[tuple[Any, Mapping[str, UserError]]], first: int, block: FileBlock
) -> Iterator[_Piece]:
    for batch, broken in batches:
        for start in range(0, batch.num_rows, _ROWS_PER_PIECE):
            piece = batch.slice(start, _ROWS_PER_PIECE)
            if first < block.stop and first + piece.num_rows > block.start:
                yield first, piece, broken
            first += piece.num_rows


def _parquet(file: str, handle: IO[bytes]) -> Any:
    try:
        return pq.ParquetFile(handle)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a Parquet file ({error})", fix=FETCH_AGAIN) from error


def _arrow_batches(file: str) -> Iterator[Any]:
    """Yield the record batches of an Arrow IPC file or of a stream, which `datasets` writes."""
    try:
        # A local file is opened only for the error of one that cannot be, then mapped.
        with open_bytes(file) as handle:
            raw = pa.memory_map(file) if not is_remote(file) else pa.BufferReader(handle.read())
        try:
            # Both kinds share the suffix; only a file has the footer that opening looks for.
            opened = pa.ipc.open_file(raw)
            yield from (opened.get_batch(k) for k in range(opened.num_record_batches))
        except pa.ArrowInvalid:
            raw.seek(0)
            yield from pa.ipc.open_stream(raw)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: not an Arrow file, or a damaged one ({error})", fix=FETCH_AGAIN
        ) from error


def _hub_pieces(block: FileBlock, split: str | None) -> Iterator[_Piece]:
    # As Arrow tables: the library would convert every column to Python values.
    dataset = hub_dataset(block.file, split).with_format("arrow")
    for start in range(block.start, block.stop, _ROWS_PER_PIECE):
        yield start, dataset[start : min(start + _ROWS_PER_PIECE, block.stop)], {}


def is_single_dataset(file: str) -> bool:
    """Return whether `save_to_disk` wrote a single dataset here, not a dict of splits."""
    return Path(file.removeprefix(HUB), "state.json").expanduser().is_file()


def hub_dataset(file: str, split: str | None) -> Any:
    """Load a dataset `hub:OWNER/NAME[:CONFIG]`, from its cache when offline, or `hub:FOLDER`.

    Raises:
        UserError: it cannot be loaded, or has no such split.
    """
    return _load_dataset(file, split, tuple(map(file_state, _files_in_folder(file))))


# Loading takes seconds, and each block of a dataset asks for it.
@functools.lru_cache(maxsize=4)
def _load_dataset(file: str, split: str | None, states: tuple[FileState, ...]) -> Any:
    import datasets

    name, config = _name_of(file)
    folder = Path(name).expanduser()
    try:
        is_single = is_single_dataset(file)
        if is_single:
            state = json.loads((folder / "state.json").read_text())
            if not state.get("_data_files", True):
                return []  # the library cannot load a dataset without rows
        if is_single or (folder / "dataset_dict.json").is_file():
            return _saved_split(file, datasets.load_from_disk(str(folder)), split)
        name = str(folder) if folder.exists() else name
        return datasets.load_dataset(name, config or None, split=split or "train")
    except UserError:
        raise
    except Exception as error:  # the library raises whatever its back ends raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file}: split {split or 'train'!r} cannot be loaded ({reason})",
            fix="check the name, or download it first where there is a network",
        ) from error


def _name_of(file: str) -> tuple[str, str]:
    """Return name and config of a hub dataset; a folder's name may contain a colon."""
    name, config = file.removeprefix(HUB), ""
    if not Path(name).expanduser().exists():
        name, _, config = name.partition(":")
    return name, config


def _saved_split(file: str, saved: Any, split: str | None) -> Any:
    """Return the split of a saved dataset, or of a dict of datasets."""
    if isinstance(saved, dict):
        wanted = split or "train"
        return saved[find_split(saved, wanted, missing=f"{file}: no split {wanted!r}")]
    own = str(saved.split or "train")
    if split is not None and canonical(split) != canonical(own):
        raise UserError(
            f"{file}: a single saved dataset (split {own!r}), not the split {split!r}",
            fix="leave `split` out, or give the folder of the whole DatasetDict",
        )
    return saved


def stored_files(file: str, split: str | None) -> list[str]:
    """Return the files that hold the bytes of `file`: itself, or the files of a hub dataset.

    They are in its folder, or in the library's cache.
    """
    if not file.startswith(HUB):
        return [file]
    inside = _files_in_folder(file)
    return inside or [entry["filename"] for entry in hub_dataset(file, split).cache_files]


def _files_in_folder(file: str) -> list[str]:
    """Return the files of a dataset in a folder; none for a name on the hub."""
    folder = Path(_name_of(file)[0]).expanduser()
    inside = (path for path in sorted(folder.rglob("*")) if path.is_file())
    # Hidden ones are never data.
    return [
        str(path)
        for path in inside
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
