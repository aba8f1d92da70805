"""Algorithm families about optimal choices; solutions run against brute force."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from random import Random
from typing import Any

from pipeline.config.loading import read_yaml
from ReasonAug.problem import ALGORITHM, Concept
from ReasonAug.programs import coding_draw

TEXTS = read_yaml(Path(__file__).with_suffix(".yaml"))


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


COIN_CHANGE = Concept.with_texts(
    TEXTS,
    name="Coin Change",
    domain=ALGORITHM,
    code=_COINS,
    draw=coding_draw(
        _COINS,
        reference=_fewest,
        arguments=lambda rng: (sorted(rng.sample(range(2, 13), 3)), rng.randint(8, 40)),
    ),
    verified_by="executed on its examples; breadth-first search over totals",
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


KNAPSACK = Concept.with_texts(
    TEXTS,
    name="0/1 Knapsack",
    domain=ALGORITHM,
    code=_KNAPSACK,
    draw=coding_draw(_KNAPSACK, reference=_best_load, arguments=_load),
    verified_by="executed on its examples; all subsets enumerated",
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


BINARY_SEARCH = Concept.with_texts(
    TEXTS,
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
)


CONCEPTS = (COIN_CHANGE, KNAPSACK, BINARY_SEARCH)
