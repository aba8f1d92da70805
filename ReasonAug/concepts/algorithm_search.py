"""Algorithm families about optimal choices; solutions run against brute force."""

from __future__ import annotations

from itertools import combinations, pairwise
from random import Random
from typing import Any

from ReasonAug.problem import ALGORITHM, Concept
from ReasonAug.programs import coding_draw

_COINS = """
def solve(coins, amount):
    fewest = [0] + [amount + 1] * amount
    for total in range(1, amount + 1):
        for coin in coins:
            if coin <= total:
                fewest[total] = min(fewest[total], fewest[total - coin] + 1)
    return fewest[amount] if fewest[amount] <= amount else -1
"""


def _fewest(coins: list[int], amount: int) -> int:
    """Breadth-first over the totals reachable with one more coin."""
    reached, steps = {0}, 0
    while amount not in reached:
        reached = {t + coin for t in reached for coin in coins if t + coin <= amount}
        steps += 1
        if not reached:
            return -1
    return steps


COIN_CHANGE = Concept(
    name="Coin Change",
    domain=ALGORITHM,
    code=_COINS,
    draw=coding_draw(
        _COINS,
        reference=_fewest,
        arguments=lambda rng: (sorted(rng.sample(range(2, 13), 3)), rng.randint(8, 40)),
    ),
    verified_by="executed on its examples; breadth-first search over totals",
    definition="""
    The fewest coins that make an amount, with unlimited coins of each denomination, follow from
    dynamic programming: the best for a total is one more than the best for total minus a coin.
    """,
    forms="""
    Coins with the values `coins` are available without limit. What is the smallest number of coins
    that pays exactly `amount`? Return -1 if it cannot be paid.

    {who} has plenty of {things} in the sizes `coins` and must fill a gap of length `amount` exactly
    with as few as possible. How many are needed (-1 if impossible)?

    A vending machine at {place} gives back `amount` in pieces of the denominations `coins`. Find
    the minimum count of pieces, or -1.

    A robot hops along a line in jumps whose lengths are listed in `coins`, each as often as it
    likes and always forward. After how few jumps can it be precisely at distance `amount`? Report
    -1 if never.
    """,
    solutions="""
    Coin change by dynamic programming: the fewest coins for a total are one more than the fewest
    for the total minus some coin.

    Fill a table of totals from 0 up to the amount. Greedy choice of the largest denomination fails
    in general, but the dynamic program tries every coin for each total.
    """,
)

_KNAPSACK = """
def solve(weights, values, capacity):
    best = [0] * (capacity + 1)
    for weight, value in zip(weights, values):
        for room in range(capacity, weight - 1, -1):
            best[room] = max(best[room], best[room - weight] + value)
    return best[capacity]
"""


def _best_load(weights: list[int], values: list[int], capacity: int) -> int:
    items = range(len(weights))
    return max(
        sum(values[i] for i in chosen)
        for size in range(len(weights) + 1)
        for chosen in combinations(items, size)
        if sum(weights[i] for i in chosen) <= capacity
    )


def _load(rng: Random) -> tuple[Any, ...]:
    n = rng.randint(4, 6)
    weights = [rng.randint(1, 9) for _ in range(n)]
    return weights, [rng.randint(1, 20) for _ in range(n)], rng.randint(6, 18)


KNAPSACK = Concept(
    name="0/1 Knapsack",
    domain=ALGORITHM,
    code=_KNAPSACK,
    draw=coding_draw(_KNAPSACK, reference=_best_load, arguments=_load),
    verified_by="executed on its examples; all subsets enumerated",
    definition="""
    Choose items, each at most once, with total weight within a capacity so that the total value is
    as large as possible. Dynamic programming over the remaining capacity solves it.
    """,
    forms="""
    Each item i has weight `weights[i]` and value `values[i]` and can be taken once. What is the
    greatest total value with total weight at most `capacity`?

    {who} loads a van at {place}. The {things} weigh `weights` and bring in `values`; the van
    carries `capacity`. Each is either on board or left behind. Maximise the income.

    A student has `capacity` hours before the exam. Topic i takes `weights[i]` hours and is worth
    `values[i]` marks, but only if studied completely. Which mark total is achievable?

    For a festival of `capacity` minutes, acts offer to play for `weights` minutes and would attract
    `values` visitors. An act is booked in full or not at all. How many visitors can be attracted?
    """,
    solutions="""
    0/1 knapsack: best[room] is the largest value that fits. Going through the capacities downwards
    makes sure that each item is used at most once.

    Dynamic programming over the capacity. For every item, either leave it or take it and add its
    value to the best load of the remaining room. Knapsack in O(n * capacity).
    """,
)

_SHIP = """
def solve(xs, days):
    def fits(limit):
        used, load = 1, 0
        for x in xs:
            if load + x > limit:
                used, load = used + 1, 0
            load += x
        return used <= days

    low, high = max(xs), sum(xs)
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return low
"""


def _smallest_limit(xs: list[int], days: int) -> int:
    best = sum(xs)
    for cuts in combinations(range(1, len(xs)), min(days, len(xs)) - 1):
        edges = (0, *cuts, len(xs))
        best = min(best, max(sum(xs[a:b]) for a, b in pairwise(edges)))
    return best


BINARY_SEARCH = Concept(
    name="Binary Search on the Answer",
    domain=ALGORITHM,
    code=_SHIP,
    draw=coding_draw(
        _SHIP,
        reference=_smallest_limit,
        arguments=lambda rng: (
            [rng.randint(1, 12) for _ in range(rng.randint(5, 8))],
            rng.randint(2, 4),
        ),
    ),
    verified_by="executed on its examples; all ways to cut the list enumerated",
    definition="""
    If a limit that works implies that every larger limit works, the smallest working limit is found
    by halving an interval of candidates, testing feasibility at its middle.
    """,
    forms="""
    Packages with weights `xs` are shipped in the given order within `days` days. What is the
    smallest daily capacity of the ship that makes it possible?

    {who} divides the {things}, of sizes `xs` in a row, into at most `days` consecutive portions.
    Make the largest portion as small as possible and return its size.

    Chapters of `xs` pages are to be read in order over `days` evenings, whole chapters only. Find
    the least number of pages which, allowed per evening, is enough.

    A wall with panels of `xs` square metres is painted by a team of `days` painters, each
    responsible for neighbouring panels. When everybody paints equally fast, how many square metres
    does the busiest one get in the fairest split?
    """,
    solutions="""
    Binary search on the answer: whether a limit is feasible can be tested greedily, and feasibility
    is monotone. Halve the interval between the largest element and the total.

    Guess the limit. A greedy pass tells whether it is enough; if so, try smaller, otherwise larger.
    Searching by bisection over limits needs O(n log sum) steps.
    """,
)


CONCEPTS = (COIN_CHANGE, KNAPSACK, BINARY_SEARCH)
