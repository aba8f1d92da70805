"""One block of queries against this rank's documents: sums of exponentials and gradients, tiled.

    scores of a tile (R, T) -> running peak and mass of each query        (statistics)
    [ranks combine peak and mass; the caller weighs each query]
    the same tile again, kept or recomputed -> gradient of both sides     (accumulate_gradients)

R queries of the block, K documents of this rank, T of them in a tile, E embedding width.
No more than a block's scores exist at any time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.loss.log_mass import LogMass, Refined, absorb_
from pipeline.loss.tiles import TilePlan


class Sweep:
    """The scores of one block, as often as they are needed."""

    def __init__(
        self,
        query_RE: Tensor,
        document_KE: Tensor,
        *,
        excluded: tuple[Tensor, Tensor],
        ceiling_R: Tensor | None,
        plan: TilePlan,
        scratch: Tensor,
    ) -> None:
        """Prepare the block.

        Args:
            query_RE: rows whose dot product with `document_KE` is the score.
            document_KE: this rank's documents.
            excluded: row and column of each pair that is no negative.
            ceiling_R: a higher score than this is no negative either.
            plan: tile width, and whether to keep scores between the two uses.
            scratch: (plan.num_slots, plan.rows * plan.columns) float32 that the scores live in.
        """
        self._query_RE, self._document_KE = query_RE, document_KE
        self._ceiling_R, self._plan, self._scratch = ceiling_R, plan, scratch
        starts = range(0, document_KE.shape[0], plan.columns)
        column, order = excluded[1].sort()
        self._excluded = (excluded[0][order], column)
        edges = torch.tensor([*starts, document_KE.shape[0]], device=column.device)
        bounds = torch.searchsorted(column, edges).tolist()
        self._tiles = list(zip(starts, bounds[:-1], bounds[1:], strict=True))
        self._peaks: list[Tensor] = []  # (R,) of each tile, if its scores are kept
        self._refined: list[list[Refined]] = []
        self._peak_R = torch.empty(0)

    def statistics(self, columns: LogMass | None = None) -> LogMass:
        """Peak and mass of each query over this rank's negatives.

        Args:
            columns: sums of each document of this rank over the queries that have it as a
                negative; the block is added to them.
        """
        total = LogMass.empty(self._query_RE.shape[0], self._query_RE.device)
        for number, (start, _, _) in enumerate(self._tiles):
            here = self._columns(start)
            score_RT = self._scores(number, slot=number if self._plan.keep_scores else 0)
            refined: list[Refined] = []
            if columns is not None:
                refined.append(self._absorb_columns_(columns.part(here), score_RT, number))
            total, refined_rows = absorb_(
                total, score_RT, left_RE=self._query_RE, right_TE=self._document_KE[here]
            )
            self._refined.append([*refined, refined_rows])
            if self._plan.keep_scores:
                self._peaks.append(total.peak)
        self._peak_R = total.peak
        return total

    def _absorb_columns_(self, columns: LogMass, score_RT: Tensor, number: int) -> Refined:
        new, refined = absorb_(
            columns,
            self._slot(number, 1).view(score_RT.T.shape).copy_(score_RT.T),
            left_RE=self._document_KE[self._columns(self._tiles[number][0])],
            right_TE=self._query_RE,
        )
        columns.peak.copy_(new.peak)
        columns.mass.copy_(new.mass)
        return Refined(row=refined.column, column=refined.row, score=refined.score)

    def accumulate_gradients(
        self,
        log_mass_R: Tensor,
        weight_R: Tensor,
        document_grad_KE: Tensor,
        columns: tuple[LogMass, Tensor] | None = None,
    ) -> Tensor:
        """Gradients of `sum_i weight_i * log sum_j exp(score_ij)`, j over this rank's negatives.

        Args:
            log_mass_R: (R,) float64, log of the sum over the negatives of *all* ranks.
            weight_R: (R,) float64.
            document_grad_KE: this rank's part is added to it.
            columns: the documents' complete sums and their weights (K,), whose gradient is added.

        Returns:
            (R, E) gradient by the queries, this rank's documents only.
        """
        query_grad_RE = torch.zeros_like(self._query_RE)
        for number, (start, _, _) in enumerate(self._tiles):
            here = self._columns(start)
            document_TE, document_grad_TE = self._document_KE[here], document_grad_KE[here]
            weight_RT, peak_R = self._weights(number)
            factor_R1 = (weight_R * (peak_R.double() - log_mass_R).exp()).float()[:, None]
            if columns is None:
                query_grad_RE.addcmul_(weight_RT @ document_TE, factor_R1)
                document_grad_TE.addmm_(weight_RT.T, self._query_RE * factor_R1)
                continue
            mass, weight_K = columns[0].part(here), columns[1][here]
            factor_T = (weight_K * (mass.peak.double() - mass.log()).exp()).float()
            weight_RT.mul_(factor_R1)
            weight_RT.addcmul_(self._column_weights(number, mass.peak), factor_T)
            query_grad_RE.addmm_(weight_RT, document_TE)
            document_grad_TE.addmm_(weight_RT.T, self._query_RE)
        return query_grad_RE

    def _weights(self, number: int) -> tuple[Tensor, Tensor]:
        """exp(score - peak) of a tile, and the peak of its rows."""
        if self._plan.keep_scores:
            return self._slot(number, number), self._peaks[number]
        weight_RT = self._scores(number, slot=0).sub_(self._peak_R[:, None]).exp_()
        for refined in self._refined[number]:
            refined.write_weights_(weight_RT, self._peak_R[refined.row])
        return weight_RT, self._peak_R

    def _column_weights(self, number: int, peak_T: Tensor) -> Tensor:
        """exp(score - peak), with the peak of its columns."""
        weight_RT = self._scores(number, slot=1).sub_(peak_T).exp_()
        for refined in self._refined[number]:
            refined.write_weights_(weight_RT, peak_T[refined.column])
        return weight_RT

    def _columns(self, start: int) -> slice:
        return slice(start, start + self._plan.columns)

    def _slot(self, number: int, slot: int) -> Tensor:
        """The place of a tile's scores (R, T)."""
        num_rows, num_documents = self._query_RE.shape[0], self._document_KE.shape[0]
        width = min(self._plan.columns, num_documents - self._tiles[number][0])
        return self._scratch[slot, : num_rows * width].view(num_rows, width)

    def _scores(self, number: int, slot: int) -> Tensor:
        start, first, last = self._tiles[number]
        score_RT = self._slot(number, slot)
        torch.mm(self._query_RE, self._document_KE[self._columns(start)].T, out=score_RT)
        if self._ceiling_R is not None:
            score_RT.masked_fill_(score_RT > self._ceiling_R[:, None], -torch.inf)
        row, column = (index[first:last] for index in self._excluded)
        score_RT[row, column - start] = -torch.inf
        return score_RT
