"""Clean rows, resolve document ids, and keep each document text once.

lookup   store_corpus     documents of a source that are named by id: a table and an index
collect  collect_block    rows of a block, their documents as hashes; texts sorted into slices
check    check_rows       all bad rows of all blocks, refused together
dedup    dedup_slice      distinct documents of a slice, and the block that holds each text
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import PrepareConfig, SourceConfig
from pipeline.data.prepare.build import (
    CORPUS_SCHEMA,
    DISTINCT_SCHEMA,
    ROW_SCHEMA,
    TEXT_SCHEMA,
    Build,
    CollectSummary,
    DedupSummary,
    LookupSummary,
    TextHashes,
    count_dropped,
    write_dropped,
)
from pipeline.data.prepare.contamination import ContaminationIndex, Match
from pipeline.data.prepare.fields import FieldsFound, refuse_absent_fields
from pipeline.data.shards import map_batch, write_table
from pipeline.data.sources import read_rows
from pipeline.data.sources.corpus import (
    QueryCheck,
    References,
    check_queries,
    corpus_records,
    has_references,
    read_judgements,
)
from pipeline.data.sources.records import (
    BadRowError,
    BadRows,
    Record,
    Row,
    refuse_bad_rows,
    stable_hash,
)
from pipeline.files import (
    FileState,
    file_state,
    save_array,
    table_writer,
    write_json,
    write_text,
)
from pipeline.tokenizer import instruction_characters

# Rows of a record batch of the corpus: the index refers to (batch, row).
_CORPUS_BATCH = 1024


def store_corpus(build: Build, task: int) -> None:
    """Write the documents that a source refers to as one table, and an index of their ids.

    Raises:
        UserError: a document, or a judgement of one, cannot be used.
    """
    source = build.plan.sources[task]
    rows = BadRows(source)
    num_documents, check = 0, QueryCheck()
    # Other sources hold the texts of their documents in each row.
    if has_references(source):
        keys = _write_corpus(build, task, corpus_records(source, rows.add))
        num_documents = len(keys)
        corpus = _open_corpus(build, task)
        # Ids that occur twice are rare: only then is the corpus read again to list them.
        if len(np.unique(keys)) < len(keys):
            _report_repeated(corpus_records(source, lambda bad: None), corpus.find, rows)
        if source.format == "mteb":
            check = check_queries(source, corpus.find, rows)
    refuse_bad_rows(source.name, [rows.summary], 0)
    write_dropped(build, "lookup", task, rows.dropped)
    build.write_summary(
        task,
        LookupSummary(
            documents=num_documents,
            first_texts=check.first_texts,
            unjudged=check.num_unjudged,
            dropped=count_dropped(rows.dropped),
        ),
    )


def _write_corpus(
    build: Build, task: int, records: Iterator[tuple[str, str, Record]]
) -> NDArray[np.int64]:
    """Write table and index; return the hashes of the ids."""
    parts: list[NDArray[np.int64]] = []
    pairs = ((name, text) for name, text, _ in records)
    with table_writer(build.corpus(task), CORPUS_SCHEMA) as writer:
        while rows := list(itertools.islice(pairs, _CORPUS_BATCH)):
            # Eight bytes for each id, because the ids of a large corpus would not fit in a worker's
            # memory.
            parts.append(np.array([stable_hash(name) for name, _ in rows], dtype=np.int64))
            columns = [list(part) for part in zip(*rows, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=CORPUS_SCHEMA))
    keys = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    # Stable: of two documents with one id the earlier is found first.
    order = np.argsort(keys, kind="stable")
    save_array(build.corpus_index(task), np.stack([keys[order], order]))
    return keys


def _report_repeated(
    records: Iterator[tuple[str, str, Record]], find: Callable[[str], str | None], rows: BadRows
) -> None:
    """List the documents whose id an earlier document with another text has."""
    for name, text, record in records:
        # An exact repetition is harmless.
        if find(name) != text:
            rows.drop(record.where, "document", "another text of the same id precedes it", text)


class _Corpus:
    """The documents that `store_corpus` wrote, memory-mapped."""

    def __init__(self, path: Path, index: Path) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        # Documents that a query is judged on are often neighbours: their batch is decoded once.
        self._batch = functools.lru_cache(maxsize=64)(self._reader.get_batch)
        self._keys, self._rows = np.load(index, mmap_mode="r")

    def find(self, name: str) -> str | None:
        """Return the text of a document id."""
        key = stable_hash(name)
        # The first entry of this hash; others follow it.
        entry = int(np.searchsorted(self._keys, key))
        # Two ids may have the same hash.
        while entry < len(self._keys) and self._keys[entry] == key:
            batch, row = divmod(int(self._rows[entry]), _CORPUS_BATCH)
            columns = self._batch(batch)
            if columns["id"][row].as_py() == name:
                text: str = columns["text"][row].as_py()
                return text
            entry += 1
        return None


# Kept open, because a worker's tasks are mostly blocks of one source.
@functools.lru_cache(maxsize=4)
def _map_corpus(path: Path, index: Path, state: FileState) -> _Corpus:
    return _Corpus(path, index)


def _open_corpus(build: Build, number: int) -> _Corpus:
    """Return the documents that a source refers to by id."""
    path = build.corpus(number)
    return _map_corpus(path, build.corpus_index(number), file_state(path))


def _open_references(build: Build, number: int) -> References | None:
    """Return the documents that records of a source refer to by id; None for other sources."""
    source = build.plan.sources[number]
    if not has_references(source):
        return None
    return References(
        document=_open_corpus(build, number).find,
        judgements=read_judgements(source),
        first_texts=build.read_summary(LookupSummary, number).first_texts,
    )


# A source with more instructions than this has one for each query: they cannot name groups.
MAX_INSTRUCTIONS = 1024
# If so many rows at the start of a block are all bad, the config is wrong: the rest is not read.
_HOPELESS = 100


def collect_block(build: Build, task: int) -> None:
    """Read one block; write its rows, and its distinct documents sorted into slices."""
    planned = build.plan.blocks[task]
    source = build.plan.sources[planned.source]
    # Opened by each task: the index is memory-mapped, and the workers of a host share its pages.
    contamination = None
    if build.config.decontaminate is not None:
        contamination = ContaminationIndex(build.config.decontaminate, build.contamination)
    bad = BadRows(source)
    collector = _Collector(source, build.config, contamination, bad, FieldsFound(source))
    for record, row in read_rows(
        source,
        planned.block,
        _open_references(build, planned.source),
        on_bad=collector.add_bad,
        on_unwanted=collector.count_unwanted,
    ):
        collector.add(record, row)
    write_table(build.rows(task), pa.Table.from_pylist(collector.rows, schema=ROW_SCHEMA))
    _write_block_texts(build, task, collector.documents)
    if build.config.holdout is not None:
        held_out = (json.dumps(row, ensure_ascii=False) + "\n" for row in collector.held_out)
        write_text(build.held_out(task), "".join(held_out))
    dropped = [*bad.dropped, *collector.dropped]
    write_dropped(build, "collect", task, dropped)
    instructions = {str(row["instruction"]) for row in collector.rows}
    build.write_summary(
        task,
        CollectSummary(
            read=collector.num_read,
            unwanted=collector.num_unwanted,
            dropped=count_dropped(dropped),
            has_scores=any(row["scores"] for row in collector.rows),
            # Cut, because a source with one instruction for each query would fill the summary with
            # them.
            instructions=sorted(instructions)[: MAX_INSTRUCTIONS + 1],
            held_out=len(collector.held_out),
            absent=sorted(collector.fields.absent),
            fields=collector.fields.first,
            **dataclasses.asdict(bad.summary),
        ),
    )


class TemplatedText(NamedTuple):
    """A text inside its template, and the characters at both ends that are not the text."""

    text: str
    prefix: int  # characters of the instruction
    suffix: int  # characters behind the text


@dataclasses.dataclass(slots=True)
class _Collector:
    """Rows and distinct documents of one block, and everything dropped from it."""

    source: SourceConfig
    config: PrepareConfig
    contamination: ContaminationIndex | None
    bad: BadRows
    fields: FieldsFound
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    held_out: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    documents: dict[bytes, TemplatedText] = dataclasses.field(default_factory=dict)
    matches: dict[tuple[bytes, bool], Match | None] = dataclasses.field(default_factory=dict)
    dropped: list[dict[str, str]] = dataclasses.field(default_factory=list)
    num_read: int = 0
    num_unwanted: int = 0

    def count_unwanted(self) -> None:
        """Count a record that `where` leaves out."""
        self.num_unwanted += 1

    def add(self, record: Record, row: Row) -> None:
        """Clean one row's documents, and keep the row or list why it is dropped."""
        self.fields.add(record)
        self.num_read += 1
        if self.bad.count:
            return  # the build will stop; only further bad rows matter
        # Positives first: a negative that equals one of them is dropped.
        positives = self._clean(record, "positive", row, row.positives, ())
        negatives = self._clean(record, "negative", row, row.negatives, positives)
        num_held_out = sum(self._is_held_out(row.positives[k]) for k in positives.values())
        # Those of a held-out row stay: they join the corpus that its task searches.
        if positives and not num_held_out:
            negatives = self._without_held_out(record, row, negatives)
        # After cleaning, so that dropped negatives are replaced by later ones.
        if self.source.max_negatives is not None:
            negatives = dict(list(negatives.items())[: self.source.max_negatives])
        # Without its template: an evaluation asks the same question under another instruction.
        match = self._match(hash_text(row.query), row.query, is_query=True)
        if not row.query.strip():
            self._drop(record, "query", "empty", row.query)
        elif match is not None:
            self._drop(record, "query", "in an evaluation set", row.query, match)
        elif not positives:
            self._drop(record, "query", "no positive left", row.query)
        elif self.source.require_negatives and not negatives:
            self._drop(record, "query", "no hard negative", row.query)
        elif num_held_out == len(positives):
            self._hold_out(row, positives, negatives)
        elif num_held_out:
            self._drop(record, "query", "only some of its positives are held out", row.query)
        else:
            self._keep(row, positives, negatives)

    def add_bad(self, bad: BadRowError) -> None:
        """Take a row that cannot be used.

        Raises:
            UserError: none of the block's first rows can be used, so the config is wrong.
        """
        self.num_read += 1
        self.bad.add(bad)
        if self.bad.count == self.num_read == _HOPELESS:
            refuse_bad_rows(self.source.name, [self.bad.summary], self.num_read)

    def _clean(
        self,
        record: Record,
        kind: str,
        row: Row,
        texts: tuple[str, ...],
        taken: Container[bytes],
    ) -> dict[bytes, int]:
        """Return hash and index of each text worth keeping; a repeated text is kept once."""
        kept: dict[bytes, int] = {}
        for index, text in enumerate(texts):
            # Documents are distinct with their template: the same text under two instructions is
            # two documents, with different tokens.
            key = hash_text(self.config.template.format_document(text, row.document_instruction))
            if not text.strip():
                self._drop(record, kind, "empty", text)
            elif key in taken:
                self._drop(record, kind, "equals a positive", text)
            elif (match := self._match(key, text, is_query=False)) is not None:
                self._drop(record, kind, "in an evaluation set", text, match)
            else:
                # The first occurrence keeps its place, and with it its score.
                kept.setdefault(key, index)
        return kept

    def _is_held_out(self, text: str) -> bool:
        if self.config.holdout is None:
            return False
        # Without case and spacing: copies of a document go the same way. Hashes have 63 bits.
        words = " ".join(text.casefold().split())
        return stable_hash("holdout", words) < self.config.holdout * 2**63

    def _without_held_out(
        self, record: Record, row: Row, negatives: dict[bytes, int]
    ) -> dict[bytes, int]:
        """Drop held-out documents from the negatives of a row that is trained on."""
        kept = {}
        for key, index in negatives.items():
            if self._is_held_out(row.negatives[index]):
                self._drop(record, "negative", "held out", row.negatives[index])
            else:
                kept[key] = index
        return kept

    def _hold_out(self, row: Row, positives: dict[bytes, int], negatives: dict[bytes, int]) -> None:
        def documents(texts: tuple[str, ...], kept: dict[bytes, int]) -> list[str]:
            template, instruction = self.config.template, row.document_instruction
            return [template.format_document(texts[index], instruction) for index in kept.values()]

        self.held_out.append(
            {
                "query": row.query,
                "instruction": row.instruction,
                "positives": documents(row.positives, positives),
                "negatives": documents(row.negatives, negatives),
            }
        )

    def _match(self, key: bytes, text: str, *, is_query: bool) -> Match | None:
        """Search for a text of this key in the evaluation sets, once in a block."""
        if self.contamination is None:
            return None
        # Popular documents recur in many rows; comparing one with the index takes long.
        if (key, is_query) not in self.matches:
            self.matches[key, is_query] = self.contamination.find(text, is_query=is_query)
        return self.matches[key, is_query]

    def _drop(
        self, record: Record, kind: str, reason: str, text: str, match: Match | None = None
    ) -> None:
        entry = {
            "source": self.source.name,
            "where": record.where,
            "dropped": kind,
            "reason": reason,
            "text": text,
        }
        if match is not None:
            entry |= {"detail": match.reason, "found in": match.where}
        self.dropped.append(entry)

    def _keep(self, row: Row, positives: dict[bytes, int], negatives: dict[bytes, int]) -> None:
        template, instruction = self.config.template, row.document_instruction
        # In characters, because only the tokenizer knows in which token they end.
        prefix = instruction_characters(template.document_prefix(instruction))
        suffix = len(template.document_suffix(instruction))
        for keys, texts in ((positives, row.positives), (negatives, row.negatives)):
            for key, index in keys.items():
                text = template.format_document(texts[index], instruction)
                self.documents.setdefault(key, TemplatedText(text, prefix, suffix))
        # Scores list the positives, then the negatives, of the row as it was read.
        scored = [*positives.values(), *(len(row.positives) + k for k in negatives.values())]
        # How many of the preferred negatives survived; they are still the first.
        num_first = sum(index < row.num_first_negatives for index in negatives.values())
        self.rows.append(
            {
                "query": template.format_query(row.query, row.instruction),
                "prefix": instruction_characters(template.query_prefix(row.instruction)),
                "suffix": len(template.query_suffix()),
                "query_key": stable_hash(row.query),
                "instruction": row.instruction,
                "concept": stable_hash(self.source.name, row.concept) if row.concept else -1,
                "positives": list(positives),
                "negatives": list(negatives),
                "num_first_negatives": num_first,
                "scores": [row.scores[index] for index in scored] if row.scores else [],
            }
        )


