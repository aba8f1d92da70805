"""From raw blocks to clean rows, and to documents of which each text is kept once."""

from __future__ import annotations

import collections
import dataclasses
import hashlib

import numpy as np
import pyarrow as pa

from pipeline.config import SourceConfig, Template
from pipeline.data.building.plan import Build, Hashes
from pipeline.data.shards import write_table
from pipeline.data.sources import Record, Row, read_rows
from pipeline.data.sources.row import stable_hash
from pipeline.run_dir import atomic_path, write_json

ROW_SCHEMA = pa.schema(
    [
        ("query", pa.large_string()),  # instruction and text, as they will be tokenised
        ("query_key", pa.int64()),
        ("instruction", pa.large_string()),
        ("concept", pa.int64()),
        ("positives", pa.large_list(pa.binary(16))),
        ("negatives", pa.large_list(pa.binary(16))),
        ("num_first_negatives", pa.int32()),
        ("scores", pa.large_list(pa.float32())),
    ]
)
_DOCUMENT_SCHEMA = pa.schema([("hash", pa.binary(16)), ("text", pa.large_string())])
# Beyond this many per block, instructions belong to queries and cannot name groups.
_MAX_INSTRUCTIONS = 1024


def hash_text(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


@dataclasses.dataclass(slots=True)
class _Collector:
    """Rows and distinct documents of one block, and what was dropped from it."""

    source: SourceConfig
    template: Template
    rows: list[dict[str, object]] = dataclasses.field(default_factory=list)
    documents: dict[bytes, str] = dataclasses.field(default_factory=dict)
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    num_read: int = 0

    def add(self, record: Record, row: Row) -> None:
        """Check one row, clean its documents, and keep it or count why not."""
        self.num_read += 1
        texts = row.positives + row.negatives
        if row.scores and len(row.scores) != len(texts):
            raise record.fail(
                f"{len(row.scores)} scores",
                allowed=f"{len(texts)}, one per positive and negative",
            )
        for text in (row.query, row.instruction, row.document_instruction, row.concept, *texts):
            _require_unicode(record, text)
        scores = dict(zip(range(len(texts)), row.scores, strict=False))
        prefix = self.template.document_prefix(row.document_instruction)
        positives: dict[bytes, int] = {}
        negatives: dict[bytes, int] = {}
        num_first = 0
        for place, text in enumerate(texts):
            is_positive = place < len(row.positives)
            if not text.strip():
                self.dropped["empty positive" if is_positive else "empty negative"] += 1
                continue
            key = hash_text(prefix + text)
            if is_positive:
                positives.setdefault(key, place)
            elif key in positives:
                self.dropped["negative equals positive"] += 1
                continue
            elif key not in negatives and self._room_for(negatives):
                negatives[key] = place
                num_first += place - len(row.positives) < row.num_first_negatives
            else:
                continue
            self.documents.setdefault(key, prefix + text)
        if not row.query.strip():
            self.dropped["empty query"] += 1
        elif not positives:
            self.dropped["no positive left"] += 1
        elif self.source.require_negatives and not negatives:
            self.dropped["no hard negative"] += 1
        else:
            places = [*positives.values(), *negatives.values()]
            self.rows.append(
                {
                    "query": self.template.format_query(row.query, row.instruction),
                    "query_key": stable_hash(row.query),
                    "instruction": row.instruction,
                    "concept": stable_hash(self.source.name, row.concept) if row.concept else -1,
                    "positives": list(positives),
                    "negatives": list(negatives),
                    "num_first_negatives": num_first,
                    "scores": [scores[place] for place in places] if scores else [],
                }
            )

    def _room_for(self, negatives: dict[bytes, int]) -> bool:
        limit = self.source.max_negatives
        return limit is None or len(negatives) < limit


def _require_unicode(record: Record, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise record.fail(
            f"a text with half a surrogate pair ({text[error.start]!r})",
            fix="repair the character in the source",
        ) from error


def collect_block(build: Build, task: int) -> None:
    """Read one block; write its rows, and its distinct documents sorted into slices."""
    planned = build.plan.blocks[task]
    source = build.plan.sources[planned.source]
    collector = _Collector(source, build.config.template)
    for record, row in read_rows(source, planned.block, None):
        collector.add(record, row)
    write_table(
        build.beside("collect", task, "rows"),
        pa.Table.from_pylist(collector.rows, schema=ROW_SCHEMA),
    )
    _write_documents(build, task, collector.documents)
    instructions = collections.Counter(str(row["instruction"]) for row in collector.rows)
    write_json(
        build.output("collect", task),
        {
            "read": collector.num_read,
            "dropped": dict(sorted(collector.dropped.items())),
            "has_scores": any(row["scores"] for row in collector.rows),
            "instructions": sorted(instructions)[: _MAX_INSTRUCTIONS + 1],
        },
    )


def _write_documents(build: Build, task: int, documents: dict[bytes, str]) -> None:
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
            column = pa.array([texts[place] for place in places.tolist()], pa.large_string())
            batch = pa.record_batch([fixed_binary(hashes[places]), column], schema=_DOCUMENT_SCHEMA)
            writer.write_batch(batch)


def fixed_binary(hashes: Hashes) -> pa.Array:
    """16-byte hashes as an Arrow array, zero bytes at the end included."""
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(hashes), [None, pa.py_buffer(hashes.astype("S16").tobytes())]
    )


def binary_to_numpy(array: pa.Array) -> Hashes:
    """An Arrow binary(16) array as numpy 16-byte strings."""
    raw = np.frombuffer(array.buffers()[1] or b"", dtype="S16")
    return raw[array.offset : array.offset + len(array)]


def read_slice(build: Build, block: int, number: int) -> pa.RecordBatch:
    """The documents of one slice that one block brought."""
    with pa.memory_map(str(build.beside("collect", block, "documents"))) as source:
        return pa.ipc.open_file(source).get_batch(number)


def dedup_slice(build: Build, task: int) -> None:
    """Find the distinct documents of a slice: sorted hashes, and the block each is taken from."""
    parts = [
        binary_to_numpy(read_slice(build, block, task).column("hash"))
        for block in range(len(build.plan.blocks))
    ]
    hashes = np.concatenate(parts) if parts else np.empty(0, dtype="S16")
    blocks = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    rows = np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts])
    # Stable, so the first block that has a text gives it.
    unique, first = np.unique(hashes, return_index=True)
    write_table(
        build.beside("dedup", task, "documents"),
        pa.table(
            {"hash": fixed_binary(unique), "block": blocks[first], "row": rows[first]},
        ),
    )
    write_json(build.output("dedup", task), {"found": len(hashes), "kept": len(unique)})
