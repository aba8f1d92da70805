"""Define a concept, and write problems of it whose solutions are verified.

concepts/NAME.py    draws the numbers of a problem, and solves it in two ways
concepts/NAME.yaml  definition, wordings and worked solutions with {names} of those numbers
scenes.py           people, places and background, the same for all concepts
"""

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
        definition: The idea in one paragraph.
        draw: Draws the numbers of one problem, solves it, and raises ArithmeticError unless a
            second, independent method agrees.
        forms: Problem texts, as `str.format` templates over the drawn values and the scene. The
            last form never occurs in training.
        solutions: Worked solutions, in the same notation.
        verified_by: The second method, in words.
        held_out: True if nothing of this concept may be trained on.
        code: The implementation in a coding domain, otherwise empty.
    """

    name: str
    domain: str
    definition: str
    draw: Callable[[Random], Values]
    forms: tuple[str, ...]
    solutions: tuple[str, ...]
    verified_by: str
    held_out: bool = False
    code: str = ""

    @classmethod
    def with_texts(cls, texts: Mapping[str, Any], *, name: str, **code: Any) -> Concept:
        """Return a concept whose definition, forms and solutions are in `texts` by its name."""
        own = texts[name]
        forms, solutions = tuple(own["forms"]), tuple(own["solutions"])
        definition = own["definition"]
        return cls(name=name, definition=definition, forms=forms, solutions=solutions, **code)

    def definition_body(self) -> str:
        """Return the definition as a document, with the implementation in a coding domain."""
        body = f"**Concept**\n{self.name}\n\n**Definition**\n{self.definition}"
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
        """Return problem and solution as one document."""
        return f"**Problem**\n{self.statement}\n\n**Solution**\n{self.solution}"


def num_tokens(text: str) -> int:
    """Estimate the length of `text` without a tokenizer: words and single symbols."""
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
    core = concept.forms[form].format(**fields)
    core = core[0].upper() + core[1:]
    solution = rng.choice(concept.solutions).format(**fields)
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
