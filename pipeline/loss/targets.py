"""Inputs and outputs of the loss, and the part of the global batch that each rank holds.

Global indices of the batch (queries 0..N-1, documents 0..M-1) are the same on every rank; a rank's
own rows are counted locally. With two ranks, queries and documents shared out as

    rank 0   q0 q1   d0 d1          rank 1   q2   d2 d3

document d3 is local row 1 on rank 1 and -1 ("elsewhere") on rank 0.

Shapes: B queries and K documents of this rank, R queries of a block, P pairs of a block's query and
a document that is listed for it, E embedding width.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline import comm


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RaggedIndex:
    """Rows of differing length: row i holds `values[offsets[i]:offsets[i + 1]]`."""

    offsets: Tensor  # (rows + 1,) int64
    values: Tensor  # (entries,) int64

    def entries(self, rows_R: Tensor, num_entries: int) -> tuple[Tensor, Tensor]:
        """Find every entry of the chosen rows.

        Args:
            rows_R: (R,) numbers of the rows.
            num_entries: P, of all these rows; without it the host would wait for a GPU to count.

        Returns:
            (P,) index into `rows_R` of the row that the entry belongs to, ascending, and (P,)
            index of the entry in `values`.
        """
        starts_R = self.offsets[rows_R]
        counts_R = self.offsets[rows_R + 1] - starts_R
        row_P = torch.repeat_interleave(counts_R, output_size=num_entries)
        first_R = counts_R.cumsum(0) - counts_R
        within_P = torch.arange(row_P.numel(), device=row_P.device) - first_R[row_P]
        return row_P, starts_R[row_P] + within_P

    def running_totals(self, rows_N: Tensor, local_M: Tensor) -> Tensor:
        """Count the entries of the first n of the chosen rows, for every n from 0 to N.

        Args:
            rows_N: (N,) numbers of the rows.
            local_M: row on this rank of each value, -1 elsewhere.

        Returns:
            (2, N + 1) all entries, and those whose value is on this rank.
        """
        first_N, last_N = self.offsets[rows_N], self.offsets[rows_N + 1]
        here = pad((local_M[self.values] >= 0).cumsum(0), (1, 0))
        counts_2N = torch.stack([last_N - first_N, here[last_N] - here[first_N]])
        return pad(counts_2N.cumsum(1), (1, 0))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The documents that each query of the global batch should find, and should not.

    The three ragged tables have one row per global query and hold global document indices; they
    are the same on every rank. Together the ranks hold each query and each document exactly once.
    """

    num_queries: int
    num_documents: int
    query_index: Tensor  # (B,) int64: global index of each query row of this rank
    document_index: Tensor  # (K,) int64: global index of each document row of this rank
    positives: RaggedIndex  # at least one each
    negatives: RaggedIndex  # each query's own hard negatives, any number
    masked: RaggedIndex  # documents that must not count as negatives; a positive is always exempt
    teacher_positives: Tensor | None = None  # a teacher's score of every `positives.values`
    teacher_negatives: Tensor | None = None  # and of every `negatives.values`
    # Stored vectors of a teacher for this rank's rows, (B, W) and (K, W), both or neither.
    teacher_query: Tensor | None = None
    teacher_document: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """The loss of the global batch and its gradient by the embeddings of this rank.

    The gradients are exactly d(global mean loss) / d(own embeddings). They are *not* multiplied by
    the world size: a caller that averages gradients over ranks has to multiply.
    """

    loss: Tensor  # () float32 in host memory, the same on every rank
    query_grad: Tensor  # (B, E) float32
    document_grad: Tensor  # (K, E) float32
    temperature_grad: float | None  # d(loss) / d(temperature) where it is learned, on every rank
    metrics: dict[str, float]  # the same on every rank
    # (E, W) d(loss) / d(projection), summed over ranks, where the loss has one
    projection_grad: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EntryCount:
    """The number of a block's entries in one ragged table, known to the host."""

    total: int
    here: int  # whose document is on this rank


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QueryBlock:
    """Consecutive queries of one rank."""

    owner: int
    rows: slice  # of the owner's queries
    index_R: Tensor  # their global indices
    positives: EntryCount
    negatives: EntryCount
    masked: EntryCount


def broadcast_rows(rows_BE: Tensor, block: QueryBlock) -> Tensor:
    """Return a block's rows (R, E) on all ranks; on its owner, a view."""
    if comm.rank() == block.owner:
        block_RE = rows_BE[block.rows]
    else:
        block_RE = rows_BE.new_empty((block.index_R.shape[0], rows_BE.shape[1]))
    return comm.broadcast_(block_RE, block.owner)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ListedPairs:
    """The listed documents of a block's queries: all positives, then, on request, own negatives."""

    num_positives: int
    row_P: Tensor  # row of the query in the block
    local_P: Tensor  # row of the document on this rank, -1 elsewhere
    here: Tensor  # numbers of the pairs whose document is on this rank, ascending
    num_positives_here: int
    teacher_P: Tensor | None  # float64
    contrasted_P: Tensor  # bool: an own negative that is neither positive nor masked

    def positives(self, value_P: Tensor) -> Tensor:
        """Return a view of the leading part that belongs to positives."""
        return value_P[: self.num_positives]


