"""Sources that name documents by id: retrieval folders in mteb's layout, ReasonIR's hq set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.config import SourceConfig
from pipeline.data.sources.records import Record, list_files, plan_blocks, read_records
from pipeline.errors import UserError

_REFERRING = ("mteb", "reasonir_hq")
_SUFFIXES = ("jsonl", "jsonl.gz", "parquet", "tsv")

# For each query id, its judged documents as (id, score).
Judgements = dict[str, list[tuple[str, float]]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shelf:
    """What a reader looks up: the text of a document id, and the judgements of queries."""

    document: Callable[[str], str | None]
    judgements: Judgements


def refers_to_documents(source: SourceConfig) -> bool:
    """Whether the source's records hold document ids instead of texts."""
    return source.format in _REFERRING


def corpus_files(source: SourceConfig) -> list[str]:
    """The files with the documents a source refers to."""
    if source.format == "mteb":
        return folder_part(source, "corpus")
    return list_files(str(source.documents), f"sources.{source.name}.documents")


def folder_part(source: SourceConfig, part: str) -> list[str]:
    """Files of one part (corpus, queries, qrels/SPLIT) of a folder in mteb's layout."""
    if not Path(source.path).is_dir():
        raise UserError(
            f"sources.{source.name}.path: {source.path} is no folder",
            allowed="a folder with corpus, queries and qrels",
        )
    base = Path(source.path, part)
    candidates = [base.with_name(f"{base.name}.{suffix}") for suffix in _SUFFIXES]
    found = next((path for path in candidates if path.is_file()), base)
    if not found.exists():
        raise UserError(
            f"sources.{source.name}: {base} is missing",
            allowed=f"{part}.jsonl, {part}.parquet or a folder {part} with such files",
        )
    return list_files(str(found), f"sources.{source.name}.path")


def corpus_records(source: SourceConfig) -> Iterator[tuple[str, str]]:
    """(id, text) of every document a source refers to; a title precedes its text."""
    for file in corpus_files(source):
        for block in plan_blocks(file, split="train", block_bytes=2**62, max_rows=None):
            for record in read_records(block, split="train"):
                yield identifier(record), _document_text(record)


def identifier(record: Record) -> str:
    """The id of a query or document, whichever of the usual names it has."""
    for key in ("_id", "id"):
        if isinstance(record.value.get(key), str | int):
            return str(record.value[key])
    found = ", ".join(map(str, record.value))
    raise record.fail("no id", allowed="a field _id or id", fix=f"fields found: {found}")


def _document_text(record: Record) -> str:
    text = record.value.get("text", record.value.get("content"))
    title = record.value.get("title") or ""
    if not isinstance(text, str) or not isinstance(title, str):
        found = ", ".join(map(str, record.value))
        raise record.fail(
            "no text", allowed="a text in the field text or content", fix=f"fields found: {found}"
        )
    return f"{title} {text}".strip()


def read_judgements(source: SourceConfig) -> Judgements:
    """The qrels of a folder in mteb's layout; empty for other formats."""
    return _read_qrels(source) if source.format == "mteb" else {}


def _read_qrels(source: SourceConfig) -> Judgements:
    return _qrels_of(tuple(folder_part(source, f"qrels/{source.split}")))


@functools.lru_cache(maxsize=2)
def _qrels_of(files: tuple[str, ...]) -> Judgements:
    judgements: Judgements = {}
    for file in files:
        for block in plan_blocks(file, split="train", block_bytes=2**62, max_rows=None):
            for record in read_records(block, split="train"):
                judged = _judgement(record)
                if judged is not None:
                    query, document, score = judged
                    judgements.setdefault(query, []).append((document, score))
    return judgements


def _judgement(record: Record) -> tuple[str, str, float] | None:
    """(query id, document id, score) of a record; None for the header of a TSV."""
    if set(record.value) == {"text"}:  # a line of a TSV
        fields = record.value["text"].split("\t")
        if record.number == 1 and fields[-1].strip().lower() == "score":
            return None
    else:
        fields = [record.value.get(key) for key in ("query-id", "corpus-id", "score")]
    try:
        query, document, score = fields
        return str(query), str(document), float(score)
    except (ValueError, TypeError) as error:
        raise record.fail(
            "no judgement", allowed="query-id, corpus-id and score (a number)"
        ) from error
