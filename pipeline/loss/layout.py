"""Which rank holds what, the blocks all ranks work through together, and the pairs of a block."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pipeline import comm
from pipeline.loss.targets import RaggedIndex, Targets


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Consecutive queries of one rank."""

    owner: int
    rows: slice  # of the owner's queries
    index_R: Tensor  # their global indices


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockPairs:
    """The listed documents of a block's queries: positives, then own negatives where asked for."""

    num_positives: int
    row_P: Tensor  # place of the query in the block
    local_P: Tensor  # place of the document on this rank, -1 elsewhere
    teacher_P: Tensor | None  # float64
    contrasted_P: Tensor  # bool: an own negative that is neither positive nor masked

    def positives(self, value_P: Tensor) -> Tensor:
        """The leading part that belongs to positives."""
        return value_P[: self.num_positives]


class Layout:
    """The global batch as this rank sees it; building it is a collective call."""

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
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
        places = torch.arange(len(targets.document_index), device=device)
        self._local_M[targets.document_index] = places

    def blocks(self, rows: int) -> list[Block]:
        """All queries in blocks of at most `rows`; the same list on every rank."""
        blocks, offset = [], 0
        for owner, count in enumerate(self.queries_of_rank):
            for start in range(0, count, rows):
                stop = min(start + rows, count)
                index_R = self._index_N[offset + start : offset + stop]
                blocks.append(Block(owner=owner, rows=slice(start, stop), index_R=index_R))
            offset += count
        return blocks

    def excluded(self, block: Block) -> tuple[Tensor, Tensor]:
        """Row and local column of the block's positives and masked documents on this rank."""
        row, document = self._positives_and_masked(block)
        column = self._local_M[document]
        here = torch.nonzero(column >= 0)[:, 0]  # once: on a GPU it waits, as each mask would
        return row[here], column[here]

    def pairs(self, block: Block, *, with_negatives: bool) -> BlockPairs:
        """The block's positives, and its own negatives where asked for."""
        targets = self.targets
        row_P, document_P, teacher_P = _lookup(targets.positives, targets.teacher_positives, block)
        num_positives = row_P.shape[0]
        contrasted_P = torch.zeros_like(row_P, dtype=torch.bool)
        if with_negatives:
            row, document, teacher = _lookup(targets.negatives, targets.teacher_negatives, block)
            barred = self._keys(*self._positives_and_masked(block))
            contrasted = ~torch.isin(self._keys(row, document), barred)
            row_P, document_P = torch.cat([row_P, row]), torch.cat([document_P, document])
            contrasted_P = torch.cat([contrasted_P, contrasted])
            if teacher_P is not None and teacher is not None:
                teacher_P = torch.cat([teacher_P, teacher])
        return BlockPairs(
            num_positives=num_positives,
            row_P=row_P,
            local_P=self._local_M[document_P],
            teacher_P=teacher_P,
            contrasted_P=contrasted_P,
        )

    def _positives_and_masked(self, block: Block) -> tuple[Tensor, Tensor]:
        positive, masked = (
            _lookup(table, None, block) for table in (self.targets.positives, self.targets.masked)
        )
        return torch.cat([positive[0], masked[0]]), torch.cat([positive[1], masked[1]])

    def _keys(self, row: Tensor, document: Tensor) -> Tensor:
        return row * self.targets.num_documents + document


def _lookup(
    table: RaggedIndex, scores: Tensor | None, block: Block
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Row, global document and score of every entry of the block's queries."""
    row, position = table.entries(block.index_R)
    return row, table.values[position], None if scores is None else scores[position].double()
