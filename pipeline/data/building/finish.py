"""The sum of all tasks: manifest, and the report of what was dropped and why."""

from __future__ import annotations

import collections
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from pipeline.config import SourceConfig
from pipeline.data.batch import IntArray
from pipeline.data.building.pack import group_counts, read_layout
from pipeline.data.building.plan import Build
from pipeline.data.building.relate import read_groups
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
from pipeline.data.sources import source_note
from pipeline.errors import UserError
from pipeline.run_dir import atomic_path, write_json, write_text

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
