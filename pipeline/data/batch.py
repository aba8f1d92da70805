"""Hold the packed tokens and the relevance of one rank's step; spread texts over ranks and chunks.

    documents of the examples --find_relevance--> for each query: positives, negatives, masked
    texts 0..S-1 --assign_by_cost--> ranks --first_fit_decreasing--> chunks needed by the fullest
                                       `--assign_by_cost--> that many chunks, on every rank

Every rank runs the same chunks per step, so that collectives stay in step; a rank with fewer texts
than chunks gets dummies.

Letters: N queries and M documents of a global batch, S = N + M texts, C rows and T tokens of a
chunk, R rows of a ragged array, nnz its values.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
_NOTHING: IntArray = np.empty(0, dtype=np.int64)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """Rows of differing length in one array: row i is `values[offsets[i]:offsets[i + 1]]`.

    offsets is (R + 1,) int64; values is (nnz,) int64 for indices, float32 for scores.
    """

    offsets: IntArray
    values: NDArray[Any]

    @classmethod
    def from_lengths(cls, lengths: IntArray, values: NDArray[Any]) -> Ragged:
        """Return rows of the given (R,) lengths that follow one another in `values`."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(offsets=offsets, values=values)

    @classmethod
    def from_rows(cls, rows: Sequence[NDArray[Any]]) -> Ragged:
        """Copy rows into one array."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        return cls.from_lengths(lengths, np.concatenate(rows) if rows else _NOTHING)

    @classmethod
    def from_pairs(cls, rows: IntArray, values: IntArray, num_rows: int) -> Ragged:
        """Group (row, value) pairs by row, keeping the order of the pairs within a row."""
        # Stable: the order within a row has a meaning (preferred negatives come first).
        order = np.argsort(rows, kind="stable")
        lengths = np.bincount(rows, minlength=num_rows).astype(np.int64)
        return cls.from_lengths(lengths, values[order])

    @property
    def lengths(self) -> IntArray:
        """(R,) number of values in each row."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> IntArray:
        """(nnz,) the row each value belongs to."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[row] for row in range(len(self)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Rows of one cached forward, packed without padding.

    input_ids is (T,) int64; lengths is (C,) int64 with sum T; texts is (C,) int64, the global text
    index of each row: queries are 0..N-1, documents N..N+M-1. instruction_tokens is (C,) int64, the
    tokens at the front of each row that are the instruction's; None where no row has any. teacher
    is (C, W) float32, a teacher's vector of each row, where the loss reads them. A dummy chunk,
    which only keeps the number of chunks equal on every rank, has one row of one token and
    texts = [-1].
    """

    input_ids: IntArray
    lengths: IntArray
    texts: IntArray
    instruction_tokens: IntArray | None = None
    teacher: NDArray[np.float32] | None = None

    @property
    def is_dummy(self) -> bool:
        """True for a chunk that holds no text of the batch."""
        return bool(self.texts[0] < 0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """One rank's chunks of a global batch, and the relevance of the whole of it.

    Every text of the batch is in exactly one chunk of exactly one rank; every rank has the same
    number of chunks. Document indices run from 0 to num_documents - 1.
    """

    step: int
    num_queries: int
    num_documents: int
    chunks: tuple[Chunk, ...]
    positives: Ragged  # (N rows) at least one document each
    negatives: Ragged  # (N rows) the query's own hard negatives
    masked: Ragged  # (N rows) known false negatives; never the row's positives or negatives
    example_ids: IntArray  # (N,)
    tokens: int  # real tokens of the global batch, over all ranks
    kind: str = ""  # what its examples have in common (see Order.kinds); empty for a mixture
    # Teacher scores of `positives` and `negatives`, value for value; None without a teacher.
    positive_scores: Ragged | None = None
    negative_scores: Ragged | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Relevance:
    """The documents of a batch and three index lists per query; see `GlobalBatch`."""

    document_ids: IntArray  # (M,) ids in the document store, ascending
    positives: Ragged
    negatives: Ragged
    masked: Ragged


def find_relevance(
    *,
    positives: Ragged,
    negatives: Ragged,
    all_positives: Ragged,
    concept: IntArray,
    query_key: IntArray,
) -> Relevance:
    """Number the documents of a batch and find its known false negatives.

    A document of the batch is masked for a query if, by the data, it answers the query but was not
    chosen as its positive: it is another positive of the example, or a positive of an example with
    the same query or the same concept. Negatives that the example lists stay negatives.

    Args:
        positives, negatives: (N rows) chosen document ids.
        all_positives: (N rows) every positive the example lists.
        concept: (N,) hash of the example's concept, -1 for unknown.
        query_key: (N,) hash of the query's text.
    """
    num_queries = len(positives)
    ids, inverse = np.unique(
        np.concatenate([positives.values, negatives.values]), return_inverse=True
    )
    # One numbering for both lists: a document that is a positive of one query and a negative of
    # another is embedded once.
    split = len(positives.values)
    chosen = Ragged(offsets=positives.offsets, values=inverse[:split].astype(np.int64))
    against = Ragged(offsets=negatives.offsets, values=inverse[split:].astype(np.int64))
    # Other positives of an example, where they are in the batch because of another example.
    # Clipped, because a positive beyond the last id has no entry to compare with.
    nearest = np.minimum(np.searchsorted(ids, all_positives.values), len(ids) - 1)
    present = ids[nearest] == all_positives.values
    pairs = [_pairs(all_positives.rows[present], nearest[present], len(ids))]
    # The same question under two instructions has one key, so the answer to one is not a negative
    # of the other.
    for label in (concept, query_key):
        pairs.append(_shared(label, chosen, len(ids)))
    known = np.unique(np.concatenate(pairs))
    own = [_pairs(lists.rows, lists.values, len(ids)) for lists in (chosen, against)]
    # Without the listed ones: a positive is scored as such, and a negative that the data name stays
    # one, whatever its concept.
    masked = np.setdiff1d(known, np.concatenate(own))
    return Relevance(
        document_ids=ids.astype(np.int64),
        positives=chosen,
        negatives=against,
        masked=Ragged.from_pairs(masked // len(ids), masked % len(ids), num_queries),
    )


def _pairs(rows: IntArray, documents: IntArray, num_documents: int) -> IntArray:
    """Return (query, document) pairs as single numbers."""
    # Below 2**63 for any batch: sets of pairs become sets of integers, which numpy sorts fast.
    return rows.astype(np.int64) * num_documents + documents


def _shared(label: IntArray, chosen: Ragged, num_documents: int) -> IntArray:
    """Pair each query with the positives of all queries that have its label, which is not -1."""
    labels, groups, counts = np.unique(label, return_inverse=True, return_counts=True)
    # Labels of a single query, which most labels are, would only pair it with its own positives.
    rows = np.flatnonzero((label[chosen.rows] >= 0) & (counts[groups[chosen.rows]] > 1))
    # Each document once per label, though several queries of the label may share it.
    owned = np.unique(groups[chosen.rows[rows]] * num_documents + chosen.values[rows])
    per_label = Ragged.from_pairs(owned // num_documents, owned % num_documents, len(labels))
    lengths = per_label.lengths[groups]
    starts = per_label.offsets[:-1][groups]
    ends = np.cumsum(lengths)
    # Positions starts[q] .. starts[q] + lengths[q] - 1 of each query q, one after another.
    positions = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(
        starts - (ends - lengths), lengths
    )
    queries = np.repeat(np.arange(len(label), dtype=np.int64), lengths)
    return _pairs(queries, per_label.values[positions], num_documents)


def num_negatives(
    *, positives: Ragged, negatives: Ragged, masked: Ragged, num_documents: int, own: bool
) -> IntArray:
    """(N,) negatives of each query: the listed ones, or all of the batch except known answers."""
    if own:
        return negatives.lengths
    return num_documents - positives.lengths - masked.lengths


# Length at which attention costs as much as the linear layers of a 7B encoder: 2 * parameters per
# layer / (4 * hidden size) = 2 * 6.53e9 / 28 / (4 * 3584).
ATTENTION_LENGTH = 32_500.0


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

    The fullest rank's share, packed tightly, decides the number of chunks. Every rank then spreads
    its rows evenly over that many chunks, which lowers the memory peak and keeps ranks in step.

    Args:
        lengths: (S,) tokens of each text; one that exceeds a budget gets its own chunk.
        max_cost: cost of a chunk, see `first_fit_decreasing`.

    Returns:
        For each rank its chunks, most expensive first, as ascending text indices; an empty array
        is a dummy chunk.
    """
    cost = text_cost(lengths, attention_length)
    budget = _cost_budget(max_tokens, max_cost, attention_length)
    # By FLOPs, because ranks wait for the slowest; memory is bounded by the chunks' budgets.
    ranks = assign_by_cost(cost, world_size)
    # The texts of rank 0, of rank 1, ..., each in ascending order.
    by_rank = np.argsort(ranks, kind="stable")
    ends = np.cumsum(np.bincount(ranks, minlength=world_size))
    shares = np.split(by_rank, ends[:-1])
    packed = [
        first_fit_decreasing(
            lengths[share], max_tokens, max_cost=max_cost, attention_length=attention_length
        )
        for share in shares
    ]
    # The same number everywhere: a rank with fewer would miss collectives of the others.
    num_chunks = max(min_chunks, max(count for _, count in packed))
    plans = []
    for share, (tight, _) in zip(shares, packed, strict=True):
        spread = _spread(lengths[share], cost[share], num_chunks, max_tokens, budget)
        chunk_of = tight if spread is None else spread
        # Most expensive first on every rank: chunks that run at the same time take about as long.
        chunk_cost = np.bincount(chunk_of, weights=cost[share], minlength=num_chunks)
        by_cost = np.argsort(-chunk_cost, kind="stable")
        plans.append([share[chunk_of == number] for number in by_cost.tolist()])
    return plans


def text_cost(
    lengths: IntArray | NDArray[np.float64], attention_length: float = ATTENTION_LENGTH
) -> NDArray[np.float64]:
    """Return relative FLOPs of texts: c(L) = L * (1 + L / attention_length)."""
    return lengths * (1.0 + lengths / attention_length)


def assign_by_cost(cost: NDArray[np.float64], num_bins: int) -> IntArray:
    """Assign items to bins: most expensive first, each to the bin with the least so far.

    The longest-processing-time rule (Graham, 1969): at most 4/3 of the best possible maximum.

    Args:
        cost: (S,) cost of each item.

    Returns:
        (S,) bin of each item. Ties go to the lower bin, so that all ranks agree.
    """
    bins = np.zeros(len(cost), dtype=np.int64)
    if num_bins == 1:
        return bins
    # Most expensive first: what is left at the end is small, and evens the bins out.
    by_cost = np.argsort(-cost, kind="stable")
    # A heap of (load, bin); sorted at the start, so it is one already.
    loads = [(0.0, number) for number in range(num_bins)]
    assigned = np.empty(len(cost), dtype=np.int64)
    for position, own in enumerate(cost[by_cost].tolist()):
        load, number = loads[0]
        assigned[position] = number
        heapq.heapreplace(loads, (load + own, number))
    bins[by_cost] = assigned
    return bins


def _spread(
    lengths: IntArray, cost: NDArray[np.float64], num_chunks: int, max_tokens: int, max_cost: float
) -> IntArray | None:
    """Spread rows evenly over exactly `num_chunks` chunks; None if that overfills one of them."""
    # By tokens, not by cost: tokens decide the memory of a chunk.
    chunk_of = assign_by_cost(lengths.astype(np.float64), num_chunks)
    tokens = np.bincount(chunk_of, weights=lengths, minlength=num_chunks)
    costs = np.bincount(chunk_of, weights=cost, minlength=num_chunks)
    # A text above the budget has a chunk to itself and is not split.
    single = np.bincount(chunk_of, minlength=num_chunks) <= 1
    fits = single | ((tokens <= max_tokens) & (costs <= max_cost))
    return chunk_of if fits.all() else None


def first_fit_decreasing(
    lengths: IntArray,
    max_tokens: int,
    *,
    max_cost: float | None = None,
    attention_length: float = ATTENTION_LENGTH,
) -> tuple[IntArray, int]:
    """Pack rows into chunks within both budgets: longest first, each into the first with room.

    A row that exceeds a budget gets its own chunk. Rows of equal length are placed together, so
    that the work is distinct lengths times chunks with room.

    Args:
        lengths: (S,) tokens of each row.
        max_cost: cost of a chunk as `text_cost` counts it; by default the cost of one text of
            `max_tokens`, which no chunk within the token budget exceeds.

    Returns:
        (S,) chunk of each row, and the number of chunks.
    """
    order = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    costs = text_cost(distinct, attention_length)
    budget = _cost_budget(max_tokens, max_cost, attention_length)
    # Decides when a chunk is closed: no remaining row is shorter.
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
            # A row that does not fit an empty chunk fills one alone.
            taken = entry.take(length, cost, count) or entry.fill()
            placed.append((num_chunks, taken))
            room.append(entry)
            num_chunks += 1
            count -= taken
        # Chunks without room for the shortest row need not be looked at again.
        room = [entry for entry in room if entry.tokens >= shortest]
    # `placed` follows the sorted rows: expand it, then undo the sorting.
    chunks, rows = np.array(placed, dtype=np.int64).reshape(-1, 2).T
    chunk_of = np.empty(len(lengths), dtype=np.int64)
    chunk_of[order] = np.repeat(chunks, rows)
    return chunk_of, num_chunks


def _cost_budget(max_tokens: int, max_cost: float | None, attention_length: float) -> float:
    """Return the cost budget of a chunk, widened by a rounding error."""
    full = max_tokens * (1.0 + max_tokens / attention_length)
    # Sums of costs differ in their last bits by the order of the rows; a chunk that is exactly full
    # must count as such in every order.
    return (full if max_cost is None else max_cost) * (1.0 + 1e-9)


@dataclasses.dataclass(slots=True)
class _Room:
    """Tokens and cost that a chunk can still take."""

    chunk: int
    tokens: int
    cost: float

    def take(self, length: int, cost: float, count: int) -> int:
        """Put in as many of `count` equal rows as fit; return how many."""
        # Whichever budget ends first.
        taken = min(self.tokens // length, int(self.cost / cost), count)
        self.tokens -= taken * length
        self.cost -= taken * cost
        return taken

    def fill(self) -> int:
        """Put in one row that exceeds a budget; return 1."""
        self.tokens, self.cost = 0, 0.0
        return 1
