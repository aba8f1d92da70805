"""Complete training rows with hard negatives: texts of another concept that are near by BM25."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from ReasonAug.negatives import nearest_others
from ReasonAug.problem import ALGORITHM, DATA_STRUCTURE
from ReasonAug.splits import slug

Row = dict[str, str]

TASKS = {
    "p2i": "Given a problem, retrieve the concept that is needed to solve it",
    "i2ps": "Given the name of a concept, retrieve a worked problem that relies on it",
    "p2ps": "Given a problem, retrieve another worked problem that relies on the same concept",
    "ps2ps": "Given a worked problem, retrieve another one that relies on the same concept",
}
CODING = (ALGORITHM, DATA_STRUCTURE)
_NEAR_CONCEPTS = 2  # draw a name or definition from this many nearest ones,
_NEAR_PROBLEMS = 8  # a worked problem from this many


class Solved(Protocol):
    """A problem with its solution."""

    @property
    def concept(self) -> str:
        """Name of the concept that the problem needs."""

    @property
    def domain(self) -> str:
        """Domain of the concept."""

    @property
    def statement(self) -> str:
        """The problem alone."""

    @property
    def solution(self) -> str:
        """The solution alone."""

    def document(self) -> str:
        """Problem and solution as one document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A row that still lacks its negative."""

    kind: str
    concept: str
    query: str
    positive: str


def answer(problem: Solved) -> str:
    """Return the text that a concept's name should find: in a coding domain the solution alone."""
    return problem.solution if problem.domain in CODING else problem.document()


def with_concept(problem: Solved) -> str:
    """Return a query that names the concept which its problem needs."""
    return f"**Problem**\n{problem.statement}\n\n**Concept**\n{problem.concept}"


def complete(
    drafts: Sequence[Draft],
    *,
    domain: str,
    definitions: Mapping[str, str],
    problems: Sequence[Solved],
    rng: Random,
    row_per_negative: Container[str] = (),
) -> Iterable[Row]:
    """Complete the drafts of one domain.

    A negative has the shape of the positive, lest the shape give the answer away: a name for a
    name, a definition for a definition, a problem with its solution for another one.

    Args:
        definitions: Of each concept of the domain; at least two.
        problems: All that a negative may be taken from.
        row_per_negative: Kinds that become a row for each near negative instead of for one drawn.
    """
    labels = [problem.concept for problem in problems]
    names = list(definitions)
    shapes: dict[str, tuple[list[str], list[str]]] = {
        "name": (names, names),
        "definition": (list(definitions.values()), names),
        "answer": ([answer(problem) for problem in problems], labels),
        "document": ([problem.document() for problem in problems], labels),
    }
    number: Counter[str] = Counter()
    for shape, (documents, owners) in shapes.items():
        chosen = [draft for draft in drafts if _shape(draft) == shape]
        # A name has too few words to be near anything: compare by definition instead.
        searched = shapes["definition"][0] if shape == "name" else documents
        near = nearest_others(
            [draft.query for draft in chosen],
            [draft.concept for draft in chosen],
            searched,
            owners,
            count=_NEAR_CONCEPTS if shape in ("name", "definition") else _NEAR_PROBLEMS,
        )
        for draft, candidates in zip(chosen, near, strict=True):
            if draft.kind not in row_per_negative:
                candidates = [rng.choice(candidates)]
            for pick in candidates:
                family = f"{draft.kind}-{slug(draft.concept)}"
                number[family] += 1
                yield {
                    "id": f"{family}-{number[family]:04d}",
                    "domain": domain,
                    "instance": draft.concept,
                    "task_type": draft.kind,
                    "task": TASKS[draft.kind],
                    "user_query": draft.query,
                    "positive_document": draft.positive,
                    "hard_negative_document": documents[pick],
                    "negative_instance": owners[pick],
                }


def _shape(draft: Draft) -> str:
    if draft.kind == "p2i":
        return "name" if draft.positive == draft.concept else "definition"
    return "answer" if draft.kind == "i2ps" else "document"