def hash_text(text: str) -> bytes:
    """Return the 16 bytes that identify a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _write_block_texts(build: Build, task: int, documents: dict[bytes, TemplatedText]) -> None:
    """Write one record batch per slice, so that a slice's task reads only its own part."""
    # numpy drops the zero bytes at the ends of these; `hashes_to_arrow` restores them.
    hashes = np.array(list(documents), dtype="S16")
    texts = list(documents.values())
    order = np.argsort(hashes, kind="stable")
    # Slices follow the order of the hashes, so that each of them is a run of `order`.
    slices = build.slice_of(hashes[order])
    ends = np.searchsorted(slices, np.arange(build.plan.num_slices), side="right")
    with table_writer(build.block_texts(task), TEXT_SCHEMA) as writer:
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            rows = order[start:end]
            chosen = [texts[row] for row in rows.tolist()]
            columns = [
                hashes_to_arrow(hashes[rows]),
                pa.array([entry.text for entry in chosen], pa.large_string()),
                pa.array([entry.prefix for entry in chosen], pa.int32()),
                pa.array([entry.suffix for entry in chosen], pa.int32()),
            ]
            writer.write_batch(pa.record_batch(columns, schema=TEXT_SCHEMA))


def check_rows(build: Build, task: int) -> None:
    """Refuse all bad rows of all files of a source at once.

    Raises:
        UserError: a source has bad rows and its `on_bad_row` is `stop`.
    """
    # A step of its own, after all blocks were read: the user sees the faults of all files at once.
    for number, source in enumerate(build.plan.sources):
        found = [build.read_summary(CollectSummary, block) for block in build.blocks_of(number)]
        refuse_bad_rows(source.name, found, sum(summary.read for summary in found))
        refuse_absent_fields(source, found)
    write_json(build.summary_path("check", task), {})


