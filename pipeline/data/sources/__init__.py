"""Readers of published retrieval data, chosen by `format`: files in, rows out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from pipeline.config import SourceConfig
from pipeline.data.sources import formats
from pipeline.data.sources.corpus import (
    Shelf,
    corpus_files,
    corpus_records,
    folder_part,
    read_judgements,
    refers_to_documents,
)
from pipeline.data.sources.records import (
    HUB,
    Block,
    Record,
    file_size,
    hub_files,
    list_files,
    plan_blocks,
    read_records,
)
from pipeline.data.sources.row import Row
from pipeline.errors import UserError

_Reader = Callable[[Record, SourceConfig, Shelf | None], Iterable[Row]]

FORMATS: dict[str, _Reader] = {
    "columns": formats.read_columns,
    "e5": formats.read_e5,
    "lines": formats.read_lines,
    "mteb": formats.read_mteb,
    "msmarco_instructions": formats.read_msmarco,
    "reasonaug": formats.read_reasonaug,
    "reasonir_hq": formats.read_reasonir,
    "reasonir_vl": formats.read_reasonir,
}


def expand_sources(sources: Iterable[SourceConfig]) -> tuple[SourceConfig, ...]:
    """Check formats; an E5 folder becomes one source per set, so that caps and batches are per set.

    Raises:
        UserError: a format is unknown or lacks what it needs.
    """
    expanded = []
    for source in sources:
        if source.format not in FORMATS:
            raise UserError(
                f"sources.{source.name}.format: {source.format!r}", allowed=", ".join(FORMATS)
            )
        if source.format == "reasonir_hq" and source.documents is None:
            raise UserError(
                f"sources.{source.name}: positives of reasonir_hq are document ids",
                fix="set `documents` to the BRIGHT documents (id, content) they refer to",
            )
        files = source_files(source)
        if source.format == "e5" and len(files) > 1:
            for file in files:
                stem = file.rsplit("/", 1)[-1].split(".")[0]
                name = f"{source.name}.{stem}"
                expanded.append(dataclasses.replace(source, name=name, path=file))
        else:
            expanded.append(source)
    return tuple(expanded)


def source_files(source: SourceConfig) -> list[str]:
    """The files a source's examples are read from, in order."""
    if source.format == "mteb":
        return folder_part(source, "queries")
    return list_files(source.path, f"sources.{source.name}.path")


def input_files(source: SourceConfig) -> list[str]:
    """Every file that a source's rows depend on, also those with documents and judgements."""
    files = source_files(source)
    if refers_to_documents(source):
        files += corpus_files(source)
    if source.format == "mteb":
        files += folder_part(source, f"qrels/{source.split}")
    return files


def plan_source(source: SourceConfig, *, block_bytes: int) -> Iterator[Block]:
    """Cut a source into blocks that may be read in any order by anybody."""
    left = source.max_rows
    for file in source_files(source):
        yield from plan_blocks(file, split=source.split, block_bytes=block_bytes, max_rows=left)
        if left is not None:
            left = max(0, left - _count_rows(source, file, left))
            if left == 0:
                return


def _count_rows(source: SourceConfig, file: str, most: int) -> int:
    """Records of a file, counted up to `most`: how much of a cap it uses up."""
    count = 0
    for block in plan_blocks(file, split=source.split, block_bytes=2**62, max_rows=most):
        count += sum(1 for _ in read_records(block, split=source.split))
    return count


def read_rows(
    source: SourceConfig, block: Block, shelf: Shelf | None
) -> Iterator[tuple[Record, Row]]:
    """Rows of a block with the record each came from, filtered by `where`."""
    reader = FORMATS[source.format]
    for record in read_records(block, split=source.split):
        if all(str(record.value.get(key)) == value for key, value in source.where.items()):
            for row in reader(record, source, shelf):
                yield record, row


__all__ = [
    "FORMATS",
    "HUB",
    "Block",
    "Record",
    "Row",
    "Shelf",
    "corpus_files",
    "corpus_records",
    "expand_sources",
    "file_size",
    "hub_files",
    "input_files",
    "plan_source",
    "read_judgements",
    "read_rows",
    "refers_to_documents",
    "source_files",
]
