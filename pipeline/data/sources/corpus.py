"""Read the documents and judgements that records refer to by id.

Two formats do: folders in mteb's layout (corpus, queries, qrels), and ReasonIR's hq set, whose
positives are ids of BRIGHT documents.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pipeline.config import SourceConfig
from pipeline.data.sources.containers import read_file, read_lines
from pipeline.data.sources.paths import kind_of, list_files, stem_of
from pipeline.data.sources.records import (
    BadRowError,
    BadRows,
    FileBlock,
    OnBadRow,
    Record,
    give_up,
    require_whole_characters,
    whole_characters,
)
from pipeline.errors import UserError
from pipeline.files import FileState, file_state

_FORMATS = ("mteb", "reasonir_hq")
# Folders of judgements: BEIR's name, then the names that the hub gives to it.
_JUDGEMENT_FOLDERS = ("qrels", "default", "data")

# For each query id, its judged documents as (id, score).
JudgedDocuments = dict[str, list[tuple[str, float]]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """The texts and judgements that records refer to by id.

    Attributes:
        document: returns the text of a document id.
        judgements: the judged documents of each query id.
        first_texts: for query ids that have several texts, the first of them, which counts.
    """

    document: Callable[[str], str | None]
    judgements: JudgedDocuments
    first_texts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def has_references(source: SourceConfig) -> bool:
    """Return whether the source's records hold document ids instead of texts."""
    return source.format in _FORMATS


def corpus_files(source: SourceConfig) -> list[str]:
    """Return the files with the documents that a source refers to."""
    if source.format == "mteb":
        return folder_part(source, "corpus")
    return list_files(str(source.documents), f"sources.{source.name}.documents")


def folder_part(source: SourceConfig, part: str) -> list[str]:
    """Return the files of one part (corpus or queries) of a folder in mteb's layout."""
    files = _files_of_part(_folder(source), part)
    if not files:
        raise UserError(
            f"sources.{source.name}: {_folder(source) / part} is missing",
            allowed=f"{part}.jsonl, {part}.parquet or a folder {part} with such files",
        )
    return _checked(source, files)


def split_part(source: SourceConfig, part: str, *, required: bool = True) -> list[str]:
    """Return the files of one part of a folder in mteb's layout as mteb's loader chooses them.

    A part of the hub's layout may have files for each split: then only the source's split is read,
    or documents of other splits would be found. Parts without such files hold all splits.

    Args:
        required: refuse a folder without the part; otherwise it has no files.
    """
    if not required and not _files_of_part(_folder(source), part):
        return []
    files = folder_part(source, part)
    own = [f for f in files if source.split in (stem_of(f), f.rsplit("/", 2)[-2])]
    return own or files


def judgement_files(source: SourceConfig) -> list[str]:
    """Return the files with the judgements of a split; none for formats without judgements."""
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
            f"sources.{source.name}.path: {source.path} is not a folder",
            allowed="a folder with corpus, queries and qrels",
        )
    return folder


def _files_of_part(folder: Path, part: str) -> list[Path]:
    """Return the file PART.jsonl or similar, PART-00000-of-00003 and so on, or the folder PART."""
    named = [
        path
        for path in sorted(folder.iterdir())
        if stem_of(path.name) == part and kind_of(path.name) and not path.is_dir()
    ]
    # PART itself comes before PART-00000-of-00003, and one of its forms is enough: corpus.jsonl and
    # corpus.jsonl.gz have the same content.
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
    """Yield id, text and record of every document of the corpus; a title precedes its text."""
    yield from documents_of(corpus_files(source), on_bad)


def documents_of(
    files: list[str], on_bad: OnBadRow | None = None
) -> Iterator[tuple[str, str, Record]]:
    """Yield id, text and record of every document in some files; a title precedes its text."""
    for record in _read_files(files, on_bad):
        try:
            name, text = identifier(record), _document_text(record)
            require_whole_characters(record, name, text)
        except BadRowError as bad:
            give_up(bad, on_bad)
        else:
            yield name, text, record


def _read_files(files: list[str], on_bad: OnBadRow | None) -> Iterator[Record]:
    for file in files:
        yield from read_file(file, split=None, on_bad=on_bad)


def identifier(record: Record) -> str:
    """Return the id of a query or document, under any of its usual names."""
    for key in ("_id", "id"):
        if isinstance(record.value.get(key), str | int):
            name = str(record.value[key])
            require_whole_characters(record, name)
            return name
    raise record.fail("no id", allowed="a field _id or id", fix=record.fields_found)


