"""Raw records of any container: JSON lines, plain lines, Parquet, hub datasets, any fsspec URL."""

from __future__ import annotations

import dataclasses
import functools
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError

_LINE_SUFFIXES = (".jsonl", ".json", ".txt", ".tsv")
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
HUB = "hub:"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A stretch of one file that one task reads.

    start and stop count bytes of line files, and rows of Parquet files and hub datasets; stop is -1
    for a compressed file, which is always read whole. At most max_rows records are taken.
    """

    file: str
    start: int
    stop: int
    max_rows: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One raw record and its place: number `number` (from 1) after byte `base` of the file."""

    value: Any
    file: str
    number: int
    base: int = 0

    @property
    def where(self) -> str:
        """`file:line`, worked out only when a message needs it."""
        return f"{self.file}:{_lines_above(self.file, self.base) + self.number}"

    def fail(self, found: str, allowed: str = "", fix: str = "") -> UserError:
        """An error that names this record's file and line."""
        return UserError(f"{self.where}: {found}", allowed=allowed, fix=fix)


@functools.lru_cache(maxsize=16)
def _lines_above(file: str, base: int) -> int:
    if not base:
        return 0
    with open_bytes(file) as handle:
        return handle.read(base).count(b"\n")


def list_files(path: str, key: str) -> list[str]:
    """Files meant by a path: itself, the data files of a folder, or a glob, in name order."""
    if path.startswith(HUB):
        return [path]
    filesystem, inner = fsspec.core.url_to_fs(path)
    if filesystem.isfile(inner):
        found = [inner]
    elif filesystem.isdir(inner):
        found = [name for name in filesystem.ls(inner, detail=False) if _kind(name)]
    else:
        found = filesystem.glob(inner) if "*" in inner else []
    if not found:
        raise UserError(
            f"{key}: {path}: no such file, and no folder or glob with data files",
            allowed=f"files named {', '.join((*_LINE_SUFFIXES, '.parquet'))}, "
            f"also with {', '.join(_PACKED_SUFFIXES)}, or hub:OWNER/NAME",
        )
    local = "://" not in path
    return sorted(name if local else filesystem.unstrip_protocol(name) for name in found)


def _kind(file: str) -> str:
    """`lines`, `packed`, `parquet` or `hub`; empty for files that hold no records."""
    if file.startswith(HUB):
        return "hub"
    name = file.rsplit("/", 1)[-1].lower()
    if name.startswith("."):
        return ""
    if name.endswith(".parquet"):
        return "parquet"
    for suffix in _PACKED_SUFFIXES:
        if name.endswith(suffix) and name.removesuffix(suffix).endswith(_LINE_SUFFIXES):
            return "packed"
    return "lines" if name.endswith(_LINE_SUFFIXES) else ""


