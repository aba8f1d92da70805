"""Make training rows of accepted problems: every kind, with its proportions and hard negatives.

    kind           query                          positive                          rows per concept
    p2i            problem                        name or definition                negatives x n
    i2ps           name of the concept            worked problem (coding: solution) n
    p2ps           problem                        another worked problem            } max_pairs,
    ps2ps          worked problem, or with name   another worked problem            } shared
    p2ps-written   problem i                      worked problem i+1 mod n          n
    forum, exam    the problem, rewritten         another worked problem            as drawn
    long           the problem among other texts  another worked problem            as drawn

A hard negative has the shape of the positive, lest the shape give the answer away. It is a near
text of another concept of the domain; in p2ps-written, one that the model wrote for the query.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from pipeline.errors import UserError, say_warning
from ReasonAug.generations import GeneratedProblem
from ReasonAug.problem import num_tokens
from ReasonAug.splits import is_held_out
from ReasonAug.synthesis.config import SynthesisConfig
from ReasonAug.synthesis.lines import Lines
from ReasonAug.synthesis.nearest import Bm25Nearest, DenseNearest, Nearest, load_embedder
from ReasonAug.triplets import CODING, TASKS, Row, answer, with_concept

WRITTEN = "p2ps-written"
ALL_TASKS = {
    **TASKS,
    WRITTEN: TASKS["p2ps"],
    "forum": "Given a question from a forum, retrieve a worked problem that relies on the concept "
    "needed to answer it",
    "exam": "Given an examination question, retrieve a worked problem that relies on the same "
    "concept",
    "long": "Given a long text with a problem in it, retrieve a worked problem that relies on the "
    "same concept",
}
_POOL = 20_000  # worked problems of a domain that negatives are searched among


@dataclasses.dataclass(slots=True)
class RowCounts:
    """Outcomes of the items that reached the rows."""

    rows: Counter[str] = dataclasses.field(default_factory=Counter)
    domains: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    concepts: Counter[str] = dataclasses.field(default_factory=Counter)
    held_out: list[str] = dataclasses.field(default_factory=list)
    skipped_domains: list[str] = dataclasses.field(default_factory=list)
    without_pair: int = 0  # concepts with a single problem


@dataclasses.dataclass(frozen=True, slots=True)
class _Domain:
    """The accepted problems of one domain, by concept; texts stay on the disk."""

    name: str
    lines: Lines
    numbers: dict[str, list[int]]  # concept -> lines of its problems
    definitions: dict[str, str]

    def problem(self, number: int) -> GeneratedProblem:
        return as_problem(self.lines[number])


def as_problem(item: dict[str, Any]) -> GeneratedProblem:
    """Return an item as a problem; a program gets its fence back."""
    solution = item["solution"]
    if item["kind"] == "coding" and "```" not in solution:
        solution = f"```python\n{solution}\n```"
    return GeneratedProblem(
        concept=item["concept"],
        domain=item["domain"],
        statement=item["problem"],
        solution=solution,
    )


def _answer(problem: GeneratedProblem, kind: str) -> str:
    """Return what the name of a concept should find: in a coding domain the solution alone."""
    if kind == "coding" and problem.domain not in CODING:
        return problem.solution
    return answer(problem)


def training_rows(config: SynthesisConfig, lines: Lines, counts: RowCounts) -> Iterator[Row]:
    """Yield the rows of all domains; the same for the same lines.

    Raises:
        UserError: no domain has accepted problems of two concepts.
    """
    domains = _read_domains(config, lines, counts)
    usable = [domain for domain in domains if len(domain.numbers) > 1]
    for domain in domains:
        if len(domain.numbers) < 2:
            (only,) = domain.numbers
            counts.skipped_domains.append(domain.name)
            say_warning(
                f"domain {domain.name!r}: no rows, because only {only!r} has accepted problems, "
                "and a hard negative is of another concept"
            )
    if not usable:
        raise UserError(
            found="no domain with accepted problems of two concepts",
            allowed="at least two concepts in a domain: negatives are of another one",
            fix="add concepts; stages/*.jsonl say why items were dropped",
        )
    embedder = load_embedder(config.negatives.export) if config.negatives.export else None
    for domain in usable:
        counts.concepts[domain.name] = len(domain.numbers)
        by_kind = counts.domains.setdefault(domain.name, Counter())
        for row in _DomainRows(config, domain, embedder, counts).rows():
            counts.rows[row["task_type"]] += 1
            by_kind[row["task_type"]] += 1
            yield row


def _read_domains(config: SynthesisConfig, lines: Lines, counts: RowCounts) -> list[_Domain]:
    found: dict[str, _Domain] = {}
    held_out: dict[str, None] = {}
    for number in range(len(lines)):
        item = lines[number]
        if item["dropped"] is not None:
            continue
        name, concept = item["domain"], item["concept"]
        if is_held_out(concept, share=config.rows.held_out, seed=config.seed):
            held_out[concept] = None
            continue
        domain = found.setdefault(name, _Domain(name, lines, {}, {}))
        domain.numbers.setdefault(concept, []).append(number)
        domain.definitions.setdefault(concept, item["definition"])
    counts.held_out = list(held_out)
    return list(found.values())


class _DomainRows:
    """Make the rows of one domain, concept by concept."""

    def __init__(
        self, config: SynthesisConfig, domain: _Domain, embedder: Any, counts: RowCounts
    ) -> None:
        self._config, self._domain, self._counts = config, domain, counts
        self._embedder = embedder
        self._kind = config.kind(domain.name)
        self._names = list(domain.definitions)
        self._definitions = self._index(list(domain.definitions.values()), self._names)
        self._pool = self._draw_pool()
        labels = [label for label, _ in self._pool]
        documents = (domain.problem(number).document() for _, number in self._pool)
        self._documents = self._index(documents, labels)
        self._answers = self._documents
        if self._kind == "coding":
            solutions = (domain.problem(number).solution for _, number in self._pool)
            self._answers = self._index(solutions, labels)

    def _draw_pool(self) -> list[tuple[str, int]]:
        pool = [(name, n) for name, numbers in self._domain.numbers.items() for n in numbers]
        if len(pool) > _POOL:
            Random(f"{self._config.seed}/pool/{self._domain.name}").shuffle(pool)
        return pool[:_POOL]

    def _index(self, documents: Any, labels: Sequence[str]) -> Nearest:
        if self._embedder is not None:
            return DenseNearest(self._embedder, documents, labels)
        return Bm25Nearest(documents, labels)

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all concepts."""
        for concept, numbers in self._domain.numbers.items():
            yield from self._of_concept(concept, [self._domain.lines[n] for n in numbers])

    def _of_concept(self, concept: str, items: list[dict[str, Any]]) -> Iterator[Row]:
        identity = items[0]["id"].partition("/")[0]
        rng = Random(f"{self._config.seed}/rows/{identity}")
        problems = [as_problem(item) for item in items]
        near: dict[tuple[str, str, int], list[int]] = {}
        number: Counter[str] = Counter()

        def search(index: Nearest, kind: str, query: str, count: int) -> list[int]:
            key = (kind.partition("-")[0], query, id(index))
            if key not in near:
                near[key] = index.search(query, ALL_TASKS[kind], concept, count=count)
            return near[key]

        def row(kind: str, query: str, positive: str, negative: tuple[str, str]) -> Row:
            number[kind] += 1
            return {
                "id": f"{kind}-{identity}-{number[kind]:04d}",
                "domain": self._domain.name,
                "instance": concept,
                "task_type": kind,
                "task": ALL_TASKS[kind],
                "user_query": query,
                "positive_document": positive,
                "hard_negative_document": negative[1],
                "negative_instance": negative[0],
            }

        def near_problem(kind: str, query: str) -> tuple[str, str]:
            index = self._answers if kind == "i2ps" else self._documents
            found = search(index, kind, query, self._config.negatives.near_problems)
            other, line = self._pool[rng.choice(found)]
            problem = self._domain.problem(line)
            text = _answer(problem, self._kind) if kind == "i2ps" else problem.document()
            return other, text

        for problem in problems:
            yield from self._name_rows(problem, rng, search, row)
            negative = near_problem("i2ps", concept)
            yield row("i2ps", concept, _answer(problem, self._kind), negative)
        for kind, query, positive in self._pairs(problems, rng):
            yield row(kind, query, positive, near_problem(kind, query))
        if len(problems) < 2:
            self._counts.without_pair += 1
            return
        for k, item in enumerate(items):
            positive = problems[(k + 1) % len(problems)].document()
            yield from self._written(item, problems[k], positive, row)
            for kind, query in self._other_forms(item):
                yield row(kind, query, positive, near_problem(kind, query))

    def _name_rows(
        self, problem: GeneratedProblem, rng: Random, search: Any, row: Any
    ) -> Iterator[Row]:
        settings = self._config
        by_definition = rng.random() < settings.rows.definition_share
        count = max(settings.negatives.near_concepts, settings.rows.p2i_negatives)
        # A name has too few words to be near anything, so definitions are compared for both.
        found = search(self._definitions, "p2i", problem.statement, count)
        for pick in rng.sample(found, min(len(found), settings.rows.p2i_negatives)):
            other, own = self._names[pick], problem.concept
            if by_definition:
                positive = self._domain.definitions[own]
                negative = (other, self._domain.definitions[other])
            else:
                positive, negative = own, (other, other)
            yield row("p2i", problem.statement, positive, negative)

    def _pairs(
        self, problems: Sequence[GeneratedProblem], rng: Random
    ) -> Iterator[tuple[str, str, str]]:
        pairs = [(a, b) for a in problems for b in problems if a is not b]
        count = min(len(pairs), self._config.rows.max_pairs)
        for asked, found in rng.sample(pairs, count):
            if rng.random() >= self._config.rows.rich_share:
                yield "p2ps", asked.statement, found.document()
            else:
                query = rng.choice((asked.document(), with_concept(asked)))
                yield "ps2ps", query, found.document()

    def _written(
        self, item: dict[str, Any], problem: GeneratedProblem, positive: str, row: Any
    ) -> Iterator[Row]:
        written = item["written_negative"]
        if written is None:
            return
        text = as_problem({**item, **written}).document()
        yield row(WRITTEN, problem.statement, positive, (written["concept"], text))

    def _other_forms(self, item: dict[str, Any]) -> Iterator[tuple[str, str]]:
        rewrites = item["rewrites"]
        for kind in ("forum", "exam"):
            if rewrites[kind]:
                yield kind, rewrites[kind]
        if rewrites["long"]:
            yield "long", self._among_others(item)

    def _among_others(self, item: dict[str, Any]) -> str:
        """Return the problem at a random place among solutions of other concepts."""
        rng = Random(f"{self._config.seed}/long/{item['id']}")
        room = self._config.rewrites.long_tokens - num_tokens(item["problem"])
        question = f"**Question**\n{item['problem']}"
        notes: list[str] = []
        others = [entry for entry in self._pool if entry[0] != item["concept"]]
        for _, line in rng.sample(others, min(len(others), 1 + max(0, room) // 8)):
            note = f"**Note**\n{self._domain.problem(line).solution}"
            room -= num_tokens(note)
            if room < 0:
                break
            notes.append(note)
        notes.insert(rng.randint(0, len(notes)), question)
        return "\n\n".join(notes)


def counts_by_stage(files: dict[str, Any]) -> dict[str, dict[str, Counter[str]]]:
    """Count the items of each stage by domain and by what became of them."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for stage, items in files.items():
        by_domain: dict[str, Counter[str]] = defaultdict(Counter)
        for item in items:
            by_domain[item["domain"]][item["dropped"] or "kept"] += 1
        found[stage] = dict(by_domain)
    return found
