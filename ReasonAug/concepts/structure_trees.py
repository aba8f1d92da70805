"""Data structure families: heaps, trees, sets; solutions run against brute force."""

from __future__ import annotations

from random import Random
from typing import Any

from ReasonAug.problem import DATA_STRUCTURE, Concept
from ReasonAug.programs import coding_draw

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


PRIORITY_QUEUE = Concept(
    name="Priority Queue (Heap)",
    domain=DATA_STRUCTURE,
    code=_SMASH,
    draw=coding_draw(
        _SMASH,
        reference=_smash,
        arguments=lambda rng: ([rng.randint(1, 30) for _ in range(rng.randint(3, 8))],),
    ),
    verified_by="executed on its examples; complete sorting before every step",
    definition="""
    A priority queue returns the element of highest priority first. A binary heap adds and removes
    elements in logarithmic time.
    """,
    forms="""
    Stones of weights `xs` lie on a table. Again and again the two heaviest are smashed together:
    equal ones vanish, otherwise a stone with the difference of their weights remains. What is the
    weight of the last stone, or 0?

    At {place} the two largest remaining debts in `xs` are always set off against each other, which
    leaves their difference (nothing if equal). {who} repeats it until at most one is left. How
    large is it?

    Two strongest teams of a league with strengths `xs` meet; the winner's strength drops by that of
    the loser, who leaves, and at strength zero both leave. Continue with the two strongest each
    time. Return the final strength, 0 if nobody remains.

    Take out the top two values of the collection `xs`, put back how much they differ unless they
    are the same, and go on in this way. Which value survives in the end (0 for none)?
    """,
    solutions="""
    Priority queue: a heap gives the two largest elements in logarithmic time, and their difference
    is pushed back.

    Use a binary heap (with negated values, as heapq keeps the smallest on top). Pop two, push the
    difference; O(n log n) altogether.
    """,
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


TRIE = Concept(
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
    definition="""
    A tree in which each edge is a letter and each node stands for a prefix. Words that begin alike
    share a path, so looking up a prefix takes time proportional to its length only.
    """,
    forms="""
    For every string in `prefixes`, count the `words` that begin with it. The time per prefix must
    not depend on the number of words.

    {who} programs the search box of {place}. While a visitor types, the number of catalogue entries
    in `words` starting with the letters typed so far is shown. Return the numbers for all
    `prefixes`.

    A telephone book holds the names `words`. For each beginning in `prefixes`, how many names share
    that beginning? Lookups should cost only as much as the beginning is long.

    Given a dictionary `words`, an autocomplete feature reports how many completions each partial
    input in `prefixes` has. Store the dictionary letter by letter such that common starts are
    stored once.
    """,
    solutions="""
    Build a trie: each node stands for a prefix and counts the words that pass through it. A query
    walks down along its letters.

    Words with a common beginning share a path in the trie (prefix tree). After inserting all words
    with counters, each prefix is answered in time proportional to its length.
    """,
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


DISJOINT_SET = Concept(
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
    definition="""
    Keeps elements in disjoint groups. Each group is a tree named after its root: find walks to the
    root, union hangs one root under another. With path compression both take almost constant time.
    """,
    forms="""
    `n` islands are unconnected at first. Bridges `pairs` are built one by one. After each bridge,
    how many groups of mutually reachable islands are there?

    {who} introduces guests at {place} to each other, pair by pair as in `pairs`. Acquaintances of
    acquaintances belong to one circle. State the number of circles among the `n` guests after every
    introduction.

    Computers 0..n-1 are wired up by the cables in `pairs`, in this order. Report the number of
    separate networks after each cable.

    Of `n` puddles, rain makes two flow together at a time (`pairs`, perhaps already joined). Keep
    track of how many separate waters remain after every such event.
    """,
    solutions="""
    Disjoint set with union and find: joining two different roots lowers the number of components by
    one. Path compression keeps the trees flat.

    Union-find: every component is named by its root. For each pair, find both roots; if they
    differ, unite them and count one group less.
    """,
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

FENWICK = Concept(
    name="Fenwick Tree (Binary Indexed Tree)",
    domain=DATA_STRUCTURE,
    code=_FENWICK,
    draw=coding_draw(
        _FENWICK,
        reference=lambda xs: sum(x > y for i, x in enumerate(xs) for y in xs[i:]),
        arguments=lambda rng: ([rng.randint(1, 15) for _ in range(rng.randint(4, 9))],),
    ),
    verified_by="executed on its examples; all pairs compared",
    definition="""
    An array whose cell i holds the sum of a block of i's lowest set bit length. Prefix sums and
    point updates follow the binary digits of the index and take logarithmic time.
    """,
    forms="""
    Count the pairs of positions i < j in `xs` with xs[i] > xs[j], in O(n log n).

    Runners finished in the order `xs` of their start numbers. {who} wonders how often a runner with
    a higher number came in ahead of one with a lower number, counted over all pairs. Comparing all
    pairs is too slow.

    How far is `xs` from being sorted, measured by the number of out-of-order pairs? Maintain counts
    of the values so far, with quick updates and quick cumulative counts.

    Two critics rank the same films; in the order of the first critic, the second critic's ranks are
    `xs`. Over how many pairs of films do they disagree? There may be a hundred thousand films.
    """,
    solutions="""
    A Fenwick tree over the ranks holds how often each value has occurred. For every element, the
    earlier elements that are larger are inversions; prefix counts and updates are logarithmic.

    Count inversions with a binary indexed tree: go from left to right, subtract the cumulative
    count of not larger values from the number seen, then add the element. i & -i steps through the
    tree.
    """,
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


SEGMENT_TREE = Concept(
    name="Segment Tree",
    domain=DATA_STRUCTURE,
    code=_SEGMENT,
    draw=coding_draw(_SEGMENT, reference=_scan, arguments=_operations),
    verified_by="executed on its examples; direct scan of each range",
    definition="""
    A binary tree over an array whose nodes hold the result (sum, minimum, ...) of their segment.
    Changes and range queries touch only a logarithmic number of nodes.
    """,
    forms="""
    The list `xs` changes over time: ["set", i, v] puts v at position i, and ["min", a, b] asks for
    the smallest element from position a to b. Answer the questions in `operations`, each in O(log
    n).

    Prices of the {things} at {place} are `xs`. {who} either corrects a price ("set", index, price)
    or wants the lowest price in a span of the list ("min", first, last). Process `operations` fast,
    for millions of entries.

    Support point assignment and range minimum on `xs`, in any mixture as given by `operations`,
    both in logarithmic time. Return the answers of the minimum queries.

    Water gauges along a river show `xs`. New readings come in ("set", gauge, level), and skippers
    ask how shallow it gets between two gauges ("min", from, to). Neither may take time proportional
    to the length of the river.
    """,
    solutions="""
    Segment tree: leaves hold the elements, inner nodes the minimum of their two children. A change
    updates the path to the root; a range is covered by logarithmically many nodes.

    Keep the minimum of every segment in a binary tree stored as an array. Point updates climb to
    the root, range minimum queries combine O(log n) segments of the tree.
    """,
)

CONCEPTS = (PRIORITY_QUEUE, TRIE, DISJOINT_SET, FENWICK, SEGMENT_TREE)
