"""Clean rows, resolve document ids, and keep each document text once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.config import SourceConfig, Template
from pipeline.data.batch import IntArray
from pipeline.data.prepare.contamination import ContaminationIndex, Match
from pipeline.data.prepare.plan import Build, Hashes, count_dropped, write_dropped
from pipeline.data.shards import map_batch, write_table
from pipeline.data.sources import read_rows
from pipeline.data.sources.corpus import (
    Shelf,
    corpus_records,
    read_judgements,
    refers_to_documents,
    survey_queries,
)
from pipeline.data.sources.records import (
    EXCERPT,
    BadRowError,
    BadRows,
    Record,
    Row,
    refuse_bad_rows,
    stable_hash,
)
from pipeline.files import atomic_path, write_json
from pipeline.tokenizer import instruction_characters

_SCHEMA = pa.schema([("id", pa.large_string()), ("text", pa.large_string())])
_ROWS_PER_BATCH = 1024


def shelve_documents(build: Build, task: int) -> None:
    """Write the documents a source refers to as one table, and an index of their ids.

    Raises:
        UserError: a document, or a judgement of one, cannot be used.
    """
    source = build.plan.sources[task]
    rows = BadRows(source)
    result: dict[str, Any] = {"documents": 0, "first_texts": {}, "unjudged": 0}
    if refers_to_documents(source):
        keys = _write_shelf(build, task, corpus_records(source, rows.add))
        documents = _open_documents(
            build.beside("lookup", task, "documents"), build.beside("lookup", task, "index")
        )
        result["documents"] = len(keys)
        if len(np.unique(keys)) < len(keys):
            _report_repeated(corpus_records(source, lambda bad: None), documents.find, rows)
        if source.format == "mteb":
            survey = survey_queries(source, documents.find, rows)
            result |= {"first_texts": survey.first_texts, "unjudged": survey.num_unjudged}
    refuse_bad_rows(source.name, [rows.summary], 0)
    write_dropped(build, "lookup", task, rows.dropped)
    write_json(build.output("lookup", task), result | {"dropped": count_dropped(rows.dropped)})


def _write_shelf(build: Build, task: int, records: Iterator[tuple[str, str, Record]]) -> IntArray:
    """Write table and index; returns the hashes of the ids."""
    parts: list[IntArray] = []
    path = build.beside("lookup", task, "documents")
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, _SCHEMA) as writer,
    ):
        for rows in _batches((name, text) for name, text, _ in records):
            parts.append(np.array([stable_hash(name) for name, _ in rows], dtype=np.int64))
            columns = [list(part) for part in zip(*rows, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    keys = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    index = build.beside("lookup", task, "index")
    with atomic_path(index) as temporary, temporary.open("wb") as handle:
        np.save(handle, np.stack([keys[order], order]))
    return keys


def _report_repeated(
    records: Iterator[tuple[str, str, Record]], find: Callable[[str], str | None], rows: BadRows
) -> None:
    """List the documents whose id another one with another text has before them."""
    for name, text, record in records:
        if find(name) != text:
            rows.drop(record.where, "document", "another text of the same id precedes it", text)


def _batches(pairs: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    while rows := list(itertools.islice(pairs, _ROWS_PER_BATCH)):
        yield rows


class _Documents:
    """The table of `shelve_documents`, memory-mapped."""

    def __init__(self, path: Path, index: Path) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batch = functools.lru_cache(maxsize=64)(self._reader.get_batch)
        self._keys, self._rows = np.load(index, mmap_mode="r")

    def find(self, name: str) -> str | None:
        """The text of a document id."""
        key = stable_hash(name)
        place = int(np.searchsorted(self._keys, key))
        while place < len(self._keys) and self._keys[place] == key:
            batch, row = divmod(int(self._rows[place]), _ROWS_PER_BATCH)
            columns = self._batch(batch)
            if columns["id"][row].as_py() == name:
                text: str = columns["text"][row].as_py()
                return text
            place += 1
        return None


@functools.lru_cache(maxsize=4)
def _open_documents(path: Path, index: Path) -> _Documents:
    return _Documents(path, index)


def open_shelf(build: Build, number: int) -> Shelf | None:
    """What a source's reader looks things up in; None where its records are complete."""
    source = build.plan.sources[number]
    if not refers_to_documents(source):
        return None
    documents = _open_documents(
        build.beside("lookup", number, "documents"), build.beside("lookup", number, "index")
    )
    found = json.loads(build.output("lookup", number).read_text())
    return Shelf(
        document=documents.find,
        judgements=read_judgements(source),
        first_texts=found["first_texts"],
    )


