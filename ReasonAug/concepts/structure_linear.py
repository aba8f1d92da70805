"""Data structure families: stacks, queues, maps; solutions run against brute force."""

from __future__ import annotations

from random import Random
from typing import Any

from ReasonAug.problem import DATA_STRUCTURE, Concept
from ReasonAug.programs import coding_draw

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


STACK = Concept(
    name="Stack (Last In, First Out)",
    domain=DATA_STRUCTURE,
    code=_BRACKETS,
    draw=coding_draw(_BRACKETS, reference=_cancels, arguments=_brackets),
    verified_by="executed on its examples; neighbouring partners erased until nothing changes",
    definition="""
    A stack gives access only to the element that was added last. Push and pop take constant time;
    it suits everything that is nested.
    """,
    forms="""
    Decide whether every opening bracket in `text` is closed by the matching kind in the right
    order.

    {who} checks formulas: parentheses, square brackets and braces in `text` must be properly
    nested. Is the string `text` balanced?

    A robot opens and closes boxes of three kinds; `text` is the log of symbols. A box may only be
    closed if it is the one opened most recently among those still open. Is the log valid, with
    nothing left open?

    Actors enter with one of three doors, each an opening symbol, and leave with its mirror image.
    Whoever entered last must leave first. Judge from the protocol `text` whether all obeyed and the
    room is empty.
    """,
    solutions="""
    Use a stack: push opening brackets; a closing one must match the bracket that is popped. In the
    end the stack must be empty.

    Nesting is last in, first out. Each closing symbol is compared with the top of the stack; a
    mismatch, or a stack that is not empty at the end, means False.
    """,
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

MONOTONIC_STACK = Concept(
    name="Monotonic Stack",
    domain=DATA_STRUCTURE,
    code=_GREATER,
    draw=coding_draw(
        _GREATER,
        reference=lambda xs: [next((y for y in xs[i:] if y > x), -1) for i, x in enumerate(xs)],
        arguments=lambda rng: ([rng.randint(1, 30) for _ in range(rng.randint(4, 8))],),
    ),
    verified_by="executed on its examples; direct scan to the right of each element",
    definition="""
    A stack whose elements stay sorted: before a push, all elements that break the order are popped,
    and each of them has just met its next greater (or smaller) element.
    """,
    forms="""
    For each number in `xs` find the first larger number to its right, or -1 if there is none.

    {who} lists the temperatures `xs` of successive days. For every day report the temperature of
    the next day that is warmer (-1 if it never gets warmer).

    People of heights `xs` stand in a queue, all looking towards its end. Whom does each of them see
    as the first taller person? Return that height or -1.

    Bids arrive over time as `xs`. A bid stays in force until a higher one comes in. Give for each
    bid the amount that ended it, -1 for those never beaten.
    """,
    solutions="""
    Monotonic stack: keep the positions that still wait for a greater element, with decreasing
    values. A new element pops everything smaller and is their answer.

    Every index is pushed and popped at most once, so one pass over a decreasing stack finds the
    next greater element of all in linear time.
    """,
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

DEQUE = Concept(
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
    definition="""
    A double-ended queue adds and removes elements at both ends in constant time. Kept in decreasing
    order, it yields the maximum of a window that slides over a sequence.
    """,
    forms="""
    A window of `k` neighbouring numbers slides over `xs` from left to right. Return the maximum of
    every window position, in linear time.

    {who} wants to know, for each span of `k` consecutive days, the busiest day's count. The counts
    at {place} are `xs`. Output one peak for every span.

    A sensor stream `xs` is smoothed by a filter that reports the largest among the latest `k`
    readings, as soon as `k` readings are there. Produce the reports.

    Seen from a train, always `k` houses in a row are visible at once; their heights along the track
    are `xs`. As house after house comes into view and another vanishes, how tall is the tallest in
    sight each time?
    """,
    solutions="""
    Keep a deque of indices with decreasing values: smaller elements leave at the back when a new
    one comes, the oldest leaves at the front when it is out of the window. The front is the
    maximum.

    Sliding window maximum with a double-ended queue. Each index enters and leaves once, so all
    windows together take linear time.
    """,
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

HASH_MAP = Concept(
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
    definition="""
    A hash map stores values under keys and finds them in constant expected time. Remembering what
    was seen before replaces a search over all earlier elements.
    """,
    forms="""
    How many stretches of neighbouring elements of `xs` add up to exactly `k`? The numbers may be
    negative and the list long, so compare not all pairs.

    {who} books gains and losses of {place} in `xs`. Count the unbroken periods whose balance is
    precisely `k`, looking up earlier totals instead of trying every period.

    Count the contiguous subarrays of `xs` with sum `k` in one pass, remembering how often each
    running total has occurred.

    A balloon rises or sinks by `xs` metres in each minute. Count pairs of moments, one earlier and
    one later, between which it has climbed by `k` metres net, without examining every pair.
    """,
    solutions="""
    A hash map counts how often each running total has occurred. A stretch that ends here has sum k
    for every earlier total equal to the current total minus k.

    Look up total - k in the dictionary of earlier totals and add its count. Expected constant time
    per lookup in the hash map makes one pass enough.
    """,
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


CIRCULAR_BUFFER = Concept(
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
    definition="""
    A fixed array used as a queue: indices wrap around modulo its size, so elements are added and
    removed without moving others, and a full buffer overwrites its oldest element.
    """,
    forms="""
    A recorder has memory for `size` readings. A non-negative entry of `operations` is a new
    reading, which replaces the oldest one when the memory is full; -1 reads out and removes the
    oldest. Return what was read out. No element may be moved in memory.

    {who} keeps the latest `size` messages of {place} in fixed slots. Numbers >= 0 in `operations`
    are incoming messages (the oldest is lost if all slots are taken), -1 fetches the oldest. List
    what is fetched.

    Simulate a bounded first-in first-out queue of `size` cells with wrap-around that overwrites its
    head on overflow. `operations`: value >= 0 to enqueue, -1 to dequeue (ignored if empty).

    On a round table with `size` plates, a cook puts dishes (numbers >= 0 in `operations`) on plate
    after plate, round and round, throwing away the stalest dish if no plate is free. On -1 a guest
    takes the stalest dish. Which dishes are eaten?
    """,
    solutions="""
    Ring buffer: start marks the oldest element and indices wrap around modulo the size. When the
    circular array is full, the new element overwrites the oldest and start moves on.

    Use a circular array of fixed size. The next free index is (start + count) modulo size; nothing
    is ever shifted, so each operation takes constant time.
    """,
)

CONCEPTS = (STACK, MONOTONIC_STACK, DEQUE, HASH_MAP, CIRCULAR_BUFFER)
