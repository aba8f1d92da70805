"""Record answers that exist already, so that they pass the later stages like answers of a model.

    released layout   generations.jsonl of n, domain, concept, generation, check
                      definitions.jsonl of domain, concept, definition
    batch layout      the output files of a batch API: custom_id, response, error; an index names
                      stage (definitions, problems, solved), domain, concept and n of each custom_id

An imported answer belongs to an item, not to a prompt, so a changed prompt does not replace it. A
check becomes the verdict on the solution; in a coding domain its program is the solution. The
concepts of all imports are written to concepts.jsonl in output_dir, for `concepts.files`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, say_warning
from pipeline.files import require_writable
from ReasonAug.files import read_jsonl, require_texts, write_jsonl
from ReasonAug.generations import program, verdict
from ReasonAug.synthesis import stages
from ReasonAug.synthesis.calls import IMPORTED, imported_key
from ReasonAug.synthesis.completions import read_reply
from ReasonAug.synthesis.concepts import concept_id
from ReasonAug.synthesis.config import SynthesisConfig
from ReasonAug.synthesis.ledger import Ledger, Record

Row = dict[str, Any]
_FIX = "name a file of generations or of batch output"
_STAGES = (stages.DEFINITIONS, stages.PROBLEMS, stages.SOLVED)


def import_files(
    config: SynthesisConfig, *, generations: Path, definitions: Path | None, index: Path | None
) -> None:
    """Append the answers of the files to the ledger.

    Raises:
        UserError: a file is missing or damaged, or an answer cannot be assigned to an item.
    """
    require_writable(config.output_dir, key="output_dir")
    files = [path for path in (generations, definitions) if path is not None]
    if index is not None:
        rows = [row for path in files for row in _batch_rows(path, index)]
    else:
        rows = _released_rows(generations, definitions)
    if not rows:
        raise UserError(f"{generations}: no answer in it", fix=_FIX)
    counts: Counter[str] = Counter()
    replaced = 0
    with Ledger.open(config.output_dir / "ledger") as ledger:
        for stage, item, answer in _answers(config, rows):
            key = imported_key(stage, item)
            kept = ledger.stage(stage).find(key)
            if kept is not None and kept.answer == answer:
                counts["there already"] += 1
                continue
            replaced += kept is not None
            record = Record(
                key=key,
                item=item,
                status="ok",
                model=IMPORTED,
                prompt=f"{IMPORTED}@1",
                parameters={},
                answer=answer,
                attempts=0,
                origin="import",
            )
            ledger.stage(stage).append(record)
            counts[stage] += 1
    _say_left_out(rows, config.problems.per_concept)
    if replaced:
        say_warning(
            f"{replaced:,} answers replace answers of an earlier import: problems of a concept are "
            "numbered in the order of one file, so join files that belong together"
        )
    path = config.output_dir / "concepts.jsonl"
    earlier = read_jsonl(path, fix=_FIX) if path.exists() else []
    listed = {concept_id(row["domain"], row["concept"]): row for row in [*earlier, *rows]}
    write_jsonl(path, ({"domain": r["domain"], "concept": r["concept"]} for r in listed.values()))
    print(f"recorded: {', '.join(f'{name} {count:,}' for name, count in sorted(counts.items()))}")
    print(f"concepts: {len(listed)}, in {path}; name this file in concepts.files")


def _say_left_out(rows: list[Row], per_concept: int) -> None:
    """Say how many problems the stages will not take."""
    problems = [row for row in rows if row["stage"] == stages.PROBLEMS]
    numbers = [n for _, n in {(concept_id(r["domain"], r["concept"]), r["n"]) for r in problems}]
    if beyond := sum(n > per_concept for n in numbers):
        say_warning(
            f"{beyond:,} of {len(numbers):,} problems are left out by problems.per_concept="
            f"{per_concept}; set it to {max(numbers)} to use all"
        )


def _released_rows(generations: Path, definitions: Path | None) -> list[Row]:
    """Return the rows of the released layout as (stage, domain, concept, n, text)."""
    rows = []
    written = read_jsonl(generations, fix=_FIX)
    if written and "custom_id" in written[0]:
        raise UserError(
            f"{generations}: the output of a batch, without an index of its items", fix="--index"
        )
    require_texts(generations, written, ("domain", "concept", "generation"), optional="check")
    number: Counter[str] = Counter()
    for row in written:
        concept = concept_id(row["domain"], row["concept"])
        number[concept] += 1  # `n` of the released rows counts over all concepts
        item = {"domain": row["domain"], "concept": row["concept"], "n": number[concept]}
        rows.append({**item, "stage": stages.PROBLEMS, "text": row["generation"]})
        if row["check"] is not None:
            rows.append({**item, "stage": stages.SOLVED, "text": row["check"]})
    if definitions is not None:
        defined = read_jsonl(definitions, fix="name a file of definitions")
        require_texts(definitions, defined, ("domain", "concept", "definition"))
        for row in defined:
            item = {"domain": row["domain"], "concept": row["concept"], "n": 0}
            rows.append({**item, "stage": stages.DEFINITIONS, "text": row["definition"]})
    return rows


def _batch_rows(path: Path, index: Path) -> Iterator[Row]:
    """Yield the answers of a batch's output with their entries of the index."""
    named = read_jsonl(index, fix="name the index of the batch in --index")
    require_texts(index, named, ("custom_id", "stage", "domain", "concept"))
    items = {}
    for number, entry in enumerate(named, 1):
        n = entry.get("n", 0)
        if entry["stage"] not in _STAGES or isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise UserError(
                f"{index}: object {number}: stage {entry['stage']!r}, n {n!r}",
                allowed=f"a stage of {', '.join(_STAGES)}, and n from 1",
            )
        items[entry["custom_id"]] = {**entry, "n": n}
    failed, unknown = 0, 0
    for line in read_jsonl(path, fix=_FIX):
        response = line.get("response") or {}
        item = items.get(str(line.get("custom_id")))
        if item is None:
            unknown += 1
            continue
        try:
            reply = read_reply(response.get("body"))
        except ValueError:
            failed += 1
            continue
        if response.get("status_code", 200) != 200 or not reply.text:
            failed += 1
            continue
        yield {**item, "text": reply.text}
    for count, cause in ((failed, "without an answer"), (unknown, "that the index does not name")):
        if count:
            say_warning(f"{path}: {count:,} lines {cause} are left out")


def _answers(config: SynthesisConfig, rows: list[Row]) -> Iterator[tuple[str, str, str]]:
    """Yield (stage, item, answer) as the stages read them."""
    for row in rows:
        concept = concept_id(row["domain"], row["concept"])
        if row["stage"] == stages.DEFINITIONS:
            yield row["stage"], concept, row["text"].strip()
            continue
        item = f"{concept}/{row['n']}"
        if row["stage"] == stages.PROBLEMS:
            yield row["stage"], item, row["text"]
        else:
            yield row["stage"], item, _verdict(config, row)


def _verdict(config: SynthesisConfig, row: Row) -> str:
    """Return the verdict of a check, with the program that it holds in a coding domain."""
    accepted = verdict(row["text"])
    found: dict[str, Any] = {"accepted": accepted}
    if config.kind(row["domain"]) == "coding" and accepted:
        code = program(row["text"])
        found = {"accepted": code is not None, "solution": code, "reason": "no program in it"}
        if code is not None:
            del found["reason"]
    return json.dumps(found, ensure_ascii=False)
