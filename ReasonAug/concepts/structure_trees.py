"""Data structure families: heaps, trees, sets; solutions run against brute force."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from pipeline.config.loading import read_yaml
from ReasonAug.problem import DATA_STRUCTURE, Concept
from ReasonAug.programs import coding_draw

TEXTS = read_yaml(Path(__file__).with_suffix(".yaml"))


_SMASH = """
import heapq

def solve(xs):
    heap = [-x for x in xs]
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        if first != second:
            heapq.heappush(heap, first - second)
    return -heap[0] if heap else 0
"""


def _smash(xs: list[int]) -> int:
    while len(xs) > 1:
        xs = sorted(xs)
        xs = xs[:-2] + ([xs[-1] - xs[-2]] if xs[-1] != xs[-2] else [])
    return xs[0] if xs else 0


PRIORITY_QUEUE = Concept.with_texts(
    TEXTS,
    name="Priority Queue (Heap)",
    domain=DATA_STRUCTURE,
    code=_SMASH,
    draw=coding_draw(
        _SMASH,
        reference=_smash,
        arguments=lambda rng: ([rng.randint(1, 30) for _ in range(rng.randint(3, 8))],),
    ),
    verified_by="executed on its examples; complete sorting before every step",
)

_TRIE = """
def solve(words, prefixes):
    root = {}
    for word in words:
        node = root
        for letter in word:
            node = node.setdefault(letter, {"#": 0})
            node["#"] += 1
    counts = []
    for prefix in prefixes:
        node = root
        for letter in prefix:
            node = node.get(letter, {"#": 0})
        counts.append(node["#"])
    return counts
"""


def _names(rng: Random) -> tuple[Any, ...]:
    words = [
        "".join(rng.choice("aino") for _ in range(rng.randint(2, 5)))
        for _ in range(rng.randint(3, 6))
    ]
    return words, [rng.choice(words)[: rng.randint(1, 3)] for _ in range(rng.randint(1, 3))]


TRIE = Concept.with_texts(
    TEXTS,
    name="Trie",
    domain=DATA_STRUCTURE,
    code=_TRIE,
    held_out=True,
    draw=coding_draw(
        _TRIE,
        reference=lambda words, prefixes: [sum(w.startswith(p) for w in words) for p in prefixes],
        arguments=_names,
    ),
    verified_by="executed on its examples; every word compared with every prefix",
)

_UNION = """
def solve(n, pairs):
    parent = list(range(n))

    def find(x):
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    groups, history = n, []
    for a, b in pairs:
        a, b = find(a), find(b)
        if a != b:
            parent[a] = b
            groups -= 1
        history.append(groups)
    return history
"""


def _merge(n: int, pairs: list[list[int]]) -> list[int]:
    groups = [{i} for i in range(n)]
    history = []
    for a, b in pairs:
        touched = [g for g in groups if a in g or b in g]
        groups = [g for g in groups if g not in touched] + [set().union(*touched)]
        history.append(len(groups))
    return history


DISJOINT_SET = Concept.with_texts(
    TEXTS,
    name="Disjoint Set (Union-Find)",
    domain=DATA_STRUCTURE,
    code=_UNION,
    draw=coding_draw(
        _UNION,
        reference=_merge,
        arguments=lambda rng: (
            (n := rng.randint(4, 7)),
            [rng.sample(range(n), 2) for _ in range(rng.randint(3, 6))],
        ),
    ),
    verified_by="executed on its examples; explicit sets that are merged",
)

_FENWICK = """
def solve(xs):
    ranks = {x: i for i, x in enumerate(sorted(set(xs)), 1)}
    tree, inversions = [0] * (len(ranks) + 1), 0
    for seen, x in enumerate(xs):
        i, not_larger = ranks[x], 0
        while i:
            not_larger += tree[i]
            i -= i & -i
        inversions += seen - not_larger
        i = ranks[x]
        while i < len(tree):
            tree[i] += 1
            i += i & -i
    return inversions
"""

FENWICK = Concept.with_texts(
    TEXTS,
    name="Fenwick Tree (Binary Indexed Tree)",
    domain=DATA_STRUCTURE,
    code=_FENWICK,
    draw=coding_draw(
        _FENWICK,
        reference=lambda xs: sum(x > y for i, x in enumerate(xs) for y in xs[i:]),
        arguments=lambda rng: ([rng.randint(1, 15) for _ in range(rng.randint(4, 9))],),
    ),
    verified_by="executed on its examples; all pairs compared",
)

_SEGMENT = """
def solve(xs, operations):
    n = len(xs)
    tree = [0] * n + list(xs)
    for i in range(n - 1, 0, -1):
        tree[i] = min(tree[2 * i], tree[2 * i + 1])
    answers = []
    for kind, a, b in operations:
        if kind == "set":
            i = a + n
            tree[i] = b
            while i > 1:
                i //= 2
                tree[i] = min(tree[2 * i], tree[2 * i + 1])
        else:
            low, high, best = a + n, b + n + 1, tree[a + n]
            while low < high:
                if low % 2:
                    best, low = min(best, tree[low]), low + 1
                if high % 2:
                    high -= 1
                    best = min(best, tree[high])
                low, high = low // 2, high // 2
            answers.append(best)
    return answers
"""


def _scan(xs: list[int], operations: list[list[Any]]) -> list[int]:
    answers = []
    for kind, a, b in operations:
        if kind == "set":
            xs[a] = b
        else:
            answers.append(min(xs[a : b + 1]))
    return answers


def _operations(rng: Random) -> tuple[Any, ...]:
    xs = [rng.randint(1, 40) for _ in range(rng.randint(4, 7))]
    operations: list[list[Any]] = []
    for _ in range(rng.randint(2, 5)):
        if rng.random() < 0.5:
            operations.append(["set", rng.randrange(len(xs)), rng.randint(1, 40)])
        else:
            operations.append(["min", *sorted(rng.choices(range(len(xs)), k=2))])
    return xs, operations


SEGMENT_TREE = Concept.with_texts(
    TEXTS,
    name="Segment Tree",
    domain=DATA_STRUCTURE,
    code=_SEGMENT,
    draw=coding_draw(_SEGMENT, reference=_scan, arguments=_operations),
    verified_by="executed on its examples; direct scan of each range",
)

CONCEPTS = (PRIORITY_QUEUE, TRIE, DISJOINT_SET, FENWICK, SEGMENT_TREE)
