"""Sources that name documents by id: retrieval folders in mteb's layout, ReasonIR's hq set."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pipeline.config import SourceConfig
from pipeline.data.sources.containers import plan_blocks, read_lines, read_records
from pipeline.data.sources.files import kind_of, list_files, stem_of
from pipeline.data.sources.records import BadRowError, BadRows, Block, OnBadRow, Record, give_up
from pipeline.errors import UserError

_REFERRING = ("mteb", "reasonir_hq")
# Where judgements are: BEIR's folder, then the names that the hub gives to it.
_JUDGEMENT_FOLDERS = ("qrels", "default", "data")

# For each query id, its judged documents as (id, score).
Judgements = dict[str, list[tuple[str, float]]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shelf:
    """What a reader looks up.

    Attributes:
        document: the text of a document id.
        judgements: the judged documents of each query id.
        first_texts: of query ids that have several texts, the one that counts.
    """

    document: Callable[[str], str | None]
    judgements: Judgements
    first_texts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def refers_to_documents(source: SourceConfig) -> bool:
    """Whether the source's records hold document ids instead of texts."""
    return source.format in _REFERRING


def corpus_files(source: SourceConfig) -> list[str]:
    """The files with the documents a source refers to."""
    if source.format == "mteb":
        return folder_part(source, "corpus")
    return list_files(str(source.documents), f"sources.{source.name}.documents")


def folder_part(source: SourceConfig, part: str) -> list[str]:
    """Files of one part (corpus or queries) of a folder in mteb's layout."""
    folder = _folder(source)
    files = _files_of_part(folder, part)
    if not files:
        raise UserError(
            f"sources.{source.name}: {folder / part} is missing",
            allowed=f"{part}.jsonl, {part}.parquet or a folder {part} with such files",
        )
    return _checked(source, files)


def judgement_files(source: SourceConfig) -> list[str]:
    """Files with the judgements of a split; none for formats that have no judgements."""
    if source.format != "mteb":
        return []
    folder, split = _folder(source), source.split or "train"
    for name in _JUDGEMENT_FOLDERS:
        if (folder / name).is_dir() and (files := _files_of_part(folder / name, split)):
            return _checked(source, files)
    found = {
        stem_of(path.name)
        for name in _JUDGEMENT_FOLDERS
        if (folder / name).is_dir()
        for path in (folder / name).iterdir()
        if path.is_dir() or kind_of(path.name)
    }
    raise UserError(
        f"sources.{source.name}: {folder / 'qrels' / split} is missing",
        allowed=f"{split}.tsv, {split}.jsonl, {split}.parquet or a folder {split} with such files",
        fix=f"set `split`; there are judgements of {', '.join(sorted(found))}" if found else "",
    )


def _folder(source: SourceConfig) -> Path:
    folder = Path(source.path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"sources.{source.name}.path: {source.path} is no folder",
            allowed="a folder with corpus, queries and qrels",
        )
    return folder


def _files_of_part(folder: Path, part: str) -> list[Path]:
    """The file PART.jsonl or the like, the files PART-00000-of-00003, or the folder PART."""
    named = [
        path
        for path in sorted(folder.iterdir())
        if stem_of(path.name) == part and kind_of(path.name) and not path.is_dir()
    ]
    # One file in two forms, such as corpus.jsonl and corpus.jsonl.gz, is read once.
    single = [path for path in named if path.name.split(".")[0] == part]
    if single or named:
        return single[:1] or named
    return [folder / part] if (folder / part).is_dir() else []


def _checked(source: SourceConfig, files: list[Path]) -> list[str]:
    key = f"sources.{source.name}.path"
    return [file for path in files for file in list_files(str(path), key)]


def corpus_records(
    source: SourceConfig, on_bad: OnBadRow | None = None
) -> Iterator[tuple[str, str, Record]]:
    """Id, text and record of every document a source refers to; a title precedes its text."""
    for record in _records(corpus_files(source), on_bad):
        try:
            name, text = identifier(record), _document_text(record)
        except BadRowError as bad:
            give_up(bad, on_bad)
        else:
            yield name, text, record