def open_bytes(file: str) -> IO[bytes]:
    """Open a file or URL for reading, decompressed.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        if "://" not in file and _kind(file) != "packed":
            return Path(file).open("rb")
        handle: IO[bytes] = fsspec.open(file, "rb", compression="infer").open()
        return handle
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def file_size(file: str) -> int:
    """Bytes of a file, as stored; 0 for a hub dataset, which its name and revision identify."""
    if file.startswith(HUB):
        return 0
    filesystem, inner = fsspec.core.url_to_fs(file)
    return int(filesystem.size(inner))


def plan_blocks(
    file: str, *, split: str, block_bytes: int, max_rows: int | None
) -> Iterator[Block]:
    """Cut one file into blocks of about `block_bytes`, up to `max_rows` records."""
    kind = _kind(file)
    if kind == "packed":
        yield Block(file=file, start=0, stop=-1, max_rows=max_rows)
    elif kind == "parquet":
        yield from _plan_parquet(file, block_bytes, max_rows)
    elif kind == "hub":
        rows = min(len(_hub_dataset(file, split)), max_rows or 2**62)
        for start in range(0, rows, 10_000):
            yield Block(file=file, start=start, stop=min(start + 10_000, rows))
    elif kind == "lines":
        stop = file_size(file) if max_rows is None else _end_of_rows(file, max_rows)
        for start in range(0, stop, block_bytes):
            yield Block(file=file, start=start, stop=min(start + block_bytes, stop))
    else:
        raise UserError(f"{file}: unknown kind of file", allowed=", ".join(_LINE_SUFFIXES))


def _plan_parquet(file: str, block_bytes: int, max_rows: int | None) -> Iterator[Block]:
    with open_bytes(file) as handle:
        metadata = _parquet(file, handle).metadata
        rows = metadata.num_rows
        size = sum(metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups))
    per_block = max(1, int(rows * block_bytes / max(size, 1)))
    rows = min(rows, max_rows or rows)
    for start in range(0, rows, per_block):
        yield Block(file=file, start=start, stop=min(start + per_block, rows))


def _parquet(file: str, handle: IO[bytes]) -> Any:
    try:
        return pq.ParquetFile(handle)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a Parquet file ({error})") from error


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


def read_records(block: Block, *, split: str) -> Iterator[Record]:
    """The records of a block, in file order."""
    kind = _kind(block.file)
    if kind == "parquet":
        return _read_parquet(block)
    if kind == "hub":
        return _read_hub(block, split)
    return _read_lines(block)


def _read_lines(block: Block) -> Iterator[Record]:
    """Lines that start within the block; the line over its end belongs to it."""
    is_json = ".json" in block.file.rsplit("/", 1)[-1].lower()
    with open_bytes(block.file) as handle:
        position = 0
        if block.start:
            # Step back one byte: a line that starts exactly at `start` must not be skipped.
            handle.seek(block.start - 1)
            position = block.start - 1 + len(handle.readline())
        base, number, taken = position, 0, 0
        while (block.stop < 0 or position < block.stop) and taken != block.max_rows:
            try:
                line = handle.readline()
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise UserError(f"{block.file}: damaged compressed file ({error})") from error
            if not line:
                return
            number += 1
            position += len(line)
            if line.strip():
                taken += 1
                raw = Record(value=line, file=block.file, number=number, base=base)
                text = _decode(raw)
                value = _parse_json(text, raw) if is_json else {"text": text.rstrip("\r\n")}
                yield dataclasses.replace(raw, value=value)


def _decode(raw: Record) -> str:
    try:
        text: str = raw.value.decode()
    except UnicodeDecodeError as error:
        raise raw.fail(
            f"byte {error.start + 1} of the line is not UTF-8", fix="save the file as UTF-8"
        ) from error
    return text.removeprefix("\ufeff")


def _parse_json(text: str, raw: Record) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise raw.fail(f"not JSON ({error})", allowed="one JSON object per line") from error
    if not isinstance(value, dict):
        raise raw.fail(f"a JSON {type(value).__name__}", allowed="one JSON object per line")
    return value


def _read_parquet(block: Block) -> Iterator[Record]:
    with open_bytes(block.file) as handle:
        file = _parquet(block.file, handle)
        try:
            for row, value in _parquet_rows(file, block.start, block.stop):
                yield Record(value=value, file=block.file, number=row + 1)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{block.file}: damaged Parquet file ({error})") from error


def _parquet_rows(file: Any, start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """The rows of a range with their numbers; row groups without any are not read."""
    first = 0
    for group in range(file.metadata.num_row_groups):
        last = first + file.metadata.row_group(group).num_rows
        if first < stop and last > start:
            batches = file.iter_batches(batch_size=1024, row_groups=[group])
            values = (value for batch in batches for value in batch.to_pylist())
            for row, value in enumerate(values, start=first):
                if start <= row < stop:
                    yield row, value
        first = last


def _read_hub(block: Block, split: str) -> Iterator[Record]:
    dataset = _hub_dataset(block.file, split)
    for row in range(block.start, block.stop):
        yield Record(value=dataset[row], file=f"{block.file}[{split}]", number=row + 1)


@functools.lru_cache(maxsize=4)
def _hub_dataset(file: str, split: str) -> Any:
    """A hub dataset `hub:OWNER/NAME` or `hub:OWNER/NAME:CONFIG`, from its cache when offline."""
    import datasets

    name, _, config = file.removeprefix(HUB).partition(":")
    try:
        if Path(name, "state.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the library raises whatever its back ends raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file}: split {split!r} cannot be loaded ({reason})",
            fix="check the name, or download it first where there is a network",
        ) from error


def hub_files(file: str, split: str) -> list[str]:
    """The local files that hold a hub dataset: those of its folder, or of the library's cache."""
    folder = Path(file.removeprefix(HUB).partition(":")[0])
    if folder.is_dir():
        inside = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return [
            str(path)
            for path in inside
            if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        ]
    return [entry["filename"] for entry in _hub_dataset(file, split).cache_files]
