"""From hashes to document ids: the catalogue, tokenised slices, and examples sorted by group."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.batch import IntArray, Ragged
from pipeline.data.building.collect import (
    ROW_SCHEMA,
    binary_to_numpy,
    fixed_binary,
    read_slice,
)
from pipeline.data.building.plan import Build, Hashes
from pipeline.data.manifest import LengthHistogram
from pipeline.data.shards import (
    DOCUMENT_SCHEMA,
    EXAMPLE_SCHEMA,
    map_batch,
    ragged_array,
    write_table,
)
from pipeline.run_dir import atomic_path, write_json

_MAX_GROUPS = 1024
_TEXTS_PER_CALL = 512


def make_catalogue(build: Build, task: int) -> None:
    """Number all documents in the order of their hashes, and name the groups of examples.

    A source with too many instructions has one of its own per query; it becomes one group.
    """
    plan = build.plan
    slices = [
        binary_to_numpy(map_batch(build.beside("dedup", number, "documents")).column("hash"))
        for number in range(plan.num_slices)
    ]
    path = build.beside("catalogue", task, "hashes")
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        for part in slices:
            handle.write(part.tobytes())
    instructions: list[set[str]] = [set() for _ in plan.sources]
    for number, planned in enumerate(plan.blocks):
        found = json.loads(build.output("collect", number).read_text())["instructions"]
        # One more than the limit is enough to know that the limit is passed.
        if len(instructions[planned.source]) <= _MAX_GROUPS:
            instructions[planned.source].update(found)
    groups = [
        [source, instruction]
        for source, names in enumerate(instructions)
        for instruction in (sorted(names) if len(names) <= _MAX_GROUPS else [""])
    ]
    write_json(
        build.output("catalogue", task),
        {"groups": groups, "slices": [len(part) for part in slices]},
    )


def read_catalogue(build: Build) -> dict[str, Any]:
    """Groups as [source, instruction], and the number of documents of each slice."""
    catalogue: dict[str, Any] = json.loads(build.output("catalogue", 0).read_text())
    return catalogue


def catalogue_hashes(build: Build) -> Hashes:
    """The sorted hashes of all documents, memory-mapped; the place of a hash is its id."""
    path = build.beside("catalogue", 0, "hashes")
    if path.stat().st_size == 0:
        return np.empty(0, dtype="S16")
    return np.memmap(path, dtype="S16", mode="r")


def tokenise_slice(build: Build, task: int) -> None:
    """Tokenise the documents of one slice, in the order of their hashes."""
    chosen = map_batch(build.beside("dedup", task, "documents"))
    blocks, rows = chosen.column("block").to_numpy(), chosen.column("row").to_numpy()
    texts = np.empty(chosen.num_rows, dtype=object)
    for block in np.unique(blocks).tolist():
        places = np.flatnonzero(blocks == block)
        column = read_slice(build, block, task).column("text")
        texts[places] = column.take(pa.array(rows[places])).to_pylist()
    limit = build.config.max_document_length
    tokens = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        tokens += build.encoder.encode(texts[start : start + _TEXTS_PER_CALL].tolist(), limit)
    hashes = fixed_binary(binary_to_numpy(chosen.column("hash")))
    table = pa.table([ragged_array(tokens, pa.int32()), hashes], schema=DOCUMENT_SCHEMA)
    write_table(build.beside("tokenise", task, "documents"), table)
    write_json(
        build.output("tokenise", task),
        {"tokens": sum(len(row) for row in tokens), "rows": len(tokens)},
    )


def relate_block(build: Build, task: int) -> None:
    """Tokenise the queries of one block, point them to documents, and sort them by group."""
    rows = map_batch(build.beside("collect", task, "rows"))
    assert rows.schema == ROW_SCHEMA
    catalogue = read_catalogue(build)
    source = build.plan.blocks[task].source
    group_of = {
        instruction: number
        for number, (owner, instruction) in enumerate(catalogue["groups"])
        if owner == source
    }
    # A source whose instructions are too many has the single group "".
    groups = np.array(
        [group_of.get(name, group_of.get("", 0)) for name in rows["instruction"].to_pylist()],
        dtype=np.int64,
    )
    order = np.argsort(groups, kind="stable")
    taken = pa.Table.from_batches([rows]).take(pa.array(order)).combine_chunks()
    queries = taken["query"].to_pylist()
    limit = build.config.max_query_length
    tokens = []
    for start in range(0, len(queries), _TEXTS_PER_CALL):
        tokens += build.encoder.encode(queries[start : start + _TEXTS_PER_CALL], limit)
    hashes = catalogue_hashes(build)
    table = pa.table(
        [
            ragged_array(tokens, pa.int32()),
            _document_ids(taken["positives"], hashes),
            _document_ids(taken["negatives"], hashes),
            taken["num_first_negatives"],
            taken["concept"],
            taken["query_key"],
            taken["scores"],
        ],
        schema=EXAMPLE_SCHEMA,
    )
    write_table(build.beside("relate", task, "examples"), table)
    counts = np.bincount(groups, minlength=len(catalogue["groups"]))
    write_json(
        build.output("relate", task),
        {
            "groups": {str(k): int(counts[k]) for k in np.flatnonzero(counts)},
            "bytes": table.nbytes,
        },
    )


def _document_ids(column: pa.ChunkedArray, catalogue: Hashes) -> pa.Array:
    """A list column of hashes as one of document ids."""
    lists = column.combine_chunks()
    hashes = binary_to_numpy(lists.values)
    offsets: IntArray = lists.offsets.to_numpy()
    ids = np.searchsorted(catalogue, hashes).astype(np.int64)
    return ragged_array(Ragged(offsets=offsets, values=ids), pa.int64())


def lengths_of(table: pa.RecordBatch, name: str, limit: int) -> LengthHistogram:
    """Histogram of the lengths of a list column."""
    return LengthHistogram.of(np.diff(table.column(name).offsets.to_numpy()), limit)
