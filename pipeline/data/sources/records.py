"""Raw records of any container: lines, tables of text, Parquet, Arrow, hub datasets, any URL."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.data.sources.blocks import BadRowError, Block, OnBadRow, Record
from pipeline.data.sources.delimited import plan_delimited, read_delimited
from pipeline.data.sources.files import (
    HUB,
    READABLE,
    counts_rows,
    file_size,
    is_packed,
    kind_of,
    list_files,
)
from pipeline.data.sources.lines import plan_lines, read_lines
from pipeline.data.sources.tables import hub_files, is_single_dataset, plan_table, read_table
from pipeline.errors import UserError

__all__ = [
    "HUB",
    "BadRowError",
    "Block",
    "OnBadRow",
    "Record",
    "block_bytes_of",
    "file_size",
    "hub_files",
    "list_files",
    "plan_blocks",
    "read_records",
    "split_to_read",
]


def plan_blocks(
    file: str, *, split: str | None, block_bytes: int, max_rows: int | None
) -> Iterator[Block]:
    """Cut one file into blocks of about `block_bytes`, up to `max_rows` records."""
    if counts_rows(file):
        yield from plan_table(file, split=split, block_bytes=block_bytes, max_rows=max_rows)
    elif not kind_of(file):
        raise UserError(f"{file}: unknown kind of file", allowed=READABLE)
    elif is_packed(file):
        yield Block(file=file, start=0, stop=-1, max_rows=max_rows)
    elif kind_of(file) == "csv":
        yield from plan_delimited(file, block_bytes=block_bytes, max_rows=max_rows)
    else:
        yield from plan_lines(file, block_bytes=block_bytes, max_rows=max_rows)


def read_records(
    block: Block,
    *,
    split: str | None,
    on_bad: OnBadRow | None = None,
    blank_lines: bool = False,
) -> Iterator[Record]:
    """The records of a block, in file order.

    Args:
        block: the stretch to read.
        split: of a hub dataset; None for its default.
        on_bad: takes what holds no record, such as a line that is not JSON; without it, the first
            such line is raised as a `BadRowError`.
        blank_lines: also yield the blank lines of files of lines; see `read_lines`.
    """
    if counts_rows(block.file):
        return read_table(block, split=split)
    if kind_of(block.file) == "csv":
        return read_delimited(block, on_bad=on_bad)
    return read_lines(block, on_bad=on_bad, blank_lines=blank_lines)


def split_to_read(file: str, split: str | None, *, default: str) -> str | None:
    """Return the split of a hub dataset that is meant; a single saved dataset has no default."""
    return split or (None if is_single_dataset(file) else default)


def block_bytes_of(block: Block) -> int:
    """Estimate of the bytes of text in a block; a row of a table is taken for a kilobyte."""
    if block.stop < 0:
        return 4 * file_size(block.file)
    return (block.stop - block.start) * (1024 if counts_rows(block.file) else 1)
