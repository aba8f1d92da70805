"""Score one block of queries against this rank's documents, tile by tile, in bounded memory.

    score_RT = query_RE @ document_TE.T            positives, masked and too-near documents: -inf
    first pass    score_RT -> peak_R, mass_R       mass = sum of exp(score - peak) over negatives
    [the ranks combine peak and mass; the caller decides d(loss) / d(log mass) of each query]
    second pass   the same tile, kept or computed again -> exp(score - peak)
                  -> query_grad_RE, document_grad_TE

Nothing is ever subtracted from a sum to leave a document out: sums of exponentials of float32
scores span too many orders of magnitude. A document that must not count has score -inf.

Listed pairs (positives, own negatives) are few, and are scored one by one in float64.

Shapes: R queries of the block, K documents of this rank, T of them in a tile, E embedding width,
P listed pairs (`targets.ListedPairs`). A function whose name ends in `_` writes into an argument.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from pipeline import comm
from pipeline.loss.targets import ListedPairs
from pipeline.loss.tiles import SLICE_BYTES, SLICE_ROWS, TilePlan

# As torch.nn.functional.normalize: a zero row stays zero instead of becoming nan.
SMALLEST_NORM = 1e-12
# Length of a document row under cosine. Any length that is not a power of two would do: rounding
# must change every number, or a document that is already of unit length within float32 keeps its
# last-bit error of length, which moves all its scores together (1e-5 of a probability at 0.01).
DOCUMENT_LENGTH = math.sqrt(2)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRows:
    """Rows whose dot products are scores: `x * scale`, or `x / |x| * scale` under cosine.

    Norms and products are float64, in slices of rows, and rounded once.
    """

    rows_BE: Tensor  # float32
    factor_B: Tensor  # float64: rows = x * factor
    scale: float
    cosine: bool

    @classmethod
    def build(cls, x_BE: Tensor, *, scale: float, cosine: bool) -> ScoreRows:
        """Prepare the embeddings of one side."""
        rows_BE = torch.empty(x_BE.shape, dtype=torch.float32, device=x_BE.device)
        factor_B = torch.full((x_BE.shape[0],), scale, dtype=torch.float64, device=x_BE.device)
        for start in range(0, x_BE.shape[0], SLICE_ROWS):
            here = slice(start, start + SLICE_ROWS)
            wide = x_BE[here].double()
            if cosine:
                factor_B[here] /= wide.norm(dim=1).clamp_min(SMALLEST_NORM)
            rows_BE[here] = wide * factor_B[here, None]
        return cls(rows_BE=rows_BE, factor_B=factor_B, scale=scale, cosine=cosine)

    def write_embedding_grad_(self, out_RE: Tensor, row_grad_RE: Tensor, *, rows: slice) -> None:
        """Turn d(loss) / d(rows) into d(loss) / d(embeddings).

        With r = scale * x / |x|: g_x = factor * (g_r - r (r . g_r) / scale^2).

        Args:
            out_RE: takes the result. May be `row_grad_RE`, or `rows_BE[rows]` if those rows are
                not needed any more: each slice is read, as float64, before it is written.
            row_grad_RE: gradient by `rows_BE[rows]`.
            rows: the rows concerned.
        """
        for start in range(0, row_grad_RE.shape[0], SLICE_ROWS):
            part = slice(start, start + SLICE_ROWS)
            grad = row_grad_RE[part].double()
            here = slice(rows.start + start, rows.start + start + grad.shape[0])
            if self.cosine:
                wide = self.rows_BE[here].double()
                grad -= wide * ((wide * grad).sum(1, keepdim=True) / self.scale**2)
            out_RE[part] = grad * self.factor_B[here, None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guide:
    """A block's negatives by a teacher: none that it holds closer than a ceiling."""

    query_RW: Tensor  # rows whose dot product with the documents' is the teacher's score
    document_KW: Tensor
    ceiling_R: Tensor  # float32
    scratch: Tensor  # of at least a tile's size

    def mask_(self, score_RT: Tensor, columns: slice) -> Tensor:
        """Set the scores of a tile's documents beyond the ceiling to -inf; return their number."""
        teacher_RT = self.scratch[: score_RT.numel()].view(score_RT.shape)
        torch.mm(self.query_RW, self.document_KW[columns].T, out=teacher_RT)
        beyond_RT = (teacher_RT > self.ceiling_R[:, None]) & (score_RT > -torch.inf)
        score_RT.masked_fill_(beyond_RT, -torch.inf)
        return beyond_RT.sum()


