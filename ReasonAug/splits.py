"""Split problems into training, unseen problems and unseen concepts, apart by construction.

`train` and `unseen_problems` share concepts but no problem; `unseen_concepts` shares nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random

from pipeline.errors import UserError
from ReasonAug.concepts import CONCEPTS
from ReasonAug.problem import Concept, Problem, compose

TRAIN = "train"
UNSEEN_PROBLEMS = "unseen_problems"
UNSEEN_CONCEPTS = "unseen_concepts"

MAX_OVERLAP = 0.5  # of word 5-grams, between an unseen problem and any training problem
_SHINGLE = 5
_ATTEMPTS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A problem with its identifier and split."""

    id: str
    split: str
    problem: Problem

    def row(self) -> dict[str, object]:
        """Return the entry as a line of `problems.jsonl`."""
        return {"id": self.id, "split": self.split, **asdict(self.problem)}


def slug(name: str) -> str:
    """Return `name` as a part of an identifier."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("'", "")).strip("-")


def is_held_out(concept: str, *, share: float, seed: int) -> bool:
    """Return True if a concept of given generations is held out, by the hash of its name.

    The name alone decides, so a concept stays where it is when others come or go, and one that two
    domains know goes the same way in both.
    """
    digest = hashlib.sha256(f"{seed}/{slug(concept)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def by_concept(entries: Sequence[Entry], split: str) -> dict[str, list[Entry]]:
    """Return the entries of a split, grouped by concept in order of appearance."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.split == split:
            groups.setdefault(entry.problem.concept, []).append(entry)
    return groups


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Return the word 5-grams of `text`, in lower case."""
    words = re.findall(r"\w+", text.lower())
    count = max(1, len(words) - _SHINGLE + 1)
    return frozenset(tuple(words[i : i + _SHINGLE]) for i in range(count))


def overlap(a: frozenset[tuple[str, ...]], b: frozenset[tuple[str, ...]]) -> float:
    """Return the Jaccard similarity of two sets of shingles."""
    return len(a & b) / len(a | b)


def make_entries(*, seed: int, problems_per_concept: int, max_tokens: int) -> list[Entry]:
    """Return all problems of all concepts with their splits; the same for the same arguments.

    Of a seen concept a quarter becomes `unseen_problems`: half of these in the one form that
    training never shows, the others in known forms, but far from every training text.

    Raises:
        UserError: No sufficiently different problem was found.
    """
    entries: list[Entry] = []
    for concept in CONCEPTS:
        entries.extend(_entries_of(concept, seed, problems_per_concept, max_tokens))
    return entries


def _entries_of(concept: Concept, seed: int, count: int, max_tokens: int) -> Iterator[Entry]:
    last = len(concept.forms) - 1
    num_unseen = max(4, count // 4)
    known: list[frozenset[tuple[str, ...]]] = []
    taken: set[str] = set()
    for index in range(count):
        if concept.held_out:
            split, form = UNSEEN_CONCEPTS, index % (last + 1)
        elif index < count - num_unseen:
            split, form = TRAIN, index % last
        else:
            split, form = UNSEEN_PROBLEMS, last if index % 2 else index // 2 % last
        name = f"{slug(concept.name)}-{index:04d}"
        rivals = known if split == UNSEEN_PROBLEMS else []
        problem = _distinct(concept, f"{seed}/{name}", form, max_tokens, rivals, taken)
        taken.add(problem.statement)
        if split == TRAIN:
            known.append(shingles(problem.statement))
        yield Entry(id=name, split=split, problem=problem)


def _distinct(
    concept: Concept,
    key: str,
    form: int,
    max_tokens: int,
    rivals: list[frozenset[tuple[str, ...]]],
    taken: set[str],
) -> Problem:
    """Draw until the statement is new, and different enough from every rival."""
    for attempt in range(_ATTEMPTS):
        problem = compose(concept, Random(f"{key}/{attempt}"), form=form, max_tokens=max_tokens)
        if problem.statement in taken:
            continue
        mine = shingles(problem.statement)
        if all(overlap(mine, other) <= MAX_OVERLAP for other in rivals):
            return problem
    raise UserError(
        found=f"{_ATTEMPTS} draws of {concept.name!r} found no problem unlike the others",
        fix="raise --max-tokens or lower --problems-per-concept",
    )
