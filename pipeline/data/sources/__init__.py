"""Read published retrieval data: the files of a source in, rows out.

    stage        example                                                  in
    paths        data/ -> data/train-00000-of-00002.jsonl.gz, ...         paths.py
    containers   a file -> blocks -> raw records with file and line       containers.py, columnar.py
    records      {"q": "fox", "pos": ["a red animal"], "neg_1": null}     records.py
    fields       "q" is the query, "pos" the positives, "neg_*" ...       records.py, formats.py
    references   (formats with ids) "d7" -> "a red animal"                corpus.py
    rows         Row(query="fox", positives=("a red animal",))            formats.py

A fault of a file stops the build at once; a fault of a record goes to `on_bad`, so that all of them
can be reported together. A new format is a function in formats.py and an entry of `FORMATS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from pipeline.config import SourceConfig
from pipeline.data.sources import formats
from pipeline.data.sources.containers import plan_blocks, read_records
from pipeline.data.sources.corpus import (
    References,
    corpus_files,
    folder_part,
    has_references,
    judgement_files,
)
from pipeline.data.sources.paths import ChosenFiles, choose_files
from pipeline.data.sources.records import (
    BadRowError,
    FileBlock,
    OnBadRow,
    Record,
    Row,
    equals,
    field_of,
    give_up,
)
from pipeline.errors import UserError

_Parser = Callable[[Record, SourceConfig, References | None], Iterable[Row]]

FORMATS: dict[str, _Parser] = {
    "columns": formats.parse_columns,
    "e5": formats.parse_e5,
    "lines": formats.parse_lines,
    "mteb": formats.parse_mteb,
    "msmarco_instructions": formats.parse_msmarco,
    "reasonaug": formats.parse_reasonaug,
    "reasonir_hq": formats.parse_reasonir,
    "reasonir_vl": formats.parse_reasonir,
}


def expand_sources(sources: Iterable[SourceConfig]) -> tuple[SourceConfig, ...]:
    """Check formats; make one source of each set of an E5 folder, for caps and batches per set.

    Raises:
        UserError: a format is unknown, or a key that it needs is missing.
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
    """Return the files that a source's examples are read from, in order."""
    if source.format == "mteb":
        return folder_part(source, "queries")
    return _chosen_files(source).files


def source_note(source: SourceConfig) -> str:
    """Return a note on the files that are left out; empty where none are."""
    return "" if source.format == "mteb" else _chosen_files(source).note


def _chosen_files(source: SourceConfig) -> ChosenFiles:
    key = f"sources.{source.name}.path"
    return choose_files(source.path, key, split=source.split, default_split="train")


def input_files(source: SourceConfig) -> list[str]:
    """Return every file that a source's rows depend on, with documents and judgements."""
    files = source_files(source)
    if has_references(source):
        files += corpus_files(source)
    return files + judgement_files(source)


def plan_source(source: SourceConfig, *, block_bytes: int) -> Iterator[FileBlock]:
    """Cut a source into blocks, which any process may read in any order.

    Raises:
        UserError: the source is empty.
    """
    left, is_empty = source.max_rows, True
    for file in source_files(source):
        for block in plan_blocks(file, split=source.split, block_bytes=block_bytes, max_rows=left):
            is_empty = False
            yield block
        # `max_rows` counts over all files of a source, in their order.
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
    """Count records of a file up to `most`, to find how much of a cap it uses up."""
    bad: list[BadRowError] = []
    count = 0
    for block in plan_blocks(file, split=source.split, block_bytes=2**62, max_rows=most):
        count += sum(1 for _ in read_records(block, split=source.split, on_bad=bad.append))
    return count + len(bad)


def read_rows(
    source: SourceConfig,
    block: FileBlock,
    references: References | None,
    *,
    on_bad: OnBadRow | None = None,
    on_unwanted: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Record, Row]]:
    """Yield the rows of a block with the record each came from, filtered by `where`.

    Args:
        source: the source of the block.
        block: a stretch of it.
        references: the documents that its records refer to by id, if they do.
        on_bad: takes records that cannot be used; without it, the first one is raised.
        on_unwanted: called for each record that `where` leaves out.
    """
    parse = FORMATS[source.format]
    for record in read_records(block, split=source.split, on_bad=on_bad):
        rows: list[Row] = []
        try:
            found = {key: field_of(record, key, required=False) for key in source.where}
            if all(equals(found[key], wanted) for key, wanted in source.where.items()):
                rows = list(parse(record, source, references))
            else:
                on_unwanted()
            # Here, because JSON can write half a surrogate pair that no tokenizer accepts.
            for row in rows:
                _require_whole_characters(record, row)
        except BadRowError as bad:
            give_up(bad, on_bad)
        else:
            for row in rows:
                yield record, row


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