class BlockTiles:
    """The scores of one block's negatives on this rank, as often as they are needed."""

    def __init__(
        self,
        query_RE: Tensor,
        document_KE: Tensor,
        *,
        excluded: tuple[Tensor, Tensor],
        ceiling_R: Tensor | None,
        plan: TilePlan,
        scratch: Tensor,
        guide: Guide | None = None,
    ) -> None:
        """Prepare the block.

        Args:
            query_RE: rows whose dot product with `document_KE` is the score.
            document_KE: this rank's documents.
            excluded: row and column of each pair that is not a negative.
            ceiling_R: a higher score than this is not a negative either.
            plan: tile width, and whether to keep scores between the two passes.
            scratch: (plan.num_slots, plan.rows * plan.columns) float32 that the scores live in.
            guide: leaves out further pairs.
        """
        self._query_RE, self._document_KE = query_RE, document_KE
        self._ceiling_R, self._plan, self._scratch = ceiling_R, plan, scratch
        self._guide = guide
        # Pairs that the guide left out, by tile: one that is scored again must not count twice.
        self.num_guided: dict[int, Tensor] = {}
        starts = range(0, document_KE.shape[0], plan.columns)
        # Excluded pairs by column, so that each tile's pairs are one slice.
        column, order = excluded[1].sort()
        self._excluded = (excluded[0][order], column)
        # One tile has all pairs; without documents there is no tile, and the last bound goes.
        bounds = [0, column.shape[0]][: len(starts) + 1]
        if len(starts) > 1:  # otherwise the host need not wait for a GPU to search
            edges = torch.tensor([*starts, document_KE.shape[0]])
            edges = edges.to(column.device, non_blocking=True)
            bounds = torch.searchsorted(column, edges).tolist()
        self._excluded_score = torch.full((), -torch.inf, device=column.device)
        # (first column, first and last excluded pair) of each tile
        self._tiles = list(zip(starts, bounds[:-1], bounds[1:], strict=True))
        self._peaks: list[Tensor] = []  # (R,) of each tile, if its scores are kept
        self._refined: list[list[RefinedScores]] = []
        self._peak_R = torch.empty(0)

    def sums(self, document_sums: LogMass | None = None) -> LogMass:
        """First pass: sum the exponentials of each query's negatives on this rank.

        Args:
            document_sums: the same of each document over the queries that have it as a negative;
                the block is added to them, in place.
        """
        total = LogMass.empty(self._query_RE.shape[0], self._query_RE.device)
        for number, (start, _, _) in enumerate(self._tiles):
            here = self._columns(start)
            score_RT = self._scores(number, slot=number if self._plan.keep_scores else 0)
            refined: list[RefinedScores] = []
            if document_sums is not None:
                # Before the queries' sums, which turn the tile into weights in place.
                part = document_sums.part(here)
                refined.append(self._add_to_documents_(part, score_RT, number))
            total, refined_rows = add_tile_(
                total, score_RT, left_RE=self._query_RE, right_TE=self._document_KE[here]
            )
            self._refined.append([*refined, refined_rows])
            if self._plan.keep_scores:
                # The slot now holds exp(score - peak) with the peak so far, not the final one.
                self._peaks.append(total.peak)
        self._peak_R = total.peak
        return total

    def _add_to_documents_(
        self, document_sums: LogMass, score_RT: Tensor, number: int
    ) -> RefinedScores:
        """Add a tile to the sums of its documents, in place, through a transposed copy."""
        # A symmetric plan keeps no scores: slot 1 is free for the copy.
        new, refined = add_tile_(
            document_sums,
            self._slot(number, 1).view(score_RT.T.shape).copy_(score_RT.T),  # (T, R)
            left_RE=self._document_KE[self._columns(self._tiles[number][0])],
            right_TE=self._query_RE,
        )
        document_sums.peak.copy_(new.peak)
        document_sums.mass.copy_(new.mass)
        return RefinedScores(row=refined.column, column=refined.row, score=refined.score)

    def accumulate_gradients_(
        self,
        log_mass_R: Tensor,
        log_mass_grad_R: Tensor,
        document_grad_KE: Tensor,
        documents: tuple[LogMass, Tensor] | None = None,
    ) -> Tensor:
        """Second pass: the gradient of `sum_i log_mass_grad_i * log sum_j exp(score_ij)`.

        j runs over this rank's negatives of query i, so that the ranks' gradients add up.

        Args:
            log_mass_R: (R,) float64, log of the sum over the negatives of *all* ranks.
            log_mass_grad_R: (R,) float64.
            document_grad_KE: this rank's part is added to it.
            documents: the documents' complete sums and (K,) the gradient by their logarithms, for
                the other direction of a symmetric loss, which is added.

        Returns:
            (R, E) gradient by the queries, this rank's documents only.
        """
        query_grad_RE = torch.zeros_like(self._query_RE)
        for number, (start, _, _) in enumerate(self._tiles):
            here = self._columns(start)
            document_TE, document_grad_TE = self._document_KE[here], document_grad_KE[here]
            weight_RT, peak_R = self._weights(number)
            # d(loss) / d(score_ij) = log_mass_grad_i * exp(score_ij - log_mass_i); the tile holds
            # exp(score_ij - peak_i).
            factor_R1 = (log_mass_grad_R * (peak_R.double() - log_mass_R).exp()).float()[:, None]
            if documents is None:
                query_grad_RE.addcmul_(weight_RT @ document_TE, factor_R1)
                document_grad_TE.addmm_(weight_RT.T, self._query_RE * factor_R1)
                continue
            sums, log_mass_grad_K = documents[0].part(here), documents[1][here]
            factor_T = (log_mass_grad_K * (sums.peak.double() - sums.log()).exp()).float()
            weight_RT.mul_(factor_R1)
            weight_RT.addcmul_(self._document_weights(number, sums.peak), factor_T)
            query_grad_RE.addmm_(weight_RT, document_TE)
            document_grad_TE.addmm_(weight_RT.T, self._query_RE)
        return query_grad_RE

    def _weights(self, number: int) -> tuple[Tensor, Tensor]:
        """Return exp(score - peak) of a tile, and the peak of its rows."""
        if self._plan.keep_scores:
            return self._slot(number, number), self._peaks[number]
        weight_RT = self._scores(number, slot=0).sub_(self._peak_R[:, None]).exp_()
        for refined in self._refined[number]:
            refined.write_weights_(weight_RT, self._peak_R[refined.row])
        return weight_RT, self._peak_R

    def _document_weights(self, number: int, peak_T: Tensor) -> Tensor:
        """Return exp(score - peak) with the peak of its columns, in the second slot."""
        weight_RT = self._scores(number, slot=1).sub_(peak_T).exp_()
        for refined in self._refined[number]:
            refined.write_weights_(weight_RT, peak_T[refined.column])
        return weight_RT

    def _columns(self, start: int) -> slice:
        return slice(start, start + self._plan.columns)

    def _slot(self, number: int, slot: int) -> Tensor:
        """Return the memory for a tile's scores: (R, T), contiguous also at the last tile."""
        num_rows, num_documents = self._query_RE.shape[0], self._document_KE.shape[0]
        width = min(self._plan.columns, num_documents - self._tiles[number][0])
        return self._scratch[slot, : num_rows * width].view(num_rows, width)

    def _scores(self, number: int, slot: int) -> Tensor:
        """Compute a tile's scores, -inf where a document is not a negative of the query."""
        start, first, last = self._tiles[number]
        score_RT = self._slot(number, slot)
        torch.mm(self._query_RE, self._document_KE[self._columns(start)].T, out=score_RT)
        if self._ceiling_R is not None:
            score_RT.masked_fill_(score_RT > self._ceiling_R[:, None], -torch.inf)
        row, column = (index[first:last] for index in self._excluded)
        # Not by a number of the host, whose copy to a GPU would wait for all earlier work.
        score_RT[row, column - start] = self._excluded_score
        if self._guide is not None:
            self.num_guided[number] = self._guide.mask_(score_RT, self._columns(start))
        return score_RT


