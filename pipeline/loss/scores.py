"""Tiled scores of a global batch: sums of exponentials and gradients in bounded memory.

P pairs of a block of R queries, `row_P` the query's place in the block (ascending); K documents of
this rank, `local_P` the document's place among them, -1 where it is on another rank.

R rows, T columns of a tile. Nothing is ever subtracted from such a sum to leave a document out:
a document that must not count has score -inf.

    scores of a tile (R, T) -> running peak and mass of each query        (statistics)
    [ranks combine peak and mass; the caller weighs each query]
    the same tile again, kept or recomputed -> gradient of both sides     (accumulate_gradients)

R queries of the block, K documents of this rank, T of them in a tile, E embedding width.
No more than a block's scores exist at any time.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from pipeline import comm

# As torch.nn.functional.normalize: a zero row stays zero instead of becoming nan.
_SMALLEST_NORM = 1e-12
# Length of a document row under cosine. Any length that is no power of two would do: rounding must
# act afresh on every number, or a document that is already of unit length within float32 keeps its
# last-bit error of length, which moves all its scores together (1e-5 of a probability at 0.01).
DOCUMENT_LENGTH = math.sqrt(2)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRows:
    """Rows `x * scale` or `x / |x| * scale`; norm and product in float64, rounded once."""

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
                factor_B[here] /= wide.norm(dim=1).clamp_min(_SMALLEST_NORM)
            rows_BE[here] = wide * factor_B[here, None]
        return cls(rows_BE=rows_BE, factor_B=factor_B, scale=scale, cosine=cosine)

    def become_gradient_(self, grad_RE: Tensor, rows: slice) -> None:
        """Overwrite rows that are done with: d(loss) / d(rows) in, d(loss) / d(embeddings) kept.

        With r = scale * x / |x|: g_x = factor * (g_r - r (r . g_r) / scale^2).
        """
        for start in range(0, grad_RE.shape[0], SLICE_ROWS):
            grad = grad_RE[start : start + SLICE_ROWS].double()
            here = slice(rows.start + start, rows.start + start + grad.shape[0])
            if self.cosine:
                wide = self.rows_BE[here].double()
                grad -= wide * ((wide * grad).sum(1, keepdim=True) / self.scale**2)
            self.rows_BE[here] = grad * self.factor_B[here, None]


_FLOAT_BYTES = 4
# Fewer rows than this make the matrix products so thin that scoring twice is cheaper.
_MIN_KEPT_ROWS = 64
# More rows than this gain nothing, and a block of them travels between ranks.
_MAX_ROWS = 4096
# A tile of this many columns keeps element-wise work in a CPU's cache and a GPU's cores busy.
_TILE_COLUMNS = 2048
# Memory for scores per kind of device: a CPU's cache likes few, a GPU needs many to stay busy.
DEFAULT_SCORE_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}
# float64 work is done on so many rows, or so many bytes of gathered rows, at one time.
SLICE_ROWS = 512
SLICE_BYTES = 4 * 2**20
_SLICE_COPIES = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TilePlan:
    """Queries come in blocks of `rows`; a block meets this rank's documents `columns` at a time."""

    rows: int
    columns: int
    num_slots: int  # tiles whose scores exist at one time
    keep_scores: bool  # keep a block's scores for the gradient instead of computing them again

    @property
    def score_bytes(self) -> int:
        """Memory of the scores."""
        return self.num_slots * self.rows * self.columns * _FLOAT_BYTES


