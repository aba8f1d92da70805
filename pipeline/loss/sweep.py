"""One block of queries against this rank's documents: sums of exponentials and gradients, tiled.

    scores of a tile (R, T) -> running peak and mass of each query        (statistics)
    [ranks combine peak and mass; the caller weighs each query]
    the same tile again, kept or recomputed -> gradient of both sides     (accumulate_gradients)

R queries of the block, K documents of this rank, T of them in a tile, E embedding width.
No more than a block's scores exist at any time. Nothing is ever subtracted from a sum of
exponentials: a document that must not count has score -inf.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pipeline import comm
from pipeline.loss.tiles import TilePlan

# Stands for "no score yet"; -inf would make exp(score - peak) a nan in an empty row.
LOWEST = torch.finfo(torch.float32).min


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LogMass:
    """log of a sum of exponentials, in two parts: sum = mass * exp(peak)."""

    peak: Tensor  # float32, the highest score
    mass: Tensor  # float64

    @classmethod
    def empty(cls, size: int, device: torch.device) -> LogMass:
        """The sum over nothing."""
        return cls(
            peak=torch.full((size,), LOWEST, device=device),
            mass=torch.zeros(size, dtype=torch.float64, device=device),
        )

    def log(self) -> Tensor:
        """The logarithm, float64; about the lowest float32 where nothing was summed."""
        return (self.peak.double() + self.mass.log()).clamp_min(LOWEST)

    def over_ranks(self) -> LogMass:
        """The sum over all ranks' terms."""
        parts = comm.all_gather_stack(torch.stack([self.peak.double(), self.mass]))  # (W, 2, R)
        peak = parts[:, 0].amax(0)
        mass = (parts[:, 1] * (parts[:, 0] - peak).exp()).sum(0)
        return LogMass(peak=peak.float(), mass=mass)


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
    ) -> None:
        """Prepare the block.

        Args:
            query_RE: rows whose dot product with `document_KE` is the score.
            document_KE: this rank's documents.
            excluded: row and column of each pair that is no negative.
            ceiling_R: a higher score than this is no negative either.
            plan: tile width, and whether to keep scores between the two uses.
        """
        self._query_RE, self._document_KE = query_RE, document_KE
        self._ceiling_R, self._plan = ceiling_R, plan
        starts = range(0, document_KE.shape[0], plan.columns)
        column, order = excluded[1].sort()
        self._excluded = (excluded[0][order], column)
        edges = torch.tensor([*starts, document_KE.shape[0]], device=column.device)
        bounds = torch.searchsorted(column, edges).tolist()
        self._tiles = list(zip(starts, bounds[:-1], bounds[1:], strict=True))
        self._kept: list[tuple[Tensor, Tensor]] = []

    def statistics(self) -> LogMass:
        """Peak and mass of each query over this rank's negatives."""
        total = LogMass.empty(self._query_RE.shape[0], self._query_RE.device)
        for tile in self._tiles:
            score_RT = self._scores(*tile)
            peak_R = torch.maximum(total.peak, score_RT.amax(1))
            weight_RT = score_RT.sub_(peak_R[:, None]).exp_()
            faded_R = total.mass * (total.peak - peak_R).double().exp()
            total = LogMass(peak=peak_R, mass=faded_R + weight_RT.sum(1).double())
            if self._plan.keep_scores:
                self._kept.append((weight_RT, peak_R))
        return total

    def accumulate_gradients(
        self, log_mass_R: Tensor, weight_R: Tensor, document_grad_KE: Tensor
    ) -> Tensor:
        """Gradients of `sum_i weight_i * log sum_j exp(score_ij)`, j over this rank's negatives.

        Args:
            log_mass_R: (R,) float64, log of the sum over the negatives of *all* ranks.
            weight_R: (R,) float64.
            document_grad_KE: this rank's part is added to it.

        Returns:
            (R, E) gradient by the queries, this rank's documents only.
        """
        query_grad_RE = torch.zeros_like(self._query_RE)
        for number, tile in enumerate(self._tiles):
            weight_RT, peak_R = self._weights(number)
            factor_R1 = (weight_R * (peak_R.double() - log_mass_R).exp()).float()[:, None]
            here = slice(tile[0], tile[0] + self._plan.columns)
            query_grad_RE.addcmul_(weight_RT @ self._document_KE[here], factor_R1)
            document_grad_KE[here].addmm_(weight_RT.T, self._query_RE * factor_R1)
        return query_grad_RE

    def _weights(self, number: int) -> tuple[Tensor, Tensor]:
        """exp(score - peak) of a tile, and the peak."""
        if self._plan.keep_scores:
            return self._kept[number]
        score_RT = self._scores(*self._tiles[number])
        peak_R = score_RT.amax(1).clamp_min(LOWEST)
        return score_RT.sub_(peak_R[:, None]).exp_(), peak_R

    def _scores(self, start: int, first: int, last: int) -> Tensor:
        document_TE = self._document_KE[start : start + self._plan.columns]
        score_RT = self._query_RE @ document_TE.T
        if self._ceiling_R is not None:
            score_RT.masked_fill_(score_RT > self._ceiling_R[:, None], -torch.inf)
        row, column = (index[first:last] for index in self._excluded)
        score_RT[row, column - start] = -torch.inf
        return score_RT