def _records(files: list[str], on_bad: OnBadRow | None) -> Iterator[Record]:
    for file in files:
        for block in plan_blocks(file, split=None, block_bytes=2**62, max_rows=None):
            yield from read_records(block, split=None, on_bad=on_bad)


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
    """The judgements of a folder in mteb's layout that can be used; empty for other formats."""
    return _judgements_of(tuple(judgement_files(source)))


@functools.lru_cache(maxsize=2)
def _judgements_of(files: tuple[str, ...]) -> Judgements:
    judgements: Judgements = {}
    for _, query, document, score in judgement_records(files, lambda bad: None):
        judgements.setdefault(query, []).append((document, score))
    return judgements


def judgement_records(
    files: tuple[str, ...], on_bad: OnBadRow
) -> Iterator[tuple[Record, str, str, float]]:
    """Record, query id, document id and score of every judgement in some files."""
    for file in files:
        # A TSV of judgements need not have a header.
        is_text = kind_of(file) in ("csv", "lines")
        whole = Block(file=file, start=0, stop=-1)
        records = (
            read_lines(whole, on_bad=on_bad, as_text=True) if is_text else _records([file], on_bad)
        )
        for record in records:
            try:
                judged = _judgement(record, is_text=is_text)
            except BadRowError as bad:
                on_bad(bad)
            else:
                if judged is not None:
                    yield record, *judged


def _judgement(record: Record, *, is_text: bool) -> tuple[str, str, float] | None:
    """(query id, document id, score) of a record; None for the header of a TSV."""
    if is_text:
        fields = record.value["text"].split("\t")
        if record.number == 1 and fields[-1].strip().lower() == "score":
            return None
    else:
        fields = [record.value.get(key) for key in ("query-id", "corpus-id", "score")]
    try:
        query, document, score = fields
        if query is None or document is None or not math.isfinite(float(score)):
            raise ValueError
        return str(query), str(document), float(score)
    except (ValueError, TypeError, OverflowError) as error:
        raise record.fail(
            "no judgement", allowed="query-id, corpus-id and score (a number)"
        ) from error


@dataclasses.dataclass(frozen=True, slots=True)
class Survey:
    """What is known of the queries of a folder in mteb's layout before any block is read."""

    first_texts: dict[str, str]
    num_unjudged: int


def survey_queries(
    source: SourceConfig, find: Callable[[str], str | None], rows: BadRows
) -> Survey:
    """Compare judgements with queries and corpus, and report to `rows` what does not fit.

    Left out and listed: judgements of queries without text, and a query's further texts. A judged
    document that the corpus lacks is a bad row.
    """
    judgements = read_judgements(source)
    seen: set[str] = set()
    first: dict[str, str] = {}
    repeated: dict[str, str] = {}
    num_unjudged = 0
    # What is wrong with a query by itself is reported where it is read.
    for record in _records(folder_part(source, "queries"), lambda bad: None):
        try:
            name, text = identifier(record), record.value.get("text")
        except BadRowError:
            continue
        num_unjudged += name not in judgements
        seen.add(name)
        if name in judgements and isinstance(text, str) and first.setdefault(name, text) != text:
            repeated[name] = first[name]
            rows.drop(record.where, "query", "another text of the same id precedes it", text)
    for record, query, document, _ in judgement_records(tuple(judgement_files(source)), rows.add):
        if query not in seen:
            rows.drop(record.where, "judgement", "query without text", query)
        elif find(document) is None:
            if source.on_bad_row == "drop":
                rows.drop(record.where, "judgement", "document not in the corpus", document)
            else:
                rows.add(record.fail(f"judged document {document!r} is not in the corpus"))
    return Survey(repeated, num_unjudged)
