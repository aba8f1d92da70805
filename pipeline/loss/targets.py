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

import torch
from torch import Tensor

from pipeline import comm


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RaggedIndex:
    """Rows of differing length: row i holds `values[offsets[i]:offsets[i + 1]]`."""

    offsets: Tensor  # (rows + 1,) int64
    values: Tensor  # (entries,) int64

    def entries(self, rows_R: Tensor) -> tuple[Tensor, Tensor]:
        """Find every entry of the chosen rows.

        Args:
            rows_R: (R,) numbers of the rows.

        Returns:
            (P,) index into `rows_R` of the row that the entry belongs to, ascending, and (P,)
            index of the entry in `values`.
        """
        starts_R = self.offsets[rows_R]
        counts_R = self.offsets[rows_R + 1] - starts_R
        row_P = torch.repeat_interleave(counts_R)
        first_R = counts_R.cumsum(0) - counts_R
        within_P = torch.arange(row_P.numel(), device=row_P.device) - first_R[row_P]
        return row_P, starts_R[row_P] + within_P


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """The loss of the global batch and its gradient by the embeddings of this rank.

    The gradients are exactly d(global mean loss) / d(own embeddings). They are *not* multiplied by
    the world size: a caller that averages gradients over ranks has to multiply.
    """

    loss: Tensor  # () float32, the same on every rank
    query_grad: Tensor  # (B, E) float32
    document_grad: Tensor  # (K, E) float32
    temperature_grad: float | None  # d(loss) / d(temperature) where it is learned, on every rank
    metrics: dict[str, float]  # the same on every rank


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QueryBlock:
    """Consecutive queries of one rank."""

    owner: int
    rows: slice  # of the owner's queries
    index_R: Tensor  # their global indices


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ListedPairs:
    """The listed documents of a block's queries: all positives, then, on request, own negatives."""

    num_positives: int
    row_P: Tensor  # row of the query in the block
    local_P: Tensor  # row of the document on this rank, -1 elsewhere
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
        sizes = torch.tensor([len(targets.query_index), len(targets.document_index)], device=device)
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

    def blocks(self, rows: int) -> list[QueryBlock]:
        """Cut all queries into blocks of at most `rows`; the same list on every rank."""
        blocks, offset = [], 0
        for owner, count in enumerate(self.queries_of_rank):
            for start in range(0, count, rows):
                stop = min(start + rows, count)
                index_R = self._index_N[offset + start : offset + stop]
                blocks.append(QueryBlock(owner=owner, rows=slice(start, stop), index_R=index_R))
            offset += count
        return blocks

    def excluded(self, block: QueryBlock) -> tuple[Tensor, Tensor]:
        """Return row and local column of the block's positives and masked documents here."""
        row, document = self._positives_and_masked(block)
        column = self._local_M[document]
        # Once: on a GPU `nonzero` waits for the count, as selecting by a mask would each time.
        here = torch.nonzero(column >= 0)[:, 0]
        return row[here], column[here]

    def pairs(self, block: QueryBlock, *, with_negatives: bool) -> ListedPairs:
        """List the block's positives, and its own negatives on request."""
        targets = self._targets
        row_P, document_P, teacher_P = _lookup(targets.positives, targets.teacher_positives, block)
        num_positives = row_P.shape[0]
        contrasted_P = torch.zeros_like(row_P, dtype=torch.bool)
        if with_negatives:
            row, document, teacher = _lookup(targets.negatives, targets.teacher_negatives, block)
            barred = self._pair_number(*self._positives_and_masked(block))
            contrasted = ~torch.isin(self._pair_number(row, document), barred)
            row_P, document_P = torch.cat([row_P, row]), torch.cat([document_P, document])
            contrasted_P = torch.cat([contrasted_P, contrasted])
            if teacher_P is not None and teacher is not None:
                teacher_P = torch.cat([teacher_P, teacher])
        return ListedPairs(
            num_positives=num_positives,
            row_P=row_P,
            local_P=self._local_M[document_P],
            teacher_P=teacher_P,
            contrasted_P=contrasted_P,
        )

    def _positives_and_masked(self, block: QueryBlock) -> tuple[Tensor, Tensor]:
        positive, masked = (
            _lookup(table, None, block) for table in (self._targets.positives, self._targets.masked)
        )
        return torch.cat([positive[0], masked[0]]), torch.cat([positive[1], masked[1]])

    def _pair_number(self, row: Tensor, document: Tensor) -> Tensor:
        return row * self._targets.num_documents + document


def _lookup(
    table: RaggedIndex, scores: Tensor | None, block: QueryBlock
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return row, global document and score of every entry of the block's queries."""
    row, position = table.entries(block.index_R)
    return row, table.values[position], None if scores is None else scores[position].double()