ROW_SCHEMA = pa.schema(
    [
        ("query", pa.large_string()),  # instruction and text, as they will be tokenised
        ("prefix", pa.int32()),  # characters of the instruction
        ("suffix", pa.int32()),  # characters that the template puts behind the text
        ("query_key", pa.int64()),
        ("instruction", pa.large_string()),
        ("concept", pa.int64()),
        ("positives", pa.large_list(pa.binary(16))),
        ("negatives", pa.large_list(pa.binary(16))),
        ("num_first_negatives", pa.int32()),
        ("scores", pa.large_list(pa.float32())),
    ]
)
_DOCUMENT_SCHEMA = pa.schema(
    [
        ("hash", pa.binary(16)),
        ("text", pa.large_string()),
        ("prefix", pa.int32()),
        ("suffix", pa.int32()),
    ]
)
# Beyond this many, instructions belong to queries and cannot name groups.
MAX_INSTRUCTIONS = 1024
# Where so many rows at the beginning of a block are bad, all of them are.
_HOPELESS = 100


def hash_text(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class FramedText(NamedTuple):
    """A string as its template writes it, and the characters at its ends that are not the text."""

    text: str
    prefix: int  # characters of the instruction
    suffix: int  # characters behind the text


@dataclasses.dataclass(slots=True)
class _Collector:
    """Rows and distinct documents of one block, and what was dropped from it."""

    source: SourceConfig
    template: Template
    contamination: ContaminationIndex | None
    bad: BadRows
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    documents: dict[bytes, FramedText] = dataclasses.field(default_factory=dict)
    matches: dict[tuple[bytes, bool], Match | None] = dataclasses.field(default_factory=dict)
    dropped: list[dict[str, str]] = dataclasses.field(default_factory=list)
    num_read: int = 0
    num_unwanted: int = 0

    def count_unwanted(self) -> None:
        """Count a record that `where` leaves out."""
        self.num_unwanted += 1

    def add(self, record: Record, row: Row) -> None:
        """Clean one row's documents, and keep the row or say why not."""
        self.num_read += 1
        if self.bad.count:
            return  # the build will stop; only further bad rows matter
        positives = self._clean(record, "positive", row, row.positives, ())
        negatives = self._clean(record, "negative", row, row.negatives, positives)
        if self.source.max_negatives is not None:
            negatives = dict(list(negatives.items())[: self.source.max_negatives])
        match = self._match(hash_text(row.query), row.query, is_query=True)
        if not row.query.strip():
            self._drop(record, "query", "empty", row.query)
        elif match is not None:
            self._drop(record, "query", "in an evaluation set", row.query, match)
        elif not positives:
            self._drop(record, "query", "no positive left", row.query)
        elif self.source.require_negatives and not negatives:
            self._drop(record, "query", "no hard negative", row.query)
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
            self.refuse_bad()

    def refuse_bad(self) -> None:
        """Refuse the bad rows that this block has so far."""
        refuse_bad_rows(self.source.name, [self.bad.summary], self.num_read)

    def _clean(
        self,
        record: Record,
        kind: str,
        row: Row,
        texts: tuple[str, ...],
        taken: dict[bytes, int] | tuple[()],
    ) -> dict[bytes, int]:
        """Hash and place of each text worth keeping; a repeated text is kept once."""
        kept: dict[bytes, int] = {}
        for place, text in enumerate(texts):
            key = hash_text(self.template.format_document(text, row.document_instruction))
            if not text.strip():
                self._drop(record, kind, "empty", text)
            elif key in taken:
                self._drop(record, kind, "equals a positive", text)
            elif (match := self._match(key, text, is_query=False)) is not None:
                self._drop(record, kind, "in an evaluation set", text, match)
            else:
                kept.setdefault(key, place)
        return kept

    def _match(self, key: bytes, text: str, *, is_query: bool) -> Match | None:
        """Search for a text of this key in the evaluation sets, once for each block."""
        if self.contamination is None:
            return None
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
            "text": text[:EXCERPT],
        }
        if match is not None:
            entry |= {"detail": match.reason, "found in": match.where}
        self.dropped.append(entry)

    def _keep(self, row: Row, positives: dict[bytes, int], negatives: dict[bytes, int]) -> None:
        template, instruction = self.template, row.document_instruction
        prefix = instruction_characters(template.document_prefix(instruction))
        suffix = len(template.document_suffix(instruction))
        for keys, texts in ((positives, row.positives), (negatives, row.negatives)):
            for key, place in keys.items():
                text = template.format_document(texts[place], instruction)
                self.documents.setdefault(key, FramedText(text, prefix, suffix))
        places = [*positives.values(), *(len(row.positives) + k for k in negatives.values())]
        first = sum(place < row.num_first_negatives for place in negatives.values())
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
                "num_first_negatives": first,
                "scores": [row.scores[place] for place in places] if row.scores else [],
            }
        )


