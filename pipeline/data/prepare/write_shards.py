"""Write shards of even size, the manifest, and the report of dropped rows."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from pipeline.config import SourceConfig
from pipeline.data.batch import IntArray
from pipeline.data.manifest import (
    DROPPED_NAME,
    FILE_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    VERSION,
    LengthHistogram,
    Manifest,
    ShardInfo,
    SourceInfo,
)
from pipeline.data.manifest import write_manifest as write_sealed_manifest
from pipeline.data.order import Group
from pipeline.data.prepare.plan import Build
from pipeline.data.prepare.tokenise import read_groups
from pipeline.data.shards import map_batch, write_table
from pipeline.data.sources import source_note
from pipeline.errors import UserError
from pipeline.files import atomic_path, hash_file, write_json, write_text


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


_SHOWN_PER_REASON = 3


def write_manifest(build: Build, task: int) -> None:
    """Write report and manifest; the manifest is the last file of a dataset to appear."""
    folder = build.folder / "dataset"
    manifest = _sum_up(build)
    with atomic_path(folder / DROPPED_NAME) as temporary, temporary.open("wb") as handle:
        for part in _dropped_parts(build):
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, handle)
    with atomic_path(folder / RECIPE_NAME) as temporary:
        # With its time, which says which stamps in it may be trusted.
        shutil.copy2(build.folder / RECIPE_NAME, temporary)
    write_text(folder / REPORT_NAME, _report(build, manifest, folder / DROPPED_NAME))
    write_sealed_manifest(folder / FILE_NAME, manifest)
    write_json(build.output("manifest", task), {"fingerprint": manifest.fingerprint})


def _sum_up(build: Build) -> Manifest:
    plan, config = build.plan, build.config
    collected = [_read(build, "collect", block) for block in range(len(plan.blocks))]
    infos: dict[str, list[ShardInfo]] = {"documents": [], "examples": []}
    lengths = {kind: LengthHistogram.of(np.empty(0, np.int64), 1) for kind in infos}
    for number, (kind, _) in enumerate(read_layout(build)):
        packed = _read(build, "pack", number)
        infos[kind].append(ShardInfo(**packed["shard"]))
        own = TypeAdapter(LengthHistogram).validate_python(packed["lengths"])
        lengths[kind] = lengths[kind].plus(own)
    counts = group_counts(build)
    sources = tuple(_sources(build, collected, counts))
    if not counts.sum():
        raise UserError(
            "sources: no example is left after cleaning: "
            + "; ".join(_losses(build, collected, sources)),
            fix="see the files, and the filters `where`, `require_negatives`, `decontaminate`",
        )
    return Manifest(
        version=VERSION,
        recipe=plan.recipe,
        tokenizer=plan.tokenizer,
        template=config.template,
        max_query_length=config.max_query_length,
        max_document_length=config.max_document_length,
        num_examples=int(counts.sum()),
        num_documents=sum(info.rows for info in infos["documents"]),
        num_near_duplicates=sum(
            _read(build, "tokenise", number)["near_duplicates"] for number in range(plan.num_slices)
        ),
        has_scores=any(entry["has_scores"] for entry in collected),
        sources=sources,
        groups=_groups(build, counts.sum(axis=0)),
        query_lengths=lengths["examples"],
        document_lengths=lengths["documents"],
        example_shards=tuple(infos["examples"]),
        document_shards=tuple(infos["documents"]),
    )


def _read(build: Build, step: str, task: int) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(build.output(step, task).read_text())
    return summary


def count_unwanted(build: Build) -> int:
    """Count the records that `where` left out of all sources."""
    return sum(_read(build, "collect", k)["unwanted"] for k in range(len(build.plan.blocks)))


def _sources(
    build: Build, collected: list[dict[str, Any]], counts: IntArray
) -> Iterator[SourceInfo]:
    for number, source in enumerate(build.plan.sources):
        own = [k for k, planned in enumerate(build.plan.blocks) if planned.source == number]
        looked_up = _read(build, "lookup", number)
        dropped = collections.Counter(looked_up["dropped"])
        for block in own:
            dropped.update(collected[block]["dropped"])
        examples = int(counts[own].sum())
        yield SourceInfo(
            name=source.name,
            format=source.format,
            path=source.path,
            weight=source.weight,
            rows=sum(collected[block]["read"] for block in own),
            examples=examples,
            dropped=dict(sorted(dropped.items())),
            warnings=tuple(_warnings(source, examples, looked_up["unjudged"])),
        )


def _losses(
    build: Build, collected: list[dict[str, Any]], sources: tuple[SourceInfo, ...]
) -> Iterator[str]:
    """Say of each source how many rows were read, and why none of them is left."""
    for number, source in enumerate(sources):
        own = [k for k, planned in enumerate(build.plan.blocks) if planned.source == number]
        unwanted = sum(collected[block]["unwanted"] for block in own)
        reasons = [f"{reason} {count:,}" for reason, count in source.dropped.items()]
        if unwanted:
            reasons.append(f"left out by `where` {unwanted:,}")
        read = source.rows + unwanted
        reasons.insert(0, f"rows read {read:,}" + ("" if read else " (only blank lines)"))
        yield f"{source.name} ({source.path}): {', '.join(reasons)}"


def _warnings(source: SourceConfig, examples: int, unjudged: int) -> Iterator[str]:
    if note := source_note(source):
        yield note
    if unjudged:
        yield f"{unjudged} queries have no judgement in the split {source.split or 'train'!r}"
    if not examples:
        yield "no example of it is left, so nothing of it is trained on"
    elif source.format == "reasonir_hq":
        yield "its positives are documents of BRIGHT: scores on BRIGHT are not zero-shot"


def _groups(build: Build, counts: IntArray) -> tuple[Group, ...]:
    names = [source.name for source in build.plan.sources]
    groups, start = [], 0
    for (source, instruction), count in zip(read_groups(build), counts.tolist(), strict=True):
        if count:
            groups.append(
                Group(source=names[source], instruction=instruction, start=start, count=count)
            )
            start += count
    return tuple(groups)


def _dropped_parts(build: Build) -> Iterator[Path]:
    steps = (
        ("lookup", len(build.plan.sources)),
        ("collect", len(build.plan.blocks)),
        ("tokenise", build.plan.num_slices),
    )
    for step, count in steps:
        for task in range(count):
            yield build.beside(step, task, "dropped")


def _report(build: Build, manifest: Manifest, dropped: Path) -> str:
    """Markdown: counts per source and reason, warnings, and the first few texts of each reason."""
    lines = [
        "# What was kept and what was dropped",
        "",
        f"{manifest.num_examples} examples, {manifest.num_documents} documents; "
        f"{manifest.num_near_duplicates} near-duplicate documents were merged.",
        f"Every dropped text is a line of {DROPPED_NAME}.",
        "",
        "| source | rows read | examples | dropped |",
        "|---|---|---|---|",
    ]
    for source in manifest.sources:
        drops = ", ".join(f"{reason} {count}" for reason, count in source.dropped.items())
        lines.append(f"| {source.name} | {source.rows} | {source.examples} | {drops or 'none'} |")
    if unwanted := count_unwanted(build):
        lines.append(f"\nRecords left out by `where`, not listed below: {unwanted}.")
    for source in manifest.sources:
        lines += [f"\nWarning, {source.name}: {warning}." for warning in source.warnings]
    rule = build.config.decontaminate
    if rule is not None:
        names = ", ".join(evaluation.name for evaluation in rule.sets)
        lines.append(
            f"\nChecked against {names}: dropped with more than {rule.max_overlap:.0%} of its "
            f"{rule.ngram}-grams there, queries also above matching ratio {rule.max_ratio}."
        )
    if build.config.near_duplicates is not None:
        lines.append(
            f"\nNear-duplicates: Jaccard similarity of word 5-grams of at least "
            f"{build.config.near_duplicates}, estimated."
        )
    shown: dict[str, list[str]] = {}
    with dropped.open() as handle:
        for entry in map(json.loads, handle):
            texts = shown.setdefault(f"{entry['dropped']}: {entry['reason']}", [])
            if len(texts) < _SHOWN_PER_REASON:
                detail = "; ".join(entry[key] for key in ("detail", "found in") if key in entry)
                text = " ".join(entry["text"].split())
                texts.append(f"- {entry['where']}: {text!r}" + (f" ({detail})" if detail else ""))
    sections = ([f"\n## {reason}\n", *texts] for reason, texts in sorted(shown.items()))
    return "\n".join(itertools.chain(lines, *sections)) + "\n"