def dedup_slice(build: Build, task: int) -> None:
    """Find the distinct documents of a slice: sorted hashes, and the block each is taken from."""
    parts = [
        hashes_from_arrow(_read_block_slice(build, block, task).column("hash"))
        for block in range(len(build.plan.blocks))
    ]
    hashes = np.concatenate(parts)
    blocks = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    rows = np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts])
    # `return_index` gives the first occurrence, in the order of the blocks: which text is kept
    # depends on no worker.
    unique, first = np.unique(hashes, return_index=True)
    columns = [hashes_to_arrow(unique), blocks[first], rows[first]]
    write_table(build.distinct(task), pa.table(columns, schema=DISTINCT_SCHEMA))
    build.write_summary(task, DedupSummary(found=len(hashes)))


def _read_block_slice(build: Build, block: int, number: int) -> pa.RecordBatch:
    """Return the documents of slice `number` that one block holds."""
    # The batch keeps its mapped pages after the file is closed.
    with pa.memory_map(str(build.block_texts(block))) as source:
        return pa.ipc.open_file(source).get_batch(number)


def read_distinct_texts(
    build: Build, number: int, wanted: NDArray[np.int64] | None
) -> list[TemplatedText]:
    """Return a slice's distinct documents in the order of their hashes.

    Args:
        number: the slice.
        wanted: positions in the slice; None for all.
    """
    distinct = map_batch(build.distinct(number))
    blocks, rows = distinct.column("block").to_numpy(), distinct.column("row").to_numpy()
    if wanted is not None:
        blocks, rows = blocks[wanted], rows[wanted]
    # Block by block: one block's part of the slice is in memory at a time.
    found: dict[int, TemplatedText] = {}
    for block in np.unique(blocks).tolist():
        positions = np.flatnonzero(blocks == block)
        batch = _read_block_slice(build, block, number).take(pa.array(rows[positions]))
        columns = (batch.column(name).to_pylist() for name in TemplatedText._fields)
        found |= zip(positions.tolist(), map(TemplatedText, *columns), strict=True)
    return [found[position] for position in range(len(rows))]


def hashes_to_arrow(hashes: TextHashes) -> pa.Array:
    """Return 16-byte hashes as an Arrow array, with the zero bytes at their ends."""
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(hashes), [None, pa.py_buffer(hashes.astype("S16").tobytes())]
    )


def hashes_from_arrow(array: pa.Array) -> TextHashes:
    """Return an Arrow binary(16) array as numpy strings of 16 bytes."""
    # The buffer is that of the whole column, of which the array may be a slice.
    raw = np.frombuffer(array.buffers()[1] or b"", dtype="S16")
    return raw[array.offset : array.offset + len(array)]