def collect_block(build: Build, task: int) -> None:
    """Read one block; write its rows, and its distinct documents sorted into slices."""
    planned = build.plan.blocks[task]
    source = build.plan.sources[planned.source]
    contamination = None
    if build.config.decontaminate is not None:
        contamination = ContaminationIndex(
            build.config.decontaminate, build.folder / "contamination"
        )
    bad = BadRows(source)
    collector = _Collector(source, build.config.template, contamination, bad)
    shelf = open_shelf(build, planned.source)
    for record, row in read_rows(
        source,
        planned.block,
        shelf,
        on_bad=collector.add_bad,
        on_unwanted=collector.count_unwanted,
    ):
        collector.add(record, row)
    rows = pa.Table.from_pylist(collector.rows, schema=ROW_SCHEMA)
    write_table(build.beside("collect", task, "rows"), rows)
    _write_documents(build, task, collector.documents)
    dropped = [*bad.dropped, *collector.dropped]
    write_dropped(build, "collect", task, dropped)
    instructions = {str(row["instruction"]) for row in collector.rows}
    write_json(
        build.output("collect", task),
        {
            "read": collector.num_read,
            "unwanted": collector.num_unwanted,
            "dropped": count_dropped(dropped),
            **bad.summary,
            "has_scores": any(row["scores"] for row in collector.rows),
            "instructions": sorted(instructions)[: MAX_INSTRUCTIONS + 1],
        },
    )


def check_rows(build: Build, task: int) -> None:
    """Refuse all bad rows of all files of a source at once.

    Raises:
        UserError: a source has bad rows and its `on_bad_row` is `stop`.
    """
    plan = build.plan
    for number, source in enumerate(plan.sources):
        blocks = [k for k, planned in enumerate(plan.blocks) if planned.source == number]
        found = [json.loads(build.output("collect", block).read_text()) for block in blocks]
        refuse_bad_rows(source.name, found, sum(entry["read"] for entry in found))
    write_json(build.output("check", task), {})


def _write_documents(build: Build, task: int, documents: dict[bytes, FramedText]) -> None:
    """One record batch per slice, so that a slice's task reads only its own part."""
    hashes = np.array(list(documents), dtype="S16")
    texts = list(documents.values())
    order = np.argsort(hashes, kind="stable")
    slices = build.slice_of(hashes[order])
    ends = np.searchsorted(slices, np.arange(build.plan.num_slices), side="right")
    path = build.beside("collect", task, "documents")
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, _DOCUMENT_SCHEMA) as writer,
    ):
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            places = order[start:end]
            chosen = [texts[place] for place in places.tolist()]
            columns = [
                fixed_binary(hashes[places]),
                pa.array([entry.text for entry in chosen], pa.large_string()),
                pa.array([entry.prefix for entry in chosen], pa.int32()),
                pa.array([entry.suffix for entry in chosen], pa.int32()),
            ]
            writer.write_batch(pa.record_batch(columns, schema=_DOCUMENT_SCHEMA))


def fixed_binary(hashes: Hashes) -> pa.Array:
    """16-byte hashes as an Arrow array, zero bytes at the end included."""
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(hashes), [None, pa.py_buffer(hashes.astype("S16").tobytes())]
    )


def binary_to_numpy(array: pa.Array) -> Hashes:
    """An Arrow binary(16) array as numpy 16-byte strings."""
    raw = np.frombuffer(array.buffers()[1] or b"", dtype="S16")
    return raw[array.offset : array.offset + len(array)]


def _read_slice(build: Build, block: int, number: int) -> pa.RecordBatch:
    """The documents of one slice that one block brought."""
    with pa.memory_map(str(build.beside("collect", block, "documents"))) as source:
        return pa.ipc.open_file(source).get_batch(number)


def dedup_slice(build: Build, task: int) -> None:
    """Find the distinct documents of a slice: sorted hashes, and the block each is taken from."""
    parts = [
        binary_to_numpy(_read_slice(build, block, task).column("hash"))
        for block in range(len(build.plan.blocks))
    ]
    hashes = np.concatenate(parts) if parts else np.empty(0, dtype="S16")
    blocks = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    rows = np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts])
    unique, first = np.unique(hashes, return_index=True)
    chosen = {"hash": fixed_binary(unique), "block": blocks[first], "row": rows[first]}
    write_table(build.beside("dedup", task, "documents"), pa.table(chosen))
    write_json(build.output("dedup", task), {"found": len(hashes), "kept": len(unique)})


def read_chosen_texts(build: Build, number: int, wanted: IntArray | None) -> list[FramedText]:
    """Return a slice's distinct documents in the order of their hashes.

    Args:
        number: the slice.
        wanted: places in the slice; None for all.
    """
    chosen = map_batch(build.beside("dedup", number, "documents"))
    blocks, rows = chosen.column("block").to_numpy(), chosen.column("row").to_numpy()
    if wanted is not None:
        blocks, rows = blocks[wanted], rows[wanted]
    found: dict[int, FramedText] = {}
    for block in np.unique(blocks).tolist():
        places = np.flatnonzero(blocks == block)
        batch = _read_slice(build, block, number).take(pa.array(rows[places]))
        columns = (batch.column(name).to_pylist() for name in FramedText._fields)
        found |= zip(places.tolist(), map(FramedText, *columns), strict=True)
    return [found[place] for place in range(len(rows))]
