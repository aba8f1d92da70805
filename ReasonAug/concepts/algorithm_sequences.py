"""Algorithm families on sequences and strings; solutions run against brute force."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from random import Random
from typing import Any

from pipeline.config.loading import read_yaml
from ReasonAug.problem import ALGORITHM, Concept
from ReasonAug.programs import coding_draw

TEXTS = read_yaml(Path(__file__).with_suffix(".yaml"))


_KADANE = """
def solve(xs):
    best = current = xs[0]
    for x in xs[1:]:
        current = max(x, current + x)
        best = max(best, current)
    return best
"""


def _best_block(xs: list[int]) -> int:
    return max(sum(xs[i:j]) for i in range(len(xs)) for j in range(i + 1, len(xs) + 1))


KADANE = Concept.with_texts(
    TEXTS,
    name="Kadane's Algorithm",
    domain=ALGORITHM,
    code=_KADANE,
    draw=coding_draw(
        _KADANE,
        reference=_best_block,
        arguments=lambda rng: ([rng.randint(-9, 9) for _ in range(rng.randint(5, 9))],),
    ),
    verified_by="executed on its examples; all blocks enumerated",
)

_LIS = """
from bisect import bisect_left

def solve(xs):
    tails = []
    for x in xs:
        place = bisect_left(tails, x)
        if place == len(tails):
            tails.append(x)
        else:
            tails[place] = x
    return len(tails)
"""


def _longest_rise(xs: list[int]) -> int:
    return max(
        size
        for size in range(len(xs) + 1)
        for chosen in combinations(xs, size)
        if all(a < b for a, b in pairwise(chosen))
    )


LIS = Concept.with_texts(
    TEXTS,
    name="Longest Increasing Subsequence",
    domain=ALGORITHM,
    code=_LIS,
    draw=coding_draw(
        _LIS,
        reference=_longest_rise,
        arguments=lambda rng: ([rng.randint(1, 20) for _ in range(rng.randint(5, 9))],),
    ),
    verified_by="executed on its examples; all subsequences enumerated",
)

_EDIT = """
def solve(a, b):
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            change = previous + (left != right)
            previous = row[j]
            row[j] = min(change, row[j] + 1, row[j - 1] + 1)
    return row[-1]
"""


def _edits(a: str, b: str) -> int:
    """Breadth-first over words: the number of single edits from `a` to `b`."""
    letters, seen, frontier, steps = sorted(set(b)), {a}, {a}, 0
    longest = max(len(a), len(b))
    while b not in frontier:
        following = set()
        for word in frontier:
            for i in range(len(word) + 1):
                following.add(word[:i] + word[i + 1 :])
                for letter in letters:
                    following.add(word[:i] + letter + word[i + 1 :])
                    following.add(word[:i] + letter + word[i:])
        frontier = {word for word in following - seen if len(word) <= longest}
        seen |= frontier
        steps += 1
    return steps


EDIT_DISTANCE = Concept.with_texts(
    TEXTS,
    name="Edit Distance",
    domain=ALGORITHM,
    code=_EDIT,
    held_out=True,
    draw=coding_draw(
        _EDIT,
        reference=_edits,
        arguments=lambda rng: (_word(rng, "abc", 2, 4), _word(rng, "abc", 2, 4)),
    ),
    verified_by="executed on its examples; breadth-first search over words",
)


def _word(rng: Random, letters: str, low: int, high: int) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(low, high)))


_RAIN = """
def solve(xs):
    left, right = 0, len(xs) - 1
    left_max = right_max = water = 0
    while left < right:
        if xs[left] < xs[right]:
            left_max = max(left_max, xs[left])
            water += left_max - xs[left]
            left += 1
        else:
            right_max = max(right_max, xs[right])
            water += right_max - xs[right]
            right -= 1
    return water
"""

RAIN_WATER = Concept.with_texts(
    TEXTS,
    name="Trapping Rain Water",
    domain=ALGORITHM,
    code=_RAIN,
    held_out=True,
    draw=coding_draw(
        _RAIN,
        reference=lambda xs: sum(
            min(max(xs[: i + 1]), max(xs[i:])) - x for i, x in enumerate(xs)
        ),  # the level over each column, from its definition
        arguments=lambda rng: ([rng.randint(0, 6) for _ in range(rng.randint(5, 10))],),
    ),
    verified_by="executed on its examples; water level of each column from its definition",
)

_PREFIX = """
def solve(xs, queries):
    prefix = [0]
    for x in xs:
        prefix.append(prefix[-1] + x)
    return [prefix[high + 1] - prefix[low] for low, high in queries]
"""


def _ranges(rng: Random) -> tuple[Any, ...]:
    xs = [rng.randint(0, 20) for _ in range(rng.randint(5, 8))]
    return xs, [sorted(rng.choices(range(len(xs)), k=2)) for _ in range(rng.randint(2, 4))]


PREFIX_SUM = Concept.with_texts(
    TEXTS,
    name="Prefix Sum",
    domain=ALGORITHM,
    code=_PREFIX,
    draw=coding_draw(
        _PREFIX,
        reference=lambda xs, queries: [sum(xs[low : high + 1]) for low, high in queries],
        arguments=_ranges,
    ),
    verified_by="executed on its examples; every range added up directly",
)

CONCEPTS = (KADANE, LIS, EDIT_DISTANCE, RAIN_WATER, PREFIX_SUM)
