"""The contrastive loss of a global batch that no rank holds, and its exact gradients.

    for each block of queries:  owner ----broadcast----> all ranks
        every rank: scores against its own documents, tile by tile      (sweep, pairs)
        ranks combine peak and mass of each query -> loss, weights
        every rank: gradient of its documents (stays), of the block --reduce--> owner

Documents never travel. Each (query i, positive p) is contrasted with the query's negatives alone,

    l_ip = -log( exp(s_ip) / (exp(s_ip) + sum_j exp(s_ij)) ),   j over the negatives of i,

which is InfoNCE (van den Oord et al., arXiv 1807.03748, eq. 4) once per positive; the other
positives stand in no denominator, as masked false negatives do not. The loss is the mean over
queries of the mean over their positives. With z_i = log sum_j exp(s_ij) it is softplus(z_i - s_ip),
and no gradient is ever a difference of two nearly equal numbers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pipeline import comm
from pipeline.config import LossConfig
from pipeline.loss import pairs
from pipeline.loss.similarity import ScoreRows
from pipeline.loss.sweep import Sweep
from pipeline.loss.targets import LossOutput, RaggedIndex, Targets
from pipeline.loss.tiles import TilePlan, plan_tiles

__all__ = ["LossOutput", "RaggedIndex", "Targets", "contrastive_loss"]

_BUDGET_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}


@torch.no_grad()
def contrastive_loss(
    query_BE: Tensor, document_KE: Tensor, targets: Targets, *, config: LossConfig
) -> LossOutput:
    """The loss over all queries and documents of all ranks; a collective call.

    Args:
        query_BE: embeddings of this rank's queries.
        document_KE: embeddings of this rank's documents.
        targets: where these rows belong and which pairs are positive.
        config: similarity, temperature, and the rest of the recipe.
    """
    with torch.autocast(query_BE.device.type, enabled=False):
        return _Contrast(query_BE, document_KE, targets, config).run()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Pairs:
    """The positives of a block's queries."""

    row_P: Tensor
    local_P: Tensor  # -1 where the document is on another rank
    weight_P: Tensor  # float64: share of the global mean


class _Contrast:
    """One evaluation of the loss."""

    def __init__(
        self, query_BE: Tensor, document_KE: Tensor, targets: Targets, config: LossConfig
    ) -> None:
        self.targets, self.config = targets, config
        cosine = config.similarity == "cosine"
        width = query_BE.shape[1]
        scale = 1 / config.temperature
        if config.similarity == "scaled_dot":
            scale /= width
        self.query = ScoreRows.build(query_BE, scale=scale, cosine=cosine)
        self.document = ScoreRows.build(document_KE, scale=1.0, cosine=cosine)
        self.query_grad_BE = torch.zeros_like(self.query.rows_BE)
        self.document_grad_KE = torch.zeros_like(self.document.rows_BE)
        self.loss = torch.zeros((), dtype=torch.float64, device=query_BE.device)
        self.num_correct = torch.zeros((), dtype=torch.int64, device=query_BE.device)
        device = query_BE.device
        self.local_M = torch.full((targets.num_documents,), -1, device=device)
        self.local_M[targets.document_index] = torch.arange(document_KE.shape[0], device=device)
        counts = torch.tensor([query_BE.shape[0], document_KE.shape[0]], device=device)
        self.counts = comm.all_gather_stack(counts).tolist()  # (W, 2)
        self.query_index_N, _ = comm.all_gather_rows(targets.query_index)

    def run(self) -> LossOutput:
        """All blocks of all ranks, in rank order."""
        plan = plan_tiles(
            num_queries=max(queries for queries, _ in self.counts),
            num_rank_documents=max(documents for _, documents in self.counts),
            budget_bytes=_BUDGET_BYTES[self.query.rows_BE.device.type],
        )
        offset = 0
        for owner, (num_rows, _) in enumerate(self.counts):
            for start in range(0, num_rows, plan.rows):
                rows = slice(start, min(start + plan.rows, num_rows))
                index_R = self.query_index_N[offset + rows.start : offset + rows.stop]
                self._block(owner, rows, index_R, plan)
            offset += num_rows
        return LossOutput(
            loss=self.loss.float(),
            query_grad=self.query.gradient_(self.query_grad_BE),
            document_grad=self.document.gradient_(self.document_grad_KE),
            temperature_grad=None,
            metrics={"accuracy@1": int(self.num_correct) / self.targets.num_queries},
        )

    def _block(self, owner: int, rows: slice, index_R: Tensor, plan: TilePlan) -> None:
        mine = comm.rank() == owner
        width = self.document.rows_BE.shape[1]
        query_RE = (
            self.query.rows_BE[rows].contiguous()
            if mine
            else self.document.rows_BE.new_empty(rows.stop - rows.start, width)
        )
        comm.broadcast_(query_RE, owner)
        positives = self._positives(index_R)
        num_rows = index_R.shape[0]
        score_P = comm.all_reduce_(
            pairs.pair_scores(query_RE, positives.row_P, self.document.rows_BE, positives.local_P)
        )
        sweep = Sweep(
            query_RE,
            self.document.rows_BE,
            excluded=self._excluded(index_R, positives),
            ceiling_R=None,
            plan=plan,
        )
        total = sweep.statistics().over_ranks()
        gap_P = total.log()[positives.row_P] - score_P
        self.loss += (positives.weight_P * softplus(gap_P)).sum()
        best_R = pairs.segment_max(score_P, positives.row_P, num_rows)
        self.num_correct += (best_R > total.peak).sum()
        pull_P = positives.weight_P * gap_P.sigmoid()
        query_grad_RE = sweep.accumulate_gradients(
            total.log(),
            pairs.segment_sum(pull_P, positives.row_P, num_rows),
            self.document_grad_KE,
        )
        pairs.accumulate_pair_gradients(
            -pull_P,
            positives.row_P,
            positives.local_P,
            query_RE=query_RE,
            document_KE=self.document.rows_BE,
            query_grad_RE=query_grad_RE,
            document_grad_KE=self.document_grad_KE,
        )
        comm.reduce_(query_grad_RE, owner)
        if mine:
            self.query_grad_BE[rows] = query_grad_RE

    def _positives(self, index_R: Tensor) -> _Pairs:
        row_P, position_P = self.targets.positives.entries(index_R)
        count_R = torch.bincount(row_P, minlength=index_R.shape[0]).double()
        return _Pairs(
            row_P=row_P,
            local_P=self.local_M[self.targets.positives.values[position_P]],
            weight_P=1 / (count_R[row_P] * self.targets.num_queries),
        )

    def _excluded(self, index_R: Tensor, positives: _Pairs) -> tuple[Tensor, Tensor]:
        """Row and local column of the block's pairs that are no negatives."""
        row, position = self.targets.masked.entries(index_R)
        row = torch.cat([positives.row_P, row])
        column = torch.cat([positives.local_P, self.local_M[self.targets.masked.values[position]]])
        here = column >= 0
        return row[here], column[here]
