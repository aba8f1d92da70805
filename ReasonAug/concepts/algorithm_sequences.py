"""Algorithm families on sequences and strings; solutions run against brute force."""

from __future__ import annotations

from itertools import combinations, pairwise
from random import Random
from typing import Any

from ReasonAug.problem import ALGORITHM, Concept
from ReasonAug.programs import coding_draw

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


KADANE = Concept(
    name="Kadane's Algorithm",
    domain=ALGORITHM,
    code=_KADANE,
    draw=coding_draw(
        _KADANE,
        reference=_best_block,
        arguments=lambda rng: ([rng.randint(-9, 9) for _ in range(rng.randint(5, 9))],),
    ),
    verified_by="executed on its examples; all blocks enumerated",
    definition="""
    Finds the contiguous block with the largest sum in one pass: the best block that ends here
    either extends the best block that ended one place before, or starts afresh.
    """,
    forms="""
    Given a list `xs` of daily profits, some of them negative, find the largest total profit of a
    run of consecutive days. The run must contain at least one day.

    {who} notes for every hour at {place} how many {things} came in (positive) or went out
    (negative) in `xs`. Over which unbroken stretch of hours was the net inflow greatest? Report the
    inflow.

    An array `xs` of integers is given. Over all non-empty subarrays, what is the maximum sum?

    A hiker records the change of height between neighbouring milestones in `xs`. Choose a start and
    a later finish such that the height gained in between is as big as it can be, and return the
    gain.
    """,
    solutions="""
    Kadane's algorithm. Keep the largest sum of a block that ends at the current element: either the
    element alone or the previous block extended by it. The maximum of these sums is the answer, in
    linear time.

    One pass suffices for the maximum subarray: a contiguous block with negative running sum never
    helps what follows, so drop it and start afresh. This is Kadane's algorithm, O(n).
    """,
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


LIS = Concept(
    name="Longest Increasing Subsequence",
    domain=ALGORITHM,
    code=_LIS,
    draw=coding_draw(
        _LIS,
        reference=_longest_rise,
        arguments=lambda rng: ([rng.randint(1, 20) for _ in range(rng.randint(5, 9))],),
    ),
    verified_by="executed on its examples; all subsequences enumerated",
    definition="""
    The longest selection of elements of a sequence, kept in order, in which every element exceeds
    the one before. Keeping the smallest possible last element for each length gives O(n log n).
    """,
    forms="""
    From the numbers in `xs`, cross out as few as possible so that the remaining ones, in their
    original order, strictly increase. Return how many remain.

    {who} watches {things} pass by with the weights `xs`. Some may be picked up, each heavier than
    the previous pick. What is the largest number of picks?

    For the sequence `xs`, determine the length of the longest strictly ascending subsequence, which
    need not be contiguous.

    Bridges may connect northern landing number 1, 2, 3, ... with the southern landings listed in
    `xs` (landing i to landing xs[i]). No two bridges may cross or share a southern landing. How
    many can be built at most?
    """,
    solutions="""
    Longest increasing subsequence. For each length store the smallest last element of an increasing
    subsequence of this length; binary search finds the entry that the next element improves.

    The stored tails are sorted, so bisect finds where an element extends or improves an increasing
    subsequence. The number of tails is the length of the longest one; O(n log n).
    """,
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


EDIT_DISTANCE = Concept(
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
    definition="""
    The smallest number of insertions, deletions and substitutions that turn one string into
    another. It is computed by dynamic programming over prefixes of both strings.
    """,
    forms="""
    Two strings `a` and `b` are given. A letter may be inserted, removed or replaced by another one.
    What is the smallest number of such operations that turns `a` into `b`?

    {who} mistypes the word `b` as `a`. Correcting means adding a missing character, erasing one, or
    overwriting one. With how few corrections can it be repaired?

    A spelling checker measures how far the input `a` is from the dictionary word `b` by counting
    single-character changes (insert, delete, substitute). Compute the minimum.

    Two strands of molecules, written as letters in `a` and `b`, differ by mutations: a letter is
    lost, a letter is gained, or a letter turns into a different letter. At least how many mutations
    lie between the strands?
    """,
    solutions="""
    Edit distance by dynamic programming: for every pair of prefixes, take the cheapest of
    substitution, deletion and insertion. One row of the table is enough.

    Let d(i, j) be the distance of the prefixes of length i and j of the two strings. It is d(i-1,
    j-1) if the last characters agree, otherwise one more than the minimum over insert, delete and
    substitute (Levenshtein).
    """,
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

RAIN_WATER = Concept(
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
    definition="""
    Over each column of an elevation profile, water stands as high as the lower of the highest walls
    to its left and right. Two pointers that move inwards from the lower side sum it in linear time.
    """,
    forms="""
    The list `xs` gives the heights of walls of width 1, side by side. After heavy rain, how many
    units of water stay between the walls?

    {who} builds a profile of toy bricks with column heights `xs` and pours water over it. Whatever
    can flow off to the left or right does so. How much is held back?

    An elevation map `xs` has one bar per metre. Compute the volume of the puddles that form in its
    dips.

    In a side view of a mountain ridge, `xs` are the altitudes from west to east. When all hollows
    have been filled by lakes up to the point of overflow, what is the total cross-section of the
    lakes?
    """,
    solutions="""
    Trapping rain water with two pointers: the water over a column is limited by the lower of the
    highest walls on both sides, so always advance from the lower side.

    Each column holds min(highest bar to the left, highest bar to the right) minus its own height.
    Moving two pointers inwards and keeping both maxima gives the trapped water in one pass.
    """,
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


PREFIX_SUM = Concept(
    name="Prefix Sum",
    domain=ALGORITHM,
    code=_PREFIX,
    draw=coding_draw(
        _PREFIX,
        reference=lambda xs, queries: [sum(xs[low : high + 1]) for low, high in queries],
        arguments=_ranges,
    ),
    verified_by="executed on its examples; every range added up directly",
    definition="""
    After storing the cumulative totals of a fixed array, the sum of any range is the difference of
    two of them, so each query takes constant time.
    """,
    forms="""
    The array `xs` never changes. Answer many queries [low, high]: what do the elements from
    position low to position high, both included, add up to? Each answer must take constant time.

    At {place} the number of {things} handled each day is in `xs`. {who} is asked again and again
    for the total of a period, from one day to another. Prepare the data so that every pair in
    `queries` is answered at once.

    For a fixed list `xs` return the range totals for all index pairs in `queries` without adding up
    the elements anew for each pair.

    Milestones along a road are `xs` kilometres apart. Travellers want to know, for stretches of
    sections first..last listed in `queries`, how long each is. There are millions of travellers and
    one road.
    """,
    solutions="""
    Prefix sums: store the cumulative totals once. A range total is the difference of two prefix
    sums.

    Precompute prefix[i], the sum of the first i elements. Each query low..high is then prefix[high
    + 1] - prefix[low], in constant time after linear preparation.
    """,
)

CONCEPTS = (KADANE, LIS, EDIT_DISTANCE, RAIN_WATER, PREFIX_SUM)
