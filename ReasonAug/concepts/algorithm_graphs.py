"""Algorithm families on graphs; solutions run against brute force."""

from __future__ import annotations

from itertools import permutations
from random import Random
from typing import Any

from ReasonAug.problem import ALGORITHM, Concept
from ReasonAug.programs import coding_draw


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


DIJKSTRA = Concept(
    name="Dijkstra's Algorithm",
    domain=ALGORITHM,
    code=_DIJKSTRA,
    draw=coding_draw(
        _DIJKSTRA,
        reference=_relax,
        arguments=lambda rng: (_graph(rng), 0, rng.randint(2, 3)),
    ),
    verified_by="executed on its examples; repeated relaxation of all edges",
    definition="""
    Shortest paths from one node in a graph with non-negative edge costs: repeatedly settle the
    nearest unsettled node, taken from a priority queue, and relax the edges that leave it.
    """,
    forms="""
    Roads [town, town, minutes] are listed in `edges` and can be used in both directions. How many
    minutes does the fastest route from `start` to `goal` take?

    In the network `edges` every link [u, v, cost] has a positive cost. Find the cheapest connection
    from `start` to `goal`.

    {who} sends a message from desk `start` at {place} to desk `goal`. Passing it from desk to desk
    takes the seconds given in `edges` as [desk, desk, seconds]. After how many seconds can it
    arrive at the earliest?

    Fire spreads between neighbouring huts; each triple in `edges` names two huts and the time it
    needs to leap from one to the other. It breaks out in hut `start`. When will hut `goal` catch
    fire?
    """,
    solutions="""
    Dijkstra's algorithm: settle the nodes in order of their distance from the start with a heap;
    the edge costs are not negative, so a settled distance is final.

    Shortest path in a weighted graph. A priority queue yields the nearest unsettled node, whose
    edges are relaxed. The first time that the goal is popped, its distance is minimal (Dijkstra).
    """,
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


TOPOLOGICAL_SORT = Concept(
    name="Topological Sorting (Kahn's Algorithm)",
    domain=ALGORITHM,
    code=_KAHN,
    draw=coding_draw(_KAHN, reference=_first_order, arguments=_dependencies),
    verified_by="executed on its examples; all orders tried",
    definition="""
    Orders the nodes of a directed acyclic graph so that every edge points forward: repeatedly
    output a node without unfinished predecessors. If nodes are left over, there is a cycle.
    """,
    forms="""
    There are `n` courses 0..n-1 and `pairs` [a, b] which say that a must be taken before b. Return
    an order that respects all pairs, the lexicographically smallest one, or [] if there is none.

    {who} must finish `n` jobs at {place}. For some of them others have to be done earlier, as
    listed in `pairs` (earlier, later). In which order can the jobs be done, smaller numbers first
    where there is a choice? [] if the rules contradict each other.

    Given `n` modules and the dependencies `pairs` [needed, user], produce the build sequence,
    preferring low numbers, or an empty list for circular dependencies.

    Getting dressed: `n` pieces of clothing, and `pairs` telling which piece goes on underneath
    which. Print the sequence of putting them on, lowest label first whenever several are possible,
    or nothing if it cannot be done.
    """,
    solutions="""
    Topological sorting with Kahn's algorithm: count the unfinished predecessors of each node and
    always take the smallest node that has none. Left-over nodes mean a cycle.

    Treat the rules as a directed graph. A node with in-degree zero may come next; removing it
    lowers the in-degree of its followers. If the order stays incomplete, the graph is cyclic.
    """,
)

CONCEPTS = (DIJKSTRA, TOPOLOGICAL_SORT)
