"""Generate problems, definitions and training rows from the built-in concepts, offline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import write_json, write_text
from ReasonAug.concepts import CONCEPTS
from ReasonAug.files import make_folder, write_jsonl
from ReasonAug.problem import DOMAINS, num_tokens
from ReasonAug.rows import training_rows
from ReasonAug.splits import (
    MAX_OVERLAP,
    TRAIN,
    UNSEEN_CONCEPTS,
    UNSEEN_PROBLEMS,
    Entry,
    make_entries,
)
from ReasonAug.triplets import Row

MIN_PROBLEMS = 8  # enough for every form in training and in the unseen problems
MIN_TOKENS = 300  # below, coding problems have no room for a story that tells them apart

_README = """# ReasonAug templates

Problems with verified solutions, and training triplets for reasoning-intensive retrieval.
Written by `python -m ReasonAug templates`; the same arguments give the same bytes.

| file | rows | content |
|---|---|---|
| train.jsonl | {rows} | triplets for training |
| problems.jsonl | {problems} | every problem with split, concept, solution and verification |
| definitions.jsonl | {concepts} | one definition per concept |
| summary.json | | these counts, lengths and the arguments |

Splits of the problems: train {train}, unseen_problems {unseen_problems} (the concepts of train,
other problems), unseen_concepts {unseen_concepts} ({held_out} concepts that never occur in
train.jsonl).
No unseen problem shares more than {overlap:.0%} of its word 5-grams (Jaccard) with a training
problem, and half of them have a wording that training never shows.
"""


def write_templates(
    out: Path, *, seed: int, problems_per_concept: int, max_tokens: int
) -> dict[str, Any]:
    """Generate everything and write it to `out`; files appear whole or not at all.

    Returns:
        The content of `summary.json`.

    Raises:
        UserError: An argument is out of range or `out` cannot be written.
    """
    if problems_per_concept < MIN_PROBLEMS:
        raise UserError(
            found=f"--problems-per-concept {problems_per_concept}", allowed=f">= {MIN_PROBLEMS}"
        )
    if max_tokens < MIN_TOKENS:
        raise UserError(found=f"--max-tokens {max_tokens}", allowed=f">= {MIN_TOKENS}")
    make_folder(out)
    entries = make_entries(
        seed=seed, problems_per_concept=problems_per_concept, max_tokens=max_tokens
    )
    print(f"problems: {len(entries)} of {len(CONCEPTS)} concepts, every solution verified")
    rows = training_rows(entries, seed=seed)
    print(f"training rows: {len(rows)}")
    arguments = {
        "seed": seed,
        "problems_per_concept": problems_per_concept,
        "max_tokens": max_tokens,
    }
    summary = _summary(entries, rows, arguments)
    write_jsonl(out / "train.jsonl", rows)
    write_jsonl(out / "problems.jsonl", (entry.row() for entry in entries))
    write_jsonl(out / "definitions.jsonl", _definitions())
    write_json(out / "summary.json", summary)
    write_text(out / "README.md", _readme(summary))
    print(f"written: {out}")
    return summary


def _definitions() -> Iterable[dict[str, str]]:
    for concept in CONCEPTS:
        yield {
            "domain": concept.domain,
            "concept": concept.name,
            "split": UNSEEN_CONCEPTS if concept.held_out else TRAIN,
            "definition": concept.definition_body(),
        }


def _summary(
    entries: Sequence[Entry], rows: Sequence[Row], arguments: dict[str, int]
) -> dict[str, Any]:
    lengths = sorted(num_tokens(entry.problem.document()) for entry in entries)
    splits = Counter(entry.split for entry in entries)
    return {
        "arguments": arguments,
        "concepts": {domain: sum(c.domain == domain for c in CONCEPTS) for domain in DOMAINS},
        "held_out_concepts": [c.name for c in CONCEPTS if c.held_out],
        "problems": {s: splits[s] for s in (TRAIN, UNSEEN_PROBLEMS, UNSEEN_CONCEPTS)},
        "rows": dict(sorted(Counter(row["task_type"] for row in rows).items())),
        "tokens": {
            "shortest": lengths[0],
            "median": lengths[len(lengths) // 2],
            "p90": lengths[len(lengths) * 9 // 10],
            "longest": lengths[-1],
        },
    }


def _readme(summary: Mapping[str, Any]) -> str:
    return _README.format(
        rows=sum(summary["rows"].values()),
        problems=sum(summary["problems"].values()),
        concepts=sum(summary["concepts"].values()),
        held_out=len(summary["held_out_concepts"]),
        overlap=MAX_OVERLAP,
        **summary["problems"],
    )
