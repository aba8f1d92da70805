"""Data structure families: stacks, queues, maps; solutions run against brute force."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from pipeline.config.loading import read_yaml
from ReasonAug.problem import DATA_STRUCTURE, Concept
from ReasonAug.programs import coding_draw

TEXTS = read_yaml(Path(__file__).with_suffix(".yaml"))


_BRACKETS = """
def solve(text):
    partner = {")": "(", "]": "[", "}": "{"}
    stack = []
    for symbol in text:
        if symbol in partner:
            if not stack or stack.pop() != partner[symbol]:
                return False
        else:
            stack.append(symbol)
    return not stack
"""


def _cancels(text: str) -> bool:
    """Erase neighbouring partners until nothing changes."""
    while (shorter := text.replace("()", "").replace("[]", "").replace("{}", "")) != text:
        text = shorter
    return not text


def _brackets(rng: Random) -> tuple[Any, ...]:
    text = ""
    for _ in range(rng.randint(2, 5)):
        pair, place = rng.choice(("()", "[]", "{}")), rng.randint(0, len(text))
        text = text[:place] + pair + text[place:]
    if rng.random() < 0.5:
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice("()[]{}") + text[place + 1 :]
    return (text,)


STACK = Concept.with_texts(
    TEXTS,
    name="Stack (Last In, First Out)",
    domain=DATA_STRUCTURE,
    code=_BRACKETS,
    draw=coding_draw(_BRACKETS, reference=_cancels, arguments=_brackets),
    verified_by="executed on its examples; neighbouring partners erased until nothing changes",
)

_GREATER = """
def solve(xs):
    result, stack = [-1] * len(xs), []
    for i, x in enumerate(xs):
        while stack and xs[stack[-1]] < x:
            result[stack.pop()] = x
        stack.append(i)
    return result
"""

MONOTONIC_STACK = Concept.with_texts(
    TEXTS,
    name="Monotonic Stack",
    domain=DATA_STRUCTURE,
    code=_GREATER,
    draw=coding_draw(
        _GREATER,
        reference=lambda xs: [next((y for y in xs[i:] if y > x), -1) for i, x in enumerate(xs)],
        arguments=lambda rng: ([rng.randint(1, 30) for _ in range(rng.randint(4, 8))],),
    ),
    verified_by="executed on its examples; direct scan to the right of each element",
)

_SLIDING = """
from collections import deque

def solve(xs, k):
    window, result = deque(), []
    for i, x in enumerate(xs):
        while window and xs[window[-1]] <= x:
            window.pop()
        window.append(i)
        if window[0] == i - k:
            window.popleft()
        if i >= k - 1:
            result.append(xs[window[0]])
    return result
"""

DEQUE = Concept.with_texts(
    TEXTS,
    name="Deque (Double-Ended Queue)",
    domain=DATA_STRUCTURE,
    code=_SLIDING,
    held_out=True,
    draw=coding_draw(
        _SLIDING,
        reference=lambda xs, k: [max(xs[i : i + k]) for i in range(len(xs) - k + 1)],
        arguments=lambda rng: (
            [rng.randint(0, 30) for _ in range(rng.randint(5, 9))],
            rng.randint(2, 4),
        ),
    ),
    verified_by="executed on its examples; maximum of every window directly",
)

_COUNT = """
from collections import Counter

def solve(xs, k):
    seen, total, count = Counter({0: 1}), 0, 0
    for x in xs:
        total += x
        count += seen[total - k]
        seen[total] += 1
    return count
"""

HASH_MAP = Concept.with_texts(
    TEXTS,
    name="Hash Map",
    domain=DATA_STRUCTURE,
    code=_COUNT,
    draw=coding_draw(
        _COUNT,
        reference=lambda xs, k: sum(
            sum(xs[i:j]) == k for i in range(len(xs)) for j in range(i + 1, len(xs) + 1)
        ),
        arguments=lambda rng: (
            [rng.randint(-4, 6) for _ in range(rng.randint(5, 9))],
            rng.randint(0, 8),
        ),
    ),
    verified_by="executed on its examples; every stretch added up",
)

_RING = """
def solve(size, operations):
    buffer, start, count, taken = [None] * size, 0, 0, []
    for operation in operations:
        if operation < 0:
            if count:
                taken.append(buffer[start])
                start, count = (start + 1) % size, count - 1
        else:
            buffer[(start + count) % size] = operation
            if count < size:
                count += 1
            else:
                start = (start + 1) % size
    return taken
"""


def _shifting(size: int, operations: list[int]) -> list[int]:
    line: list[int] = []
    taken = []
    for operation in operations:
        if operation >= 0:
            line = [*line, operation][-size:]
        elif line:
            taken.append(line[0])
            line = line[1:]
    return taken


CIRCULAR_BUFFER = Concept.with_texts(
    TEXTS,
    name="Circular Array (Ring Buffer)",
    domain=DATA_STRUCTURE,
    code=_RING,
    draw=coding_draw(
        _RING,
        reference=_shifting,
        arguments=lambda rng: (
            rng.randint(2, 4),
            [rng.choice((-1, rng.randint(0, 50))) for _ in range(rng.randint(5, 10))],
        ),
    ),
    verified_by="executed on its examples; a list that is shifted",
)

CONCEPTS = (STACK, MONOTONIC_STACK, DEQUE, HASH_MAP, CIRCULAR_BUFFER)