def _document_text(record: Record) -> str:
    text = record.value.get("text", record.value.get("content"))
    title = record.value.get("title") or ""
    if not isinstance(text, str) or not isinstance(title, str):
        raise record.fail(
            "no text", allowed="a text in the field text or content", fix=record.fields_found
        )
    return f"{title} {text}".strip()


def read_judgements(source: SourceConfig) -> JudgedDocuments:
    """Return the usable judgements of a folder in mteb's layout; none for other formats."""
    files = tuple(judgement_files(source))
    return _judgements_of(files, tuple(map(file_state, files)))


@functools.lru_cache(maxsize=2)
def _judgements_of(files: tuple[str, ...], states: tuple[FileState, ...]) -> JudgedDocuments:
    judgements: JudgedDocuments = {}
    # Bad ones are reported by `check_queries`.
    for _, query, document, score in judgement_records(files, lambda bad: None):
        judgements.setdefault(query, []).append((document, score))
    return judgements


def judgement_records(
    files: tuple[str, ...], on_bad: OnBadRow
) -> Iterator[tuple[Record, str, str, float]]:
    """Yield record, query id, document id and score of every judgement in some files."""
    for file in files:
        # Judgements in TSV may lack a header, so their first line cannot name the columns.
        is_text = kind_of(file) in ("csv", "lines")
        if is_text:
            whole = FileBlock(file=file, start=0, stop=-1)
            records = read_lines(whole, on_bad=on_bad, as_text=True)
        else:
            records = read_file(file, split=None, on_bad=on_bad)
        for record in records:
            try:
                judged = _judgement(record, is_text=is_text)
            except BadRowError as bad:
                on_bad(bad)
            else:
                if judged is not None:
                    yield record, *judged


def _judgement(record: Record, *, is_text: bool) -> tuple[str, str, float] | None:
    """Return query id, document id and score of a record; None for the header of a TSV."""
    if is_text:
        fields = record.value["text"].split("\t")
        if record.number == 1 and fields[-1].strip().lower() == "score":
            return None
    else:
        fields = [record.value.get(key) for key in ("query-id", "corpus-id", "score")]
    try:
        # Raises ValueError for any other number of fields.
        query, document, score = fields
        if query is None or document is None or not math.isfinite(float(score)):
            raise ValueError
        return str(query), str(document), float(score)
    except (ValueError, TypeError, OverflowError) as error:
        raise record.fail(
            "no judgement", allowed="query-id, corpus-id and score (a number)"
        ) from error


@dataclasses.dataclass(frozen=True, slots=True)
class QueryCheck:
    """Repeated query ids with their first text, and the number of queries without judgement."""

    first_texts: dict[str, str] = dataclasses.field(default_factory=dict)
    num_unjudged: int = 0


def check_queries(
    source: SourceConfig, find: Callable[[str], str | None], rows: BadRows
) -> QueryCheck:
    """Compare judgements with queries and corpus, and report contradictions to `rows`.

    Left out and listed: judgements of queries without text, and a query's further texts. A judged
    document that the corpus lacks is a bad row.
    """
    judgements = read_judgements(source)
    seen: set[str] = set()
    first: dict[str, str] = {}
    repeated: dict[str, str] = {}
    num_unjudged = 0
    # Other faults of a query are reported when it is read as a row.
    for record in _read_files(folder_part(source, "queries"), lambda bad: None):
        try:
            name, text = identifier(record), record.value.get("text")
        except BadRowError:
            continue
        num_unjudged += name not in judgements and name not in seen
        seen.add(name)
        if name not in judgements or not isinstance(text, str):
            continue
        # A text with half a character cannot be the one that counts: it is refused as a row.
        if name not in first and whole_characters(text) == text:
            first[name] = text
        elif first.get(name, text) != text:
            repeated[name] = first[name]
            rows.drop(record.where, "query", "another text of the same id precedes it", text)
    for record, query, document, _ in judgement_records(tuple(judgement_files(source)), rows.add):
        # Not bad rows: published sets contain such judgements, and their users cannot correct them.
        if query not in seen:
            rows.drop(record.where, "judgement", "query without text", query)
        elif find(document) is None:
            if source.on_bad_row == "drop":
                rows.drop(record.where, "judgement", "document not in the corpus", document)
            else:
                rows.add(record.fail(f"judged document {document!r} is not in the corpus"))
    return QueryCheck(repeated, num_unjudged)