# The peak where there is no score yet; -inf would make exp(score - peak) a nan in an empty row.
LOWEST = torch.finfo(torch.float32).min
# A product of float32 rows of length L is off by about 1e-7 L^2: more than the softmax may be off
# by where a score of 50 or more belongs to a probability that matters. Scores with
# probability * peak > _SIGNIFICANT are computed again in float64; they are few in any row.
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
        """Return the sum over nothing."""
        return cls(
            peak=torch.full((size,), LOWEST, device=device),
            mass=torch.zeros(size, dtype=torch.float64, device=device),
        )

    def log(self) -> Tensor:
        """Return the logarithm, float64; about the lowest float32 where nothing was summed."""
        # With -inf, `exp(peak - log)` would be inf, and a gradient of zero times it a nan.
        return (self.peak.double() + self.mass.log()).clamp_min(LOWEST)

    def over_ranks(self) -> LogMass:
        """Return the sum over all ranks' terms; a collective call."""
        parts = comm.all_gather_stack(torch.stack([self.peak.double(), self.mass]))  # (W, 2, R)
        peak = parts[:, 0].amax(0)
        mass = (parts[:, 1] * (parts[:, 0] - peak).exp()).sum(0)
        return LogMass(peak=peak.float(), mass=mass)

    def part(self, columns: slice) -> LogMass:
        """Return a view of some of the sums."""
        return LogMass(peak=self.peak[columns], mass=self.mass[columns])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RefinedScores:
    """Scores of a tile that float32 does not hold well enough."""

    row: Tensor
    column: Tensor
    score: Tensor  # float64

    def write_weights_(self, weight_RT: Tensor, peak: Tensor) -> None:
        """Overwrite exp(score - peak) of these pairs, given the peak of each."""
        weight_RT[self.row, self.column] = (self.score - peak.double()).exp().float()


