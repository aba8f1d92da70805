"""Write shards of even size, the manifest, and the report of dropped rows.

layout     documents in the order of their hashes, examples by group, then block, then row;
           a new shard starts where `shard_bytes` are full
pack       one Arrow file per shard
manifest   report.md, dropped.jsonl, recipe.json and, last, manifest.json
"""

from __future__ import annotations

import collections
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter

from pipeline.config import SourceConfig
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
    write_manifest,
)
from pipeline.data.order import Group
from pipeline.data.prepare.build import (
    Build,
    CatalogueSummary,
    CollectSummary,
    LookupSummary,
    PackSummary,
    RelateSummary,
    RowRange,
    TokeniseSummary,
)
from pipeline.data.prepare.holdout import write_holdout
from pipeline.data.shards import map_batch, write_table
from pipeline.data.sources import source_note
from pipeline.errors import UserError
from pipeline.files import atomic_path, write_json, write_text

# For each shard its kind, and the rows of the steps' tables that it holds.
Layout = list[tuple[Literal["documents", "examples"], list[RowRange]]]
_LAYOUT = TypeAdapter(Layout)
# Bytes of a row apart from the values of its lists: hash, integers, and an 8-byte offset per list.
_DOCUMENT_BYTES, _EXAMPLE_BYTES = 28, 56


def lay_out(build: Build, task: int) -> None:
    """Decide which rows make up each shard."""
    limit = build.config.shard_bytes
    documents: list[list[RowRange]] = [[]]
    room = limit
    for number in range(build.plan.num_slices):
        batch = map_batch(build.documents(number))
        # From offsets alone: laying out a terabyte reads no token. A token has 4 bytes.
        ends = batch.column("tokens").offsets.to_numpy() * 4
        ends = ends + np.arange(len(ends)) * _DOCUMENT_BYTES
        room = _add_rows(documents, number, 0, ends, room, limit)
    examples: list[list[RowRange]] = [[]]
    # Examples start a new shard, so that the two kinds can be read separately.
    room = limit
    counts = count_groups(build)
    # Each block's examples are sorted by group: its rows of a group start here.
    firsts = np.cumsum(counts, axis=1) - counts
    # Group by group, over all blocks: examples of one group are neighbours, so that a group is
    # described by its first example and their number.
    for group in range(counts.shape[1]):
        for block in np.flatnonzero(counts[:, group]).tolist():
            batch = map_batch(build.examples(block))
            first, count = int(firsts[block, group]), int(counts[block, group])
            ends = np.arange(count + 1) * _EXAMPLE_BYTES
            # Bytes of a value: int32, int64, int64, float32.
            for name, width in (("query", 4), ("positives", 8), ("negatives", 8), ("scores", 4)):
                offsets = batch.column(name).offsets.to_numpy()[first : first + count + 1]
                ends = ends + (offsets - offsets[0]) * width
            room = _add_rows(examples, block, first, ends, room, limit)
    layout: Layout = [("documents", ranges) for ranges in documents if ranges]
    layout += [("examples", ranges) for ranges in examples if ranges]
    write_json(build.summary_path("layout", task), _LAYOUT.dump_python(layout, mode="json"))


def read_layout(build: Build) -> Layout:
    """Return the shards to write."""
    return _LAYOUT.validate_json(build.summary_path("layout", 0).read_bytes())


def _add_rows(
    shards: list[list[RowRange]],
    task: int,
    first: int,
    ends: NDArray[np.int64],
    room: int,
    limit: int,
) -> int:
    """Append rows of a task, starting shards where they are full; return the room that is left.

    Args:
        ends: (R + 1,) bytes of the rows before each row, and of all of them.
    """
    start, rows = 0, len(ends) - 1
    while start < rows:
        # The last row whose end is within the room, by bisection.
        stop = int(np.searchsorted(ends, ends[start] + room, side="right")) - 1
        if stop <= start and shards[-1]:
            shards.append([])
            room = limit
            continue  # with the same row, in the new shard
        stop = max(stop, start + 1)  # a row larger than a shard gets a shard to itself
        shards[-1].append(RowRange(task=task, start=first + start, stop=first + stop))
        room -= int(ends[stop] - ends[start])
        start = stop
    return room


def count_groups(build: Build) -> NDArray[np.int64]:
    """(blocks, groups) number of examples."""
    num_groups = len(build.read_summary(CatalogueSummary, 0).groups)
    # Dense: a few thousand blocks times at most a few thousand groups.
    counts: NDArray[np.int64] = np.zeros((len(build.plan.blocks), num_groups), np.int64)
    for block in range(len(counts)):
        for group, count in build.read_summary(RelateSummary, block).groups.items():
            counts[block, group] = count
    return counts


def pack_shard(build: Build, task: int) -> None:
    """Copy the rows of one shard together and hash the file."""
    layout = read_layout(build)
    kind, ranges = layout[task]
    # Shards are numbered within their kind.
    number = task - next(k for k, entry in enumerate(layout) if entry[0] == kind)
    table_of = build.documents if kind == "documents" else build.examples
    batches = [
        map_batch(table_of(part.task)).slice(part.start, part.stop - part.start) for part in ranges
    ]
    path = build.dataset / f"{kind}-{number:05d}.arrow"
    write_table(path, pa.Table.from_batches(batches))
    # Read back from the file: the manifest describes what is on disk, not what was meant.
    packed = map_batch(path)
    list_name, limit = "tokens", build.config.max_document_length
    if kind == "examples":
        list_name, limit = "query", build.config.max_query_length
    info = ShardInfo.of(path, packed.num_rows)
    lengths = LengthHistogram.of(np.diff(packed.column(list_name).offsets.to_numpy()), limit)
    build.write_summary(task, PackSummary(shard=info, lengths=lengths))


