"""A global batch split evenly over ranks, and each share packed into chunks."""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np
from numpy.typing import NDArray

from pipeline.data.batch import IntArray

# Length at which attention costs as much as the linear layers of a 7B encoder: 2 * parameters per
# layer / (4 * hidden size) = 2 * 6.53e9 / 28 / (4 * 3584).
ATTENTION_LENGTH = 32_500.0


def text_cost(lengths: IntArray, attention_length: float = ATTENTION_LENGTH) -> NDArray[np.float64]:
    """Relative FLOPs of texts: c(L) = L * (1 + L / attention_length)."""
    return lengths * (1.0 + lengths / attention_length)


def assign_ranks(cost: NDArray[np.float64], world_size: int) -> IntArray:
    """Longest-processing-time assignment (Graham, 1969): costliest first, to the lightest rank.

    Args:
        cost: (S,) cost of each text.

    Returns:
        (S,) rank of each text; ties go to the lower rank, so all ranks agree.
    """
    ranks = np.zeros(len(cost), dtype=np.int64)
    if world_size == 1:
        return ranks
    by_cost = np.argsort(-cost, kind="stable")
    loads = [(0.0, rank) for rank in range(world_size)]
    assigned = np.empty(len(cost), dtype=np.int64)
    for place, own in enumerate(cost[by_cost].tolist()):
        load, rank = loads[0]
        assigned[place] = rank
        heapq.heapreplace(loads, (load + own, rank))
    ranks[by_cost] = assigned
    return ranks


def first_fit_decreasing(
    lengths: IntArray,
    max_tokens: int,
    *,
    max_cost: float | None = None,
    attention_length: float = ATTENTION_LENGTH,
) -> tuple[IntArray, int]:
    """Pack rows into chunks within both budgets: longest first, each into the first with room.

    A row beyond a budget gets a chunk of its own. Equal lengths are placed together, so the work
    is distinct lengths times chunks with room.

    Args:
        lengths: (S,) tokens of each row.
        max_cost: cost of a chunk as `text_cost` counts it; by default that of one text of
            `max_tokens`, which no chunk within the token budget exceeds.

    Returns:
        (S,) chunk of each row, and the number of chunks.
    """
    order = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    costs = text_cost(distinct, attention_length)
    budget = _budget(max_tokens, max_cost, attention_length)
    shortest = int(lengths.min(initial=max_tokens))
    room: list[_Room] = []
    num_chunks = 0
    placed: list[tuple[int, int]] = []  # (chunk, rows), in the order of the rows
    for length, cost, count in zip(
        distinct[::-1].tolist(), costs[::-1].tolist(), counts[::-1].tolist(), strict=True
    ):
        for entry in room:
            # Most chunks are full: comparing is cheaper than dividing.
            if entry.tokens >= length and (taken := entry.take(length, cost, count)):
                placed.append((entry.chunk, taken))
                count -= taken
        while count:
            entry = _Room(num_chunks, max_tokens, budget)
            # Alone where it does not fit: then nothing else does either.
            taken = entry.take(length, cost, count) or entry.fill()
            placed.append((num_chunks, taken))
            room.append(entry)
            num_chunks += 1
            count -= taken
        room = [entry for entry in room if entry.tokens >= shortest]
    chunks, rows = np.array(placed, dtype=np.int64).reshape(-1, 2).T
    chunk_of = np.empty(len(lengths), dtype=np.int64)
    chunk_of[order] = np.repeat(chunks, rows)
    return chunk_of, num_chunks


def _budget(max_tokens: int, max_cost: float | None, attention_length: float) -> float:
    """The cost budget of a chunk, a rounding error wider than asked."""
    full = max_tokens * (1.0 + max_tokens / attention_length)
    return (full if max_cost is None else max_cost) * (1.0 + 1e-9)


@dataclasses.dataclass(slots=True)
class _Room:
    """What a chunk can still take."""

    chunk: int
    tokens: int
    cost: float

    def take(self, length: int, cost: float, count: int) -> int:
        """Put in as many of `count` equal rows as fit; returns how many."""
        taken = min(self.tokens // length, int(self.cost / cost), count)
        self.tokens -= taken * length
        self.cost -= taken * cost
        return taken

    def fill(self) -> int:
        """Put in one row that exceeds a budget."""
        self.tokens, self.cost = 0, 0.0
        return 1


def _spread(
    lengths: IntArray, cost: NDArray[np.float64], num_chunks: int, max_tokens: int, max_cost: float
) -> IntArray | None:
    """Rows spread evenly over exactly `num_chunks` chunks, or None where two would overflow one."""
    chunk_of = assign_ranks(lengths.astype(np.float64), num_chunks)
    tokens = np.bincount(chunk_of, weights=lengths, minlength=num_chunks)
    costs = np.bincount(chunk_of, weights=cost, minlength=num_chunks)
    alone = np.bincount(chunk_of, minlength=num_chunks) <= 1
    fits = alone | ((tokens <= max_tokens) & (costs <= max_cost))
    return chunk_of if fits.all() else None


def plan_chunks(
    lengths: IntArray,
    *,
    world_size: int,
    max_tokens: int,
    max_cost: float | None = None,
    min_chunks: int = 1,
    attention_length: float = ATTENTION_LENGTH,
) -> list[list[IntArray]]:
    """Split texts over ranks by cost, and each rank's share into the same number of chunks.

    First-fit-decreasing says how many chunks the fullest rank needs; every rank then spreads its
    rows evenly over that many (less memory at the peak, ranks in step), heaviest chunk first.

    Args:
        lengths: (S,) tokens of each text; one beyond a budget gets a chunk of its own.
        max_cost: cost of a chunk, see `first_fit_decreasing`.

    Returns:
        For each rank, its chunks as ascending text indices; an empty array is a dummy chunk.
    """
    cost = text_cost(lengths, attention_length)
    budget = _budget(max_tokens, max_cost, attention_length)
    ranks = assign_ranks(cost, world_size)
    by_rank = np.argsort(ranks, kind="stable")
    ends = np.cumsum(np.bincount(ranks, minlength=world_size))
    shares = np.split(by_rank, ends[:-1])
    packed = [
        first_fit_decreasing(
            lengths[share], max_tokens, max_cost=max_cost, attention_length=attention_length
        )
        for share in shares
    ]
    num_chunks = max(min_chunks, max(count for _, count in packed))
    plans = []
    for share, (tight, _) in zip(shares, packed, strict=True):
        spread = _spread(lengths[share], cost[share], num_chunks, max_tokens, budget)
        chunk_of = tight if spread is None else spread
        weight = np.bincount(chunk_of, weights=cost[share], minlength=num_chunks)
        plans.append(
            [share[chunk_of == number] for number in np.argsort(-weight, kind="stable").tolist()]
        )
    return plans
