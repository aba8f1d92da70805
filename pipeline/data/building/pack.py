"""From the parts of all tasks to shards of even size, and the manifest that names them."""

from __future__ import annotations

import collections
import dataclasses
import json
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from pipeline.data.building.plan import Build
from pipeline.data.building.relate import lengths_of, read_catalogue
from pipeline.data.manifest import (
    FILE_NAME,
    VERSION,
    LengthHistogram,
    Manifest,
    ShardInfo,
    SourceInfo,
)
from pipeline.data.order import Group
from pipeline.data.shards import hash_file, map_batch, write_table
from pipeline.errors import UserError
from pipeline.run_dir import write_json, write_text


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
        ends = ends + np.arange(len(ends)) * 24
        room = _add_pieces(documents, number, 0, ends, room, limit)
    examples: list[list[_Piece]] = [[]]
    room = limit
    counts = _group_counts(build)
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
            ends = ends + np.arange(len(ends)) * 52
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


def _group_counts(build: Build) -> Any:
    """(blocks, groups) number of examples."""
    counts = np.zeros((len(build.plan.blocks), len(read_catalogue(build)["groups"])), np.int64)
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
    lengths = lengths_of(packed, list_name, limit)
    write_json(
        build.output("pack", task),
        {"shard": dataclasses.asdict(info), "lengths": dataclasses.asdict(lengths)},
    )


def write_manifest(build: Build, task: int) -> None:
    """Sum up all tasks; the manifest is the last file of a dataset to appear."""
    plan, config = build.plan, build.config
    collected = [
        json.loads(build.output("collect", block).read_text()) for block in range(len(plan.blocks))
    ]
    infos: dict[str, list[ShardInfo]] = {"documents": [], "examples": []}
    lengths = {kind: LengthHistogram.of(np.empty(0, np.int64), 1) for kind in infos}
    for number, (kind, _) in enumerate(read_layout(build)):
        packed = json.loads(build.output("pack", number).read_text())
        infos[kind].append(ShardInfo(**packed["shard"]))
        lengths[kind] = lengths[kind].plus(
            TypeAdapter(LengthHistogram).validate_python(packed["lengths"])
        )
    counts = _group_counts(build)
    groups = _groups(build, counts.sum(axis=0))
    if not groups:
        raise UserError(
            "sources: no example is left after cleaning", fix="see the files and `where` filters"
        )
    sources = []
    for number, source in enumerate(plan.sources):
        own = [k for k, planned in enumerate(plan.blocks) if planned.source == number]
        dropped: collections.Counter[str] = collections.Counter()
        for block in own:
            dropped.update(collected[block]["dropped"])
        sources.append(
            SourceInfo(
                name=source.name,
                format=source.format,
                path=source.path,
                weight=source.weight,
                rows=sum(collected[block]["read"] for block in own),
                examples=int(counts[own].sum()),
                dropped=dict(sorted(dropped.items())),
            )
        )
    manifest = Manifest(
        version=VERSION,
        recipe=plan.recipe,
        tokenizer=plan.tokenizer,
        template=config.template,
        max_query_length=config.max_query_length,
        max_document_length=config.max_document_length,
        num_examples=int(counts.sum()),
        num_documents=sum(info.rows for info in infos["documents"]),
        has_scores=any(entry["has_scores"] for entry in collected),
        sources=tuple(sources),
        groups=groups,
        query_lengths=lengths["examples"],
        document_lengths=lengths["documents"],
        example_shards=tuple(infos["examples"]),
        document_shards=tuple(infos["documents"]),
    )
    write_text(build.folder / "dataset" / FILE_NAME, manifest.to_json())
    write_json(build.output("manifest", task), {"fingerprint": manifest.fingerprint})


def _groups(build: Build, counts: Any) -> tuple[Group, ...]:
    names = [source.name for source in build.plan.sources]
    groups, start = [], 0
    listed = read_catalogue(build)["groups"]
    for (source, instruction), count in zip(listed, counts.tolist(), strict=True):
        if count:
            groups.append(
                Group(source=names[source], instruction=instruction, start=start, count=count)
            )
            start += count
    return tuple(groups)
