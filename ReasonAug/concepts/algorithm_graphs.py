"""Algorithm families on graphs; solutions run against brute force."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

from pipeline.config.loading import read_yaml
from ReasonAug.problem import ALGORITHM, Concept
from ReasonAug.programs import coding_draw

TEXTS = read_yaml(Path(__file__).with_suffix(".yaml"))


def _graph(rng: Random) -> list[list[int]]:
    n = rng.randint(4, 6)
    edges = {}
    for node in range(1, n):
        edges[(rng.randrange(node), node)] = rng.randint(1, 9)
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.sample(range(n), 2))
        edges[(a, b)] = rng.randint(1, 9)
    return [[a, b, cost] for (a, b), cost in sorted(edges.items())]


_DIJKSTRA = """
import heapq

def solve(edges, start, goal):
    neighbours = {}
    for a, b, cost in edges:
        neighbours.setdefault(a, []).append((b, cost))
        neighbours.setdefault(b, []).append((a, cost))
    heap, done = [(0, start)], set()
    while heap:
        distance, node = heapq.heappop(heap)
        if node == goal:
            return distance
        if node in done:
            continue
        done.add(node)
        for other, cost in neighbours.get(node, []):
            heapq.heappush(heap, (distance + cost, other))
    return -1
"""


def _relax(edges: list[list[int]], start: int, goal: int) -> int:
    distance = {start: 0}
    for _ in edges:
        for a, b, cost in edges:
            for x, y in ((a, b), (b, a)):
                if x in distance:
                    distance[y] = min(distance.get(y, distance[x] + cost), distance[x] + cost)
    return distance.get(goal, -1)


DIJKSTRA = Concept.with_texts(
    TEXTS,
    name="Dijkstra's Algorithm",
    domain=ALGORITHM,
    code=_DIJKSTRA,
    draw=coding_draw(
        _DIJKSTRA,
        reference=_relax,
        arguments=lambda rng: (_graph(rng), 0, rng.randint(2, 3)),
    ),
    verified_by="executed on its examples; repeated relaxation of all edges",
)

_KAHN = """
import heapq

def solve(n, pairs):
    waiting, followers = [0] * n, [[] for _ in range(n)]
    for first, then in pairs:
        waiting[then] += 1
        followers[first].append(then)
    ready = [node for node in range(n) if not waiting[node]]
    order = []
    while ready:
        node = heapq.heappop(ready)
        order.append(node)
        for then in followers[node]:
            waiting[then] -= 1
            if not waiting[then]:
                heapq.heappush(ready, then)
    return order if len(order) == n else []
"""


def _first_order(n: int, pairs: list[list[int]]) -> list[int]:
    for order in permutations(range(n)):
        if all(order.index(a) < order.index(b) for a, b in pairs):
            return list(order)
    return []


def _dependencies(rng: Random) -> tuple[Any, ...]:
    n = rng.randint(4, 5)
    pairs = [rng.sample(range(n), 2) for _ in range(rng.randint(3, 5))]
    if rng.random() < 0.7:
        shuffled = rng.sample(range(n), n)
        pairs = [sorted(pair, key=shuffled.index) for pair in pairs]
    return n, pairs


TOPOLOGICAL_SORT = Concept.with_texts(
    TEXTS,
    name="Topological Sorting (Kahn's Algorithm)",
    domain=ALGORITHM,
    code=_KAHN,
    draw=coding_draw(_KAHN, reference=_first_order, arguments=_dependencies),
    verified_by="executed on its examples; all orders tried",
)

CONCEPTS = (DIJKSTRA, TOPOLOGICAL_SORT)