def plan_tiles(
    *,
    num_queries: int,
    num_rank_documents: int,
    score_bytes: int,
    symmetric: bool = False,
) -> TilePlan:
    """Choose blocks and tiles whose scores fit in the budget.

    Args:
        num_queries: most queries of one rank; a block never spans two ranks.
        num_rank_documents: most documents of one rank.
        score_bytes: memory for scores.
        symmetric: the document's sums need every block first, so no block's scores can be kept.
    """
    budget = score_bytes // _FLOAT_BYTES
    num_queries, num_documents = max(num_queries, 1), max(num_rank_documents, 1)
    columns = min(_TILE_COLUMNS, num_documents)
    num_tiles = -(-num_documents // columns)
    rows = min(budget // (num_tiles * columns), num_queries, _MAX_ROWS)
    if not symmetric and rows >= min(_MIN_KEPT_ROWS, num_queries):
        return TilePlan(rows=rows, columns=columns, num_slots=num_tiles, keep_scores=True)
    num_slots = 2 if symmetric else 1
    columns = min(columns, max(math.isqrt(budget // num_slots), 1))
    rows = max(min(budget // (num_slots * columns), num_queries, _MAX_ROWS), 1)
    return TilePlan(rows=rows, columns=columns, num_slots=num_slots, keep_scores=False)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossCost:
    """What the loss of one global batch costs the rank that holds most, beside the embeddings."""

    tiles: TilePlan
    num_blocks: int  # of queries, over all ranks; as many rounds of collectives
    num_tiles: int  # scored by one rank
    score_bytes: int
    row_bytes: int  # its rows made ready for scoring; those of its queries become their gradients
    gradient_bytes: int  # of its documents
    block_bytes: int  # queries of a block and their gradient; all queries where symmetric
    index_bytes: int  # where each query and document is
    work_bytes: int  # float64 slices
    received_bytes: int  # per step: queries, and partial gradients of its own
    matmul_flops: int

    @property
    def peak_bytes(self) -> int:
        """All memory at once."""
        return (
            self.score_bytes
            + self.row_bytes
            + self.gradient_bytes
            + self.block_bytes
            + self.index_bytes
            + self.work_bytes
        )


def loss_cost(
    *,
    num_queries: int,
    num_documents: int,
    width: int,
    world_size: int,
    score_bytes: int,
    symmetric: bool = False,
) -> LossCost:
    """Memory, traffic and work of the loss with in-batch negatives, rows spread evenly over ranks.

    Args:
        num_queries: of the global batch.
        num_documents: of the global batch, hard negatives included.
        width: of the embeddings.
        world_size: ranks that share both.
        score_bytes: memory for scores on each rank.
        symmetric: both directions.
    """
    queries, documents = -(-num_queries // world_size), -(-num_documents // world_size)
    tiles = plan_tiles(
        num_queries=queries,
        num_rank_documents=documents,
        score_bytes=score_bytes,
        symmetric=symmetric,
    )
    num_blocks = world_size * -(-queries // tiles.rows)
    row = width * _FLOAT_BYTES
    held = world_size * queries if symmetric else tiles.rows
    products = 3 if tiles.keep_scores else 5 if symmetric else 4
    foreign = (world_size - 1) * queries if world_size > 1 else 0
    return LossCost(
        tiles=tiles,
        num_blocks=num_blocks,
        num_tiles=num_blocks * -(-documents // tiles.columns),
        score_bytes=tiles.score_bytes,
        row_bytes=(queries + documents) * row,
        gradient_bytes=documents * row,
        block_bytes=(held + tiles.rows) * row,
        index_bytes=8 * (num_queries + num_documents + queries + documents),
        work_bytes=max(_SLICE_COPIES * 2 * SLICE_ROWS * row, SLICE_BYTES),
        received_bytes=2 * foreign * row,
        matmul_flops=products * 2 * num_queries * documents * width,
    )


_BYTES_PER_NUMBER = 16  # two gathered rows and their float64 product


def dot_pairs(left_RE: Tensor, row_P: Tensor, right_KE: Tensor, column_P: Tensor) -> Tensor:
    """(P,) float64 dot products of chosen rows of two float32 matrices."""
    dot_P = torch.empty(row_P.shape[0], dtype=torch.float64, device=row_P.device)
    for part in _slices(row_P.shape[0], left_RE.shape[1]):
        left_PE = left_RE[row_P[part]].double()
        dot_P[part] = left_PE.mul_(right_KE[column_P[part]]).sum(1)
    return dot_P


def pair_scores(query_RE: Tensor, row_P: Tensor, document_KE: Tensor, local_P: Tensor) -> Tensor:
    """(P,) the score of each pair whose document is on this rank, zero for the others."""
    score_P = torch.zeros(row_P.shape[0], dtype=torch.float64, device=row_P.device)
    here = torch.nonzero(local_P >= 0)[:, 0]
    score_P[here] = dot_pairs(query_RE, row_P[here], document_KE, local_P[here])
    return score_P


def accumulate_pair_gradients(
    grad_P: Tensor,
    row_P: Tensor,
    local_P: Tensor,
    *,
    query_RE: Tensor,
    document_KE: Tensor,
    query_grad_RE: Tensor,
    document_grad_KE: Tensor,
) -> None:
    """Add d(loss) / d(score) of the pairs on this rank to the gradients of both sides."""
    here = torch.nonzero(local_P >= 0)[:, 0]
    for part in _slices(here.shape[0], query_RE.shape[1]):
        row, local = row_P[here[part]], local_P[here[part]]
        grad_P1 = grad_P[here[part]].float()[:, None]
        query_grad_RE.index_add_(0, row, grad_P1 * document_KE[local])
        document_grad_KE.index_add_(0, local, grad_P1 * query_RE[row])


def segment_max(score_P: Tensor, row_P: Tensor, num_rows: int) -> Tensor:
    """(R,) highest score of each row, -inf where it has none."""
    empty = torch.full((num_rows,), -torch.inf, dtype=score_P.dtype, device=score_P.device)
    return empty.scatter_reduce(0, row_P, score_P, "amax")


def segment_sum(value_P: Tensor, row_P: Tensor, num_rows: int) -> Tensor:
    """(R,) sum of each row's values."""
    empty = torch.zeros(num_rows, dtype=value_P.dtype, device=value_P.device)
    return empty.index_add(0, row_P, value_P)


def segment_log_sum_exp(score_P: Tensor, row_P: Tensor, num_rows: int) -> Tensor:
    """(R,) log of the sum of exponentials of each row's scores, -inf where it has none."""
    peak_R = segment_max(score_P, row_P, num_rows)
    mass_R = segment_sum((score_P - peak_R[row_P]).exp(), row_P, num_rows)
    return peak_R + mass_R.log()


def _slices(num_pairs: int, width: int) -> list[slice]:
    step = max(SLICE_BYTES // (_BYTES_PER_NUMBER * width), 1)
    return [slice(start, start + step) for start in range(0, num_pairs, step)]


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