class RankTargets:
    """Targets as this rank needs them, by local rows; building them is a collective call."""

    def __init__(self, targets: Targets) -> None:
        self._targets, self.num_queries = targets, targets.num_queries
        device = targets.query_index.device
        sizes = torch.tensor([len(targets.query_index), len(targets.document_index)])
        sizes = sizes.to(device, non_blocking=True)
        counts: list[tuple[int, int]] = comm.all_gather_stack(sizes).tolist()
        self.queries_of_rank = [queries for queries, _ in counts]
        self.max_documents = max(documents for _, documents in counts)
        total = (sum(self.queries_of_rank), sum(documents for _, documents in counts))
        assert total == (targets.num_queries, targets.num_documents), (
            f"ranks hold {total} queries and documents of "
            f"{(targets.num_queries, targets.num_documents)}"
        )
        self._index_N, _ = comm.all_gather_rows(targets.query_index)
        self._local_M = torch.full((targets.num_documents,), -1, device=device)
        self._local_M[targets.document_index] = torch.arange(
            len(targets.document_index), device=device
        )
        self._blocks: dict[int, list[QueryBlock]] = {}

    def blocks(self, rows: int) -> list[QueryBlock]:
        """Cut all queries into blocks of at most `rows`; the same blocks on every rank."""
        # Kept, because all widths of an embedding have the same.
        if rows not in self._blocks:
            self._blocks[rows] = self._cut(rows)
        return self._blocks[rows]

    def _cut(self, rows: int) -> list[QueryBlock]:
        spans, edges = [], [0]
        for owner, count in enumerate(self.queries_of_rank):
            for start in range(0, count, rows):
                stop = min(start + rows, count)
                spans.append((owner, slice(start, stop)))
                edges.append(edges[-1] + stop - start)
        counts = self._count_entries(edges)
        return [
            QueryBlock(
                owner=owner,
                rows=part,
                index_R=self._index_N[first:last],
                positives=positives,
                negatives=negatives,
                masked=masked,
            )
            for (owner, part), (first, last), (positives, negatives, masked) in zip(
                spans, itertools.pairwise(edges), counts, strict=True
            )
        ]

    def _count_entries(self, edges: list[int]) -> list[list[EntryCount]]:
        """Count positives, negatives and masked documents of each block; waits for a GPU once."""
        targets = self._targets
        tables = (targets.positives, targets.negatives, targets.masked)
        totals = torch.stack([t.running_totals(self._index_N, self._local_M) for t in tables])
        at_edges = totals[:, :, torch.tensor(edges).to(totals.device, non_blocking=True)]
        # (3 tables, 2, blocks + 1) -> blocks x 3 tables x 2
        counts = at_edges.diff(dim=2).permute(2, 0, 1).tolist()
        return [[EntryCount(total=n, here=here) for n, here in block] for block in counts]

    def excluded(self, block: QueryBlock) -> tuple[Tensor, Tensor]:
        """Return row and local column of the block's positives and masked documents here."""
        row, document = self._positives_and_masked(block)
        column = self._local_M[document]
        here = _numbers_of(column >= 0, block.positives.here + block.masked.here)
        return row[here], column[here]

    def pairs(self, block: QueryBlock, *, with_negatives: bool) -> ListedPairs:
        """List the block's positives, and its own negatives on request."""
        targets = self._targets
        row_P, document_P, teacher_P = _lookup(
            targets.positives, targets.teacher_positives, block.index_R, block.positives
        )
        num_here = block.positives.here
        contrasted_P = torch.zeros_like(row_P, dtype=torch.bool)
        if with_negatives:
            row, document, teacher = _lookup(
                targets.negatives, targets.teacher_negatives, block.index_R, block.negatives
            )
            num_here += block.negatives.here
            barred = self._pair_number(*self._positives_and_masked(block))
            contrasted = ~_is_among(self._pair_number(row, document), barred)
            row_P, document_P = torch.cat([row_P, row]), torch.cat([document_P, document])
            contrasted_P = torch.cat([contrasted_P, contrasted])
            if teacher_P is not None and teacher is not None:
                teacher_P = torch.cat([teacher_P, teacher])
        local_P = self._local_M[document_P]
        return ListedPairs(
            num_positives=block.positives.total,
            row_P=row_P,
            local_P=local_P,
            here=_numbers_of(local_P >= 0, num_here),
            num_positives_here=block.positives.here,
            teacher_P=teacher_P,
            contrasted_P=contrasted_P,
        )

    def _positives_and_masked(self, block: QueryBlock) -> tuple[Tensor, Tensor]:
        positive = _lookup(self._targets.positives, None, block.index_R, block.positives)
        masked = _lookup(self._targets.masked, None, block.index_R, block.masked)
        return torch.cat([positive[0], masked[0]]), torch.cat([positive[1], masked[1]])

    def _pair_number(self, row: Tensor, document: Tensor) -> Tensor:
        return row * self._targets.num_documents + document


def _lookup(
    table: RaggedIndex, scores: Tensor | None, index_R: Tensor, count: EntryCount
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return row, global document and score of every entry of a block's queries."""
    row, position = table.entries(index_R, count.total)
    return row, table.values[position], None if scores is None else scores[position].double()


def _numbers_of(chosen_P: Tensor, count: int) -> Tensor:
    """Return the numbers of the true elements: `nonzero`, which would wait for a GPU to count."""
    return torch.repeat_interleave(chosen_P.long(), output_size=count)


def _is_among(value_P: Tensor, among: Tensor) -> Tensor:
    """Return which values occur in `among`: `isin`, which waits for a GPU where there are many."""
    # Never empty: every query has a positive, which is among them.
    ordered = among.sort().values
    # A value above all others would be found behind the end.
    place_P = torch.searchsorted(ordered, value_P).clamp_max(len(ordered) - 1)
    return ordered[place_P] == value_P
