"""Readers of published retrieval data, chosen by `format`: files in, rows out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from pipeline.config import SourceConfig
from pipeline.data.sources import formats
from pipeline.data.sources.containers import (
    block_bytes_of,
    plan_blocks,
    read_records,
    split_to_read,
)
from pipeline.data.sources.corpus import (
    Shelf,
    corpus_files,
    corpus_records,
    folder_part,
    judgement_files,
    read_judgements,
    refers_to_documents,
    survey_queries,
)
from pipeline.data.sources.files import HUB, Choice, choose_files, file_size
from pipeline.data.sources.formats import read_columns
from pipeline.data.sources.records import (
    EXCERPT,
    BadRowError,
    BadRows,
    Block,
    OnBadRow,
    Record,
    Row,
    equals,
    field_of,
    give_up,
    refuse_bad_rows,
)
from pipeline.data.sources.tables import hub_files
from pipeline.errors import UserError

_Reader = Callable[[Record, SourceConfig, Shelf | None], Iterable[Row]]

FORMATS: dict[str, _Reader] = {
    "columns": read_columns,
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
    return _chosen_files(source).files


def source_note(source: SourceConfig) -> str:
    """What to tell about files that are left out; empty where none are."""
    return "" if source.format == "mteb" else _chosen_files(source).note


def _chosen_files(source: SourceConfig) -> Choice:
    key = f"sources.{source.name}.path"
    return choose_files(source.path, key, split=source.split, default_split="train")


def input_files(source: SourceConfig) -> list[str]:
    """Every file that a source's rows depend on, also those with documents and judgements."""
    files = source_files(source)
    if refers_to_documents(source):
        files += corpus_files(source)
    return files + judgement_files(source)


def plan_source(source: SourceConfig, *, block_bytes: int) -> Iterator[Block]:
    """Cut a source into blocks that may be read in any order by anybody.

    Raises:
        UserError: there is nothing in it.
    """
    left, is_empty = source.max_rows, True
    for file in source_files(source):
        for block in plan_blocks(file, split=source.split, block_bytes=block_bytes, max_rows=left):
            is_empty = False
            yield block
        if left is not None:
            left = max(0, left - _count_rows(source, file, left))
            if left == 0:
                return
    if is_empty:
        raise UserError(
            f"sources.{source.name}: {source.path} holds no rows",
            fix="give another path, or leave this source out",
        )


def _count_rows(source: SourceConfig, file: str, most: int) -> int:
    """Records of a file, counted up to `most`: how much of a cap it uses up."""
    bad: list[BadRowError] = []
    count = 0
    for block in plan_blocks(file, split=source.split, block_bytes=2**62, max_rows=most):
        count += sum(1 for _ in read_records(block, split=source.split, on_bad=bad.append))
    return count + len(bad)


def read_rows(
    source: SourceConfig,
    block: Block,
    shelf: Shelf | None,
    *,
    on_bad: OnBadRow | None = None,
    on_unwanted: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Record, Row]]:
    """Rows of a block with the record each came from, filtered by `where`.

    Args:
        source: whose rows they are.
        block: a stretch of it.
        shelf: the documents it refers to, where it does.
        on_bad: takes records that cannot be used; without it, the first one is raised.
        on_unwanted: called for each record that `where` leaves out.
    """
    reader = FORMATS[source.format]
    for record in read_records(block, split=source.split, on_bad=on_bad):
        rows: list[Row] = []
        try:
            if _is_wanted(record, source):
                rows = list(reader(record, source, shelf))
            else:
                on_unwanted()
            for row in rows:
                _require_whole_characters(record, row)
        except BadRowError as bad:
            give_up(bad, on_bad)
        else:
            for row in rows:
                yield record, row


def _is_wanted(record: Record, source: SourceConfig) -> bool:
    return all(
        equals(field_of(record, key, required=False), wanted)
        for key, wanted in source.where.items()
    )


def _require_whole_characters(record: Record, row: Row) -> None:
    texts = (row.query, row.instruction, row.document_instruction, row.concept)
    for text in (*texts, *row.positives, *row.negatives):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise record.fail(
                f"a text with half a surrogate pair ({text[error.start]!r})",
                fix="repair the character in the source",
            ) from error


__all__ = [
    "EXCERPT",
    "FORMATS",
    "HUB",
    "BadRowError",
    "BadRows",
    "Block",
    "Record",
    "Row",
    "Shelf",
    "block_bytes_of",
    "corpus_files",
    "corpus_records",
    "expand_sources",
    "file_size",
    "hub_files",
    "input_files",
    "judgement_files",
    "plan_source",
    "read_judgements",
    "read_rows",
    "refers_to_documents",
    "refuse_bad_rows",
    "source_files",
    "source_note",
    "split_to_read",
    "survey_queries",
]