# Dropped texts that the report shows for each reason.
_SHOWN_PER_REASON = 3


def complete_dataset(build: Build, task: int) -> None:
    """Write report and manifest; the manifest is the last file of a dataset to appear."""
    folder = build.dataset
    manifest = _make_manifest(build)
    held_out = write_holdout(build)
    with atomic_path(folder / DROPPED_NAME) as temporary, temporary.open("wb") as handle:
        for path in _dropped_files(build):
            with path.open("rb") as piece:
                shutil.copyfileobj(piece, handle)
    with atomic_path(folder / RECIPE_NAME) as temporary:
        # With its modification time: it decides which stamps in the recipe can be trusted.
        shutil.copy2(build.folder / RECIPE_NAME, temporary)
    report = _report(build, manifest, held_out, folder / DROPPED_NAME)
    write_text(folder / REPORT_NAME, report)
    # Last, because a folder with a manifest is a whole dataset to every reader.
    write_manifest(folder / FILE_NAME, manifest)
    write_json(build.summary_path("manifest", task), {"held_out": held_out})


def _make_manifest(build: Build) -> Manifest:
    plan, config = build.plan, build.config
    collected = [build.read_summary(CollectSummary, block) for block in range(len(plan.blocks))]
    tokenised = [build.read_summary(TokeniseSummary, k) for k in range(plan.num_slices)]
    infos: dict[str, list[ShardInfo]] = {"documents": [], "examples": []}
    lengths = {kind: LengthHistogram.of(np.empty(0, np.int64), 1) for kind in infos}
    for number, (kind, _) in enumerate(read_layout(build)):
        packed = build.read_summary(PackSummary, number)
        infos[kind].append(packed.shard)
        lengths[kind] = lengths[kind].plus(packed.lengths)
    counts = count_groups(build)
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
        num_near_duplicates=sum(summary.near_duplicates for summary in tokenised),
        has_scores=any(summary.has_scores for summary in collected),
        sources=sources,
        groups=_groups(build, counts.sum(axis=0)),
        query_lengths=lengths["examples"],
        document_lengths=lengths["documents"],
        example_shards=tuple(infos["examples"]),
        document_shards=tuple(infos["documents"]),
    )


def count_unwanted(build: Build) -> int:
    """Count the records that `where` left out of all sources."""
    blocks = range(len(build.plan.blocks))
    return sum(build.read_summary(CollectSummary, block).unwanted for block in blocks)


def _sources(
    build: Build, collected: list[CollectSummary], counts: NDArray[np.int64]
) -> Iterator[SourceInfo]:
    for number, source in enumerate(build.plan.sources):
        blocks = build.blocks_of(number)
        corpus = build.read_summary(LookupSummary, number)
        # Documents that several blocks refer to are counted once, where the corpus was stored.
        dropped = collections.Counter(corpus.dropped)
        for block in blocks:
            dropped.update(collected[block].dropped)
        examples = int(counts[blocks].sum())
        yield SourceInfo(
            name=source.name,
            format=source.format,
            path=source.path,
            weight=source.weight,
            rows=sum(collected[block].read for block in blocks),
            examples=examples,
            dropped=dict(sorted(dropped.items())),
            warnings=tuple(_warnings(source, examples, corpus.unjudged)),
        )


def _losses(
    build: Build, collected: list[CollectSummary], sources: tuple[SourceInfo, ...]
) -> Iterator[str]:
    """Yield for each source how many rows were read, and why none of them is left."""
    for number, source in enumerate(sources):
        unwanted = sum(collected[block].unwanted for block in build.blocks_of(number))
        reasons = [f"{reason} {count:,}" for reason, count in source.dropped.items()]
        if unwanted:
            reasons.append(f"left out by `where` {unwanted:,}")
        if held_out := sum(collected[block].held_out for block in build.blocks_of(number)):
            reasons.append(f"held out {held_out:,}")
        read = source.rows + unwanted
        reasons.insert(0, f"rows read {read:,}" + ("" if read else " (empty, or only blank lines)"))
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


def _groups(build: Build, counts: NDArray[np.int64]) -> tuple[Group, ...]:
    names = [source.name for source in build.plan.sources]
    listed = build.read_summary(CatalogueSummary, 0).groups
    groups, start = [], 0
    for (source, instruction), count in zip(listed, counts.tolist(), strict=True):
        # No batch could be drawn from a group that has lost all of its examples.
        if count:
            groups.append(
                Group(source=names[source], instruction=instruction, start=start, count=count)
            )
            start += count
    return tuple(groups)


def _dropped_files(build: Build) -> Iterator[Path]:
    plan = build.plan
    steps = (
        ("lookup", len(plan.sources)),
        ("collect", len(plan.blocks)),
        ("tokenise", plan.num_slices),
    )
    # In the order of the input, so that two builds of the same data write the same file.
    return (build.dropped(step, task) for step, count in steps for task in range(count))


def _report(build: Build, manifest: Manifest, held_out: list[str], dropped: Path) -> str:
    """Return Markdown: counts by source and reason, warnings, and a few texts of each reason."""
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
    lines += [f"\nHoldout: {line}." for line in held_out]
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