def add_tile_(
    total: LogMass, score_RT: Tensor, *, left_RE: Tensor, right_TE: Tensor
) -> tuple[LogMass, RefinedScores]:
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
    peak_RG = score_RT.view(num_rows, width // group, group).amax(2)  # (R, T) -> (R, G, group)
    peak_R = torch.maximum(total.peak, peak_RG.amax(1))
    weight_RT = score_RT.sub_(peak_R[:, None]).exp_()
    # The old mass is relative to the old peak.
    faded_R = total.mass * (total.peak - peak_R).double().exp()
    mass_R = faded_R + weight_RT.sum(1).double()
    # A probability is weight / mass. Later tiles only add to the mass: with the mass so far, too
    # many scores are computed again, never too few.
    threshold_R = (_SIGNIFICANT / peak_R.abs().clamp_min(1) * mass_R).float()
    row, column = _above(weight_RT, threshold_R, (peak_RG - peak_R[:, None]).exp())
    refined = RefinedScores(row=row, column=column, score=dot_pairs(left_RE, row, right_TE, column))
    # The sum must agree with the weights in the tile, which the gradients read.
    before = weight_RT[row, column].double()
    refined.write_weights_(weight_RT, peak_R[row])
    mass_R.index_add_(0, row, weight_RT[row, column].double() - before)
    return LogMass(peak=peak_R, mass=mass_R), refined


def _above(weight_RT: Tensor, threshold_R: Tensor, top_RG: Tensor) -> tuple[Tensor, Tensor]:
    """Find the weights above their row's threshold; `top_RG` is the largest of each group."""
    if weight_RT.device.type == "cuda":
        # A GPU reads all weights faster than the host can wait for it twice.
        row, column = (weight_RT > threshold_R[:, None]).nonzero(as_tuple=True)
        return row, column
    group = weight_RT.shape[1] // top_RG.shape[1]
    row_H, group_H = (top_RG > threshold_R[:, None]).nonzero(as_tuple=True)
    found_HT = weight_RT.view(*top_RG.shape, group)[row_H, group_H]  # (R, G, group) -> (H, group)
    hit, within = (found_HT > threshold_R[row_H, None]).nonzero(as_tuple=True)
    return row_H[hit], group_H[hit] * group + within


def pair_scores(query_RE: Tensor, document_KE: Tensor, listed: ListedPairs) -> Tensor:
    """Return (P,) float64 scores of the listed pairs, on all ranks; a collective call."""
    here, row_P = listed.here, listed.row_P
    # Each pair is scored by the rank that holds its document, and is zero on the others.
    score_P = torch.zeros(row_P.shape[0], dtype=torch.float64, device=row_P.device)
    score_P[here] = dot_pairs(query_RE, row_P[here], document_KE, listed.local_P[here])
    return comm.all_reduce_(score_P)


def accumulate_pair_gradients_(
    grad_P: Tensor,
    listed: ListedPairs,
    *,
    query_RE: Tensor,
    document_KE: Tensor,
    query_grad_RE: Tensor,
    document_grad_KE: Tensor,
) -> None:
    """Add d(loss) / d(score) of the pairs on this rank to the gradients of both sides."""
    for part in _slices(listed.here.shape[0], query_RE.shape[1], query_RE.device):
        here = listed.here[part]
        row, local = listed.row_P[here], listed.local_P[here]
        grad_P1 = grad_P[here].float()[:, None]
        query_grad_RE.index_add_(0, row, grad_P1 * document_KE[local])
        document_grad_KE.index_add_(0, local, grad_P1 * query_RE[row])


def dot_pairs(left_RE: Tensor, row_P: Tensor, right_KE: Tensor, column_P: Tensor) -> Tensor:
    """Return (P,) float64 dot products of chosen rows of two float32 matrices."""
    dot_P = torch.empty(row_P.shape[0], dtype=torch.float64, device=row_P.device)
    for part in _slices(row_P.shape[0], left_RE.shape[1], left_RE.device):
        left_PE = left_RE[row_P[part]].double()
        dot_P[part] = left_PE.mul_(right_KE[column_P[part]]).sum(1)
    return dot_P


_BYTES_PER_NUMBER = 16  # two gathered rows and their float64 product


def _slices(num_pairs: int, width: int, device: torch.device) -> list[slice]:
    """Cut pairs into slices whose gathered rows stay small."""
    step = max(SLICE_BYTES[device.type] // (_BYTES_PER_NUMBER * width), 1)
    return [slice(start, start + step) for start in range(0, num_pairs, step)]


def segment_max(score_P: Tensor, row_P: Tensor, num_rows: int) -> Tensor:
    """Return (R,) the highest score of each row, -inf where it has none."""
    empty = torch.full((num_rows,), -torch.inf, dtype=score_P.dtype, device=score_P.device)
    return empty.scatter_reduce(0, row_P, score_P, "amax")


def segment_sum(value_P: Tensor, row_P: Tensor, num_rows: int) -> Tensor:
    """Return (R,) the sum of each row's values."""
    empty = torch.zeros(num_rows, dtype=value_P.dtype, device=value_P.device)
    return empty.index_add(0, row_P, value_P)


def segment_log_sum_exp(score_P: Tensor, row_P: Tensor, num_rows: int) -> Tensor:
    """Return (R,) log of the sum of exponentials of each row's scores, -inf where it has none."""
    peak_R = segment_max(score_P, row_P, num_rows)
    mass_R = segment_sum((score_P - peak_R[row_P]).exp(), row_P, num_rows)
    return peak_R + mass_R.log()
