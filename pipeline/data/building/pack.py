"""From the parts of all tasks to shards of even size."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.batch import IntArray
from pipeline.data.building.plan import Build
from pipeline.data.building.relate import read_groups
from pipeline.data.manifest import LengthHistogram, ShardInfo
from pipeline.data.shards import hash_file, map_batch, write_table
from pipeline.run_dir import write_json


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """Rows start..stop-1 of one task's table."""

    task: int
    start: int
    stop: int


def lay_out(build: Build, task: int) -> None:
    """Decide which pieces make up each shard: documents by hash, examples by group then block."""
    plan, limit = build.plan, build.config.shard_bytes
    documents: list[list[_Piece]] = [[]]
    room = limit
    for number in range(plan.num_slices):
        batch = map_batch(build.beside("tokenise", number, "documents"))
        ends = batch.column("tokens").offsets.to_numpy() * 4
        ends = ends + np.arange(len(ends)) * 28
        room = _add_pieces(documents, number, 0, ends, room, limit)
    examples: list[list[_Piece]] = [[]]
    room = limit
    counts = group_counts(build)
    firsts = np.cumsum(counts, axis=1) - counts
    for group in range(counts.shape[1]):
        for block in np.flatnonzero(counts[:, group]).tolist():
            batch = map_batch(build.beside("relate", block, "examples"))
            first, count = int(firsts[block, group]), int(counts[block, group])
            ends = batch.column("query").offsets.to_numpy()[first : first + count + 1] * 4
            ends = ends - ends[0]
            for name, width in (("positives", 8), ("negatives", 8), ("scores", 4)):
                offsets = batch.column(name).offsets.to_numpy()[first : first + count + 1]
                ends = ends + (offsets - offsets[0]) * width
            ends = ends + np.arange(len(ends)) * 56
            room = _add_pieces(examples, block, first, ends, room, limit)
    shards = [("documents", pieces) for pieces in documents if pieces]
    shards += [("examples", pieces) for pieces in examples if pieces]
    write_json(
        build.output("layout", task),
        [[kind, [dataclasses.asdict(piece) for piece in pieces]] for kind, pieces in shards],
    )


def _add_pieces(
    shards: list[list[_Piece]], task: int, first: int, ends: Any, room: int, limit: int
) -> int:
    """Append rows whose running sizes are `ends` (R + 1,), opening shards where they are full."""
    start, rows = 0, len(ends) - 1
    while start < rows:
        stop = int(np.searchsorted(ends, ends[start] + room, side="right")) - 1
        if stop <= start and shards[-1]:
            shards.append([])
            room = limit
            continue
        stop = max(stop, start + 1)  # a row larger than a shard has one of its own
        shards[-1].append(_Piece(task=task, start=first + start, stop=first + stop))
        room -= int(ends[stop] - ends[start])
        start = stop
    return room


def group_counts(build: Build) -> IntArray:
    """(blocks, groups) number of examples."""
    counts: IntArray = np.zeros((len(build.plan.blocks), len(read_groups(build))), np.int64)
    for block in range(len(counts)):
        groups = json.loads(build.output("relate", block).read_text())["groups"]
        for group, count in groups.items():
            counts[block, int(group)] = count
    return counts


def read_layout(build: Build) -> list[Any]:
    """The shards to write, as [kind, pieces]."""
    layout: list[Any] = json.loads(build.output("layout", 0).read_text())
    return layout


def pack_shard(build: Build, task: int) -> None:
    """Copy the pieces of one shard together and hash the file."""
    layout = read_layout(build)
    kind, raw_pieces = layout[task]
    step = "tokenise" if kind == "documents" else "relate"
    number = task - next(k for k, entry in enumerate(layout) if entry[0] == kind)
    batches = []
    for raw in raw_pieces:
        piece = _Piece(**raw)
        batch = map_batch(build.beside(step, piece.task, kind))
        batches.append(batch.slice(piece.start, piece.stop - piece.start))
    path = build.folder / "dataset" / f"{kind}-{number:05d}.arrow"
    write_table(path, pa.Table.from_batches(batches))
    packed = map_batch(path)
    list_name, limit = "tokens", build.config.max_document_length
    if kind == "examples":
        list_name, limit = "query", build.config.max_query_length
    info = ShardInfo(
        file=path.name,
        rows=packed.num_rows,
        bytes=path.stat().st_size,
        sha256=hash_file(path),
    )
    lengths = LengthHistogram.of(np.diff(packed.column(list_name).offsets.to_numpy()), limit)
    write_json(
        build.output("pack", task),
        {"shard": dataclasses.asdict(info), "lengths": dataclasses.asdict(lengths)},
    )
