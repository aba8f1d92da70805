"""Training triplets (query, document, hard negative) in the ReasonAug row format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from ReasonAug.concepts import CONCEPTS
from ReasonAug.negatives import nearest_others
from ReasonAug.problem import ALGORITHM, DATA_STRUCTURE, DOMAINS, Concept, Problem
from ReasonAug.splits import TRAIN, Entry, slug

Row = dict[str, str]

TASKS = {
    "p2i": "Given a problem, retrieve the concept that is needed to solve it",
    "i2ps": "Given the name of a concept, retrieve a worked problem that relies on it",
    "p2ps": "Given a problem, retrieve another worked problem that relies on the same concept",
    "ps2ps": "Given a worked problem, retrieve another one that relies on the same concept",
}
_CODING = (ALGORITHM, DATA_STRUCTURE)
_PAIRS = 4  # ordered pairs per problem of a concept
_NEAR = 8  # hard negatives are drawn from this many nearest documents


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draft:
    """A row that still lacks its negative."""

    kind: str
    concept: Concept
    query: str
    positive: str


def training_rows(entries: Sequence[Entry], *, seed: int) -> list[Row]:
    """All training rows, shuffled; only entries of the training split are used.

    Negatives come from another concept of the same domain and have the shape of the positive: a
    name for a name, a definition for a definition, a problem with its solution for another one.
    """
    rng = Random(f"{seed}/rows")
    problems: dict[str, list[Problem]] = {}
    for entry in entries:
        if entry.split == TRAIN:
            problems.setdefault(entry.problem.concept, []).append(entry.problem)
    rows: list[Row] = []
    for domain in DOMAINS:
        concepts = [c for c in CONCEPTS if c.domain == domain and c.name in problems]
        drafts = [draft for c in concepts for draft in _drafts(c, problems[c.name], rng)]
        rows.extend(_with_negatives(drafts, concepts, problems, rng))
    rng.shuffle(rows)
    return rows


def _drafts(concept: Concept, problems: list[Problem], rng: Random) -> Iterable[_Draft]:
    def draft(kind: str, query: str, positive: str) -> _Draft:
        return _Draft(kind=kind, concept=concept, query=query, positive=positive)

    for index, problem in enumerate(problems):
        by_name = index % 2 == 0
        answer = concept.name if by_name else concept.definition_body()
        yield draft("p2i", problem.statement, answer)
        if by_name:
            yield draft("i2ps", concept.name, _answer(problem))
    # Of the ordered pairs, a quarter has the richer query; the rest asks by the problem alone.
    for index, (asked, found) in enumerate(_pairs(problems, rng)):
        if index % 4:
            yield draft("p2ps", asked.statement, found.document())
        elif index % 8:
            yield draft("ps2ps", asked.document(), found.document())
        else:
            query = f"**Problem**\n{asked.statement}\n\n**Concept**\n{concept.name}"
            yield draft("ps2ps", query, found.document())


def _answer(problem: Problem) -> str:
    """What a concept's name should find: in a coding domain the solution alone."""
    return problem.solution if problem.domain in _CODING else problem.document()


def _pairs(problems: list[Problem], rng: Random) -> list[tuple[Problem, Problem]]:
    """Ordered pairs in which every problem asks equally often, mostly of different wording."""
    pairs: dict[tuple[int, int], None] = {}
    for a, asked in enumerate(problems):
        for _ in range(_PAIRS):
            others = [b for b in range(len(problems)) if b != a and (a, b) not in pairs]
            reworded = [b for b in others if problems[b].form != asked.form]
            if pool := reworded if reworded and rng.random() < 0.8 else others:
                pairs[a, rng.choice(pool)] = None
    return [(problems[a], problems[b]) for a, b in pairs]


def _with_negatives(
    drafts: list[_Draft], concepts: list[Concept], problems: dict[str, list[Problem]], rng: Random
) -> Iterable[Row]:
    """Complete the drafts of one domain."""
    everything = [problem for concept in concepts for problem in problems[concept.name]]
    labels = [problem.concept for problem in everything]
    names = [concept.name for concept in concepts]
    shapes: dict[str, tuple[list[str], list[str]]] = {
        "name": (names, names),
        "definition": ([concept.definition_body() for concept in concepts], names),
        "answer": ([_answer(problem) for problem in everything], labels),
        "document": ([problem.document() for problem in everything], labels),
    }
    number: Counter[str] = Counter()
    for shape, (documents, owners) in shapes.items():
        chosen = [draft for draft in drafts if _shape(draft) == shape]
        # A name holds too few words to be near anything: compare by definition instead.
        searched = shapes["definition"][0] if shape == "name" else documents
        near = nearest_others(
            [draft.query for draft in chosen],
            [draft.concept.name for draft in chosen],
            searched,
            owners,
            count=2 if shape in ("name", "definition") else _NEAR,
        )
        for draft, candidates in zip(chosen, near, strict=True):
            pick = rng.choice(candidates)
            family = f"{draft.kind}-{slug(draft.concept.name)}"
            number[family] += 1
            yield {
                "id": f"{family}-{number[family]:04d}",
                "domain": draft.concept.domain,
                "instance": draft.concept.name,
                "task_type": draft.kind,
                "task": TASKS[draft.kind],
                "user_query": draft.query,
                "positive_document": draft.positive,
                "hard_negative_document": documents[pick],
                "negative_instance": owners[pick],
            }


def _shape(draft: _Draft) -> str:
    if draft.kind == "p2i":
        return "name" if draft.positive == draft.concept.name else "definition"
    return "answer" if draft.kind == "i2ps" else "document"
