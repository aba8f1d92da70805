"""Make training rows from generations: problem, concept and worked problems find each other.

Rows whose hard negative a language model writes are not among them: that takes such a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from pipeline.errors import UserError
from pipeline.files import write_json
from ReasonAug.files import make_folder, write_jsonl
from ReasonAug.generations import GeneratedProblem, by_domain, read_definitions, read_generations
from ReasonAug.replicas.generated import write_generated_bright
from ReasonAug.splits import is_held_out
from ReasonAug.triplets import Draft, Row, answer, complete, with_concept

_MAX_PAIRS = 20  # ordered pairs of problems per concept
_MISSING_KIND = "rows whose hard negative a language model writes: that takes such a model"

Problems = Sequence[GeneratedProblem]


def write_generation_rows(
    generations: Path,
    definitions: Path,
    out: Path,
    *,
    seed: int,
    held_out: float = 0.0,
    hub: Path | None = None,
) -> dict[str, Any]:
    """Write the rows to `out`, and counts of used and rejected generations to `<out>.summary.json`.

    Args:
        held_out: Share of the concepts of which nothing becomes a row.
        hub: Folder for a BRIGHT replica whose queries are the problems of these concepts.

    Returns:
        The content of the summary.

    Raises:
        UserError: A file is missing or damaged, a definition is missing, too little passed, or an
            argument is out of range.
    """
    _check_held_out(held_out, hub)
    everything, fates = read_generations(generations)
    problems = [p for p in everything if not is_held_out(p.concept, share=held_out, seed=seed)]
    kept_out = sorted({p.concept for p in everything} - {p.concept for p in problems})
    bodies = read_definitions(definitions)
    _require_definitions(problems, bodies, definitions)
    rows = generation_rows(problems, bodies, seed=seed)
    if hub is not None:
        write_generated_bright(hub, everything, held_out=set(kept_out))
    summary = {
        "arguments": {"seed": seed, "held_out": held_out},
        "generations": {"total": fates.total(), **dict(sorted(fates.items()))},
        "repeated_problems": fates["accepted"] - len(everything),
        "concepts": {domain: len(group) for domain, group in by_domain(problems).items()},
        "held_out_concepts": kept_out,
        "rows": dict(sorted(Counter(row["task_type"] for row in rows).items())),
        "left_out": _MISSING_KIND,
    }
    make_folder(out.parent)
    write_jsonl(out, rows)
    write_json(out.with_suffix(".summary.json"), summary)
    _print(summary, out)
    return summary


def generation_rows(
    problems: Problems, definitions: Mapping[tuple[str, str], str], *, seed: int
) -> list[Row]:
    """Return all rows, shuffled; the same for the same problems in the same order.

    Args:
        definitions: The text of each (domain, concept).

    Raises:
        UserError: A domain has one concept only, so that nothing can be a negative.
    """
    rng = Random(f"{seed}/generation rows")
    rows: list[Row] = []
    for domain, concepts in by_domain(problems).items():
        if len(concepts) < 2:
            raise UserError(
                found=f"domain {domain!r}: accepted generations of {next(iter(concepts))!r} only",
                allowed="at least two concepts in a domain: negatives are of another one",
                fix="generate more, or leave the domain out",
            )
        texts = {name: definitions[domain, name] for name in concepts}
        drafts = [
            draft
            for name, own in concepts.items()
            for draft in _drafts(name, texts[name], own, rng)
        ]
        rows.extend(
            complete(
                drafts,
                domain=domain,
                definitions=texts,
                problems=[problem for own in concepts.values() for problem in own],
                rng=rng,
                row_per_negative=("p2i",),
            )
        )
    rng.shuffle(rows)
    return rows


def _drafts(concept: str, definition: str, problems: Problems, rng: Random) -> Iterable[Draft]:
    def draft(kind: str, query: str, positive: str) -> Draft:
        return Draft(kind=kind, concept=concept, query=query, positive=positive)

    for problem in problems:
        yield draft("p2i", problem.statement, rng.choice((concept, definition)))
        yield draft("i2ps", concept, answer(problem))
    pairs = [(a, b) for a in problems for b in problems if a is not b]
    for asked, found in rng.sample(pairs, min(len(pairs), _MAX_PAIRS)):
        if rng.random() < 0.75:
            yield draft("p2ps", asked.statement, found.document())
        else:
            query = rng.choice((asked.document(), with_concept(asked)))
            yield draft("ps2ps", query, found.document())


def _check_held_out(share: float, hub: Path | None) -> None:
    if not 0 <= share < 1:
        raise UserError(found=f"--held-out {share:g}", allowed="0 <= share < 1")
    if hub is not None and share == 0:
        raise UserError(
            found=f"--hub {hub} without --held-out",
            allowed="a replica of concepts that are not trained on",
            fix="add --held-out 0.25",
        )


def _require_definitions(
    problems: Problems, definitions: Mapping[tuple[str, str], str], path: Path
) -> None:
    for problem in problems:
        if not definitions.get((problem.domain, problem.concept)):
            raise UserError(
                found=f"{path}: no definition of {problem.concept!r} ({problem.domain})",
                allowed="a definition of every concept of the generations",
            )


def _print(summary: Mapping[str, Any], out: Path) -> None:
    counts = ", ".join(f"{name} {count}" for name, count in summary["generations"].items())
    kinds = ", ".join(f"{kind} {count}" for kind, count in summary["rows"].items())
    if repeated := summary["repeated_problems"]:
        counts += f"; of the accepted, {repeated} repeat another one"
    print(f"generations: {counts}")
    print(f"concepts: {sum(summary['concepts'].values())}")
    if summary["held_out_concepts"]:
        print(f"held out: {len(summary['held_out_concepts'])} more concepts")
    print(f"training rows: {sum(summary['rows'].values())} ({kinds})")
    print(f"left out: {summary['left_out']}")
    print(f"written: {out}")
