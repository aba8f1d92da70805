"""Sums of exponentials that are fed tile by tile and combined over ranks.

R rows, T columns of a tile. Nothing is ever subtracted from such a sum to leave a document out:
a document that must not count has score -inf.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pipeline import comm
from pipeline.loss.pairs import dot_pairs

# Stands for "no score yet"; -inf would make exp(score - peak) a nan in an empty row.
LOWEST = torch.finfo(torch.float32).min
# A product of float32 rows of length L is off by about 1e-7 L^2: more than the softmax may be off
# by where a score of 50 or more meets a probability that matters. Such scores, those with
# probability * peak > _SIGNIFICANT, are computed again in float64; they are few in any row.
_SIGNIFICANT = 1.0
# Columns searched for significant scores together: only where their maximum is one.
_GROUP = 128


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LogMass:
    """log of a sum of exponentials, in two parts: sum = mass * exp(peak)."""

    peak: Tensor  # (R,) float32, the highest score
    mass: Tensor  # (R,) float64

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

    def part(self, columns: slice) -> LogMass:
        """A view of some of the sums."""
        return LogMass(peak=self.peak[columns], mass=self.mass[columns])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Refined:
    """Scores of a tile that float32 does not hold well enough."""

    row: Tensor
    column: Tensor
    score: Tensor  # float64

    def write_weights_(self, weight_RT: Tensor, peak: Tensor) -> None:
        """Overwrite exp(score - peak) at these places, given the peak that holds at each."""
        weight_RT[self.row, self.column] = (self.score - peak.double()).exp().float()


def absorb_(
    total: LogMass, score_RT: Tensor, *, left_RE: Tensor, right_TE: Tensor
) -> tuple[LogMass, Refined]:
    """Add a tile's columns to the sums of its rows.

    Args:
        total: the sums so far.
        score_RT: the tile; becomes exp(score - new peak).
        left_RE: rows that gave the scores, to compute the significant ones again.
        right_TE: the other side's rows.

    Returns:
        The new sums, and the scores that were computed again.
    """
    num_rows, width = score_RT.shape
    group = _GROUP if width % _GROUP == 0 else width
    peak_RG = score_RT.view(num_rows, width // group, group).amax(2)
    peak_R = torch.maximum(total.peak, peak_RG.amax(1))
    weight_RT = score_RT.sub_(peak_R[:, None]).exp_()
    faded_R = total.mass * (total.peak - peak_R).double().exp()
    mass_R = faded_R + weight_RT.sum(1).double()
    threshold_R = (_SIGNIFICANT / peak_R.abs().clamp_min(1) * mass_R).float()
    row, column = _above(weight_RT, threshold_R, (peak_RG - peak_R[:, None]).exp())
    refined = Refined(row=row, column=column, score=dot_pairs(left_RE, row, right_TE, column))
    before = weight_RT[row, column].double()
    refined.write_weights_(weight_RT, peak_R[row])
    mass_R.index_add_(0, row, weight_RT[row, column].double() - before)
    return LogMass(peak=peak_R, mass=mass_R), refined


def _above(weight_RT: Tensor, threshold_R: Tensor, top_RG: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the weights above their row's threshold; `top_RG` is each group's best."""
    group = weight_RT.shape[1] // top_RG.shape[1]
    row_H, group_H = (top_RG > threshold_R[:, None]).nonzero(as_tuple=True)
    found_HT = weight_RT.view(*top_RG.shape, group)[row_H, group_H]
    hit, within = (found_HT > threshold_R[row_H, None]).nonzero(as_tuple=True)
    return row_H[hit], group_H[hit] * group + within
