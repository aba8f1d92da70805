"""Make training triplets (query, document, hard negative) of the built-in concepts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

from ReasonAug.concepts import CONCEPTS
from ReasonAug.problem import DOMAINS, Concept, Problem
from ReasonAug.splits import TRAIN, Entry
from ReasonAug.triplets import Draft, Row, answer, complete, with_concept

_PAIRS = 4  # ordered pairs per problem of a concept


def training_rows(entries: Sequence[Entry], *, seed: int) -> list[Row]:
    """Return all training rows, shuffled; only entries of the training split are used."""
    rng = Random(f"{seed}/rows")
    problems: dict[str, list[Problem]] = {}
    for entry in entries:
        if entry.split == TRAIN:
            problems.setdefault(entry.problem.concept, []).append(entry.problem)
    rows: list[Row] = []
    for domain in DOMAINS:
        concepts = [c for c in CONCEPTS if c.domain == domain and c.name in problems]
        drafts = [draft for c in concepts for draft in _drafts(c, problems[c.name], rng)]
        rows.extend(
            complete(
                drafts,
                domain=domain,
                definitions={concept.name: concept.definition_body() for concept in concepts},
                problems=[problem for concept in concepts for problem in problems[concept.name]],
                rng=rng,
            )
        )
    rng.shuffle(rows)
    return rows


def _drafts(concept: Concept, problems: list[Problem], rng: Random) -> Iterable[Draft]:
    def draft(kind: str, query: str, positive: str) -> Draft:
        return Draft(kind=kind, concept=concept.name, query=query, positive=positive)

    for index, problem in enumerate(problems):
        by_name = index % 2 == 0
        target = concept.name if by_name else concept.definition_body()
        yield draft("p2i", problem.statement, target)
        if by_name:
            yield draft("i2ps", concept.name, answer(problem))
    # A quarter of the ordered pairs has the richer query, the rest the problem alone.
    for index, (asked, found) in enumerate(_pairs(problems, rng)):
        if index % 4:
            yield draft("p2ps", asked.statement, found.document())
        elif index % 8:
            yield draft("ps2ps", asked.document(), found.document())
        else:
            yield draft("ps2ps", with_concept(asked), found.document())


def _pairs(problems: list[Problem], rng: Random) -> list[tuple[Problem, Problem]]:
    """Return ordered pairs, every problem equally often first, mostly of different wording."""
    pairs: dict[tuple[int, int], None] = {}
    for a, asked in enumerate(problems):
        for _ in range(_PAIRS):
            others = [b for b in range(len(problems)) if b != a and (a, b) not in pairs]
            reworded = [b for b in others if problems[b].form != asked.form]
            if pool := reworded if reworded and rng.random() < 0.8 else others:
                pairs[a, rng.choice(pool)] = None
    return [(problems[a], problems[b]) for a, b in pairs]
