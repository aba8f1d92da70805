"""What a concept is, and how it becomes problems whose solutions were checked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from ReasonAug.scenes import Scene, background, draw_scene

ALGORITHM = "algorithm"
DATA_STRUCTURE = "data structure"
MATH = "math theorem"
PHYSICS = "physics theorem"
FINANCE = "finance formula"
DOMAINS = (ALGORITHM, DATA_STRUCTURE, MATH, PHYSICS, FINANCE)

Values = Mapping[str, Any]

_NUMERIC_CLOSINGS = (
    "",
    "Show the reasoning.",
    "Round the result if it is not a whole number.",
    "Explain each step briefly.",
    "What is the value?",
    "A short justification is enough.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Concept:
    """A named idea with a family of problems that need it.

    Attributes:
        definition: What the idea says. Line breaks inside a paragraph are free.
        draw: Draws the numbers of one problem, solves it, and raises ArithmeticError unless a
            second, independent method agrees.
        forms: Problem texts separated by blank lines, as `str.format` templates over the drawn
            values and the scene. The last form never occurs in training.
        solutions: Worked solutions, in the same notation.
        verified_by: The second method, in words.
        held_out: True if nothing of this concept may be trained on.
        code: The implementation in a coding domain, otherwise empty.
    """

    name: str
    domain: str
    definition: str
    draw: Callable[[Random], Values]
    forms: str
    solutions: str
    verified_by: str
    held_out: bool = False
    code: str = ""

    def definition_body(self) -> str:
        """The definition as a document, with the implementation in a coding domain."""
        body = f"**Concept**\n{self.name}\n\n**Definition**\n{' '.join(self.definition.split())}"
        if not self.code:
            return body
        return f"{body}\n\n**Implementation Code**\n```python\n{self.code.strip()}\n```"


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One problem with its checked solution; `form` is the index of its wording."""

    concept: str
    domain: str
    form: int
    world: str
    place: str
    statement: str
    solution: str
    verification: str

    def document(self) -> str:
        """Problem and solution as one document."""
        return f"**Problem**\n{self.statement}\n\n**Solution**\n{self.solution}"


def paragraphs(text: str) -> tuple[str, ...]:
    """The blank-line separated paragraphs of `text`, each on one line."""
    return tuple(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def num_tokens(text: str) -> int:
    """A tokenizer-free estimate of the length of `text`: words and single symbols."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def agree(found: float, expected: float, *, tolerance: float = 1e-6) -> None:
    """Raise ArithmeticError unless the two methods give the same number (relative tolerance)."""
    if not math.isclose(found, expected, rel_tol=tolerance, abs_tol=1e-12):
        raise ArithmeticError(f"solution {found!r} disagrees with the second method {expected!r}")


def compose(concept: Concept, rng: Random, *, form: int, max_tokens: int) -> Problem:
    """Write one problem of `concept` in the given form.

    Args:
        rng: The only source of variation.
        form: Index into the forms of the concept.
        max_tokens: Background stops before problem and solution pass this length (`num_tokens`).
    """
    values = dict(concept.draw(rng))
    scene = draw_scene(rng)
    fields = {**scene.fields(), **values}
    core = paragraphs(concept.forms)[form].format(**fields)
    core = core[0].upper() + core[1:]
    solution = rng.choice(paragraphs(concept.solutions)).format(**fields)
    tail = values.get("statement_tail", "") or rng.choice(_NUMERIC_CLOSINGS)
    solution += values.get("solution_tail", "")
    budget = max_tokens - num_tokens(f"{core} {tail} {solution}") - 8  # 8: the two headings
    statement = _surround(core, tail, scene, rng, budget)
    return Problem(
        concept=concept.name,
        domain=concept.domain,
        form=form,
        world=scene.world,
        place=scene.place,
        statement=statement,
        solution=solution,
        verification=concept.verified_by,
    )


def _surround(core: str, tail: str, scene: Scene, rng: Random, budget: int) -> str:
    """Put background around the core: mostly little, sometimes a page."""
    wanted = rng.choices((0, 1, 2, 3, 8, 30, 65), weights=(8, 24, 24, 18, 14, 7, 5))[0]
    wanted = rng.randint((wanted + 1) // 2, wanted)
    before: list[str] = []
    after: list[str] = []
    for index, sentence in enumerate(background(scene, rng, wanted)):
        budget -= num_tokens(sentence)
        if budget < 0:
            break
        (before if index < 2 and rng.random() < 0.7 else after).append(sentence)
    head = " ".join([*before, core, *after])
    return f"{head}{tail}" if tail.startswith("\n") else f"{head} {tail}".strip()
