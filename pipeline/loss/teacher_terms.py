"""Terms of the loss that read a teacher's scores or stored vectors.

    t_RT = teacher_query_RW @ teacher_document_TW.T        cosines, over the teacher's temperature
    guide          a document with t above that of the query's best positive, less a margin,
                   is not a negative (GISTEmbed, Solatorio, arXiv 2402.16829)
    distillation   KL(teacher || model) of each query, over its listed documents (their t are
                   stored) or, tile by tile, over all documents of the global batch:
                   sum_j p_j (t_j - s_j) - log Z_t + log Z_s,    p_j = exp(t_j) / Z_t
                   d / d(s_j) = exp(s_j) / Z_s - p_j
    projection     z_W = x_E @ projection_EW against the teacher's vector v of the same text, where
                   x is an embedding, of length 1 under cosine similarity
                   cosine     1 - u . v      d / dz = (u (u . v) - v) / |z|,    u = z / |z|
                   squared    |z - v|^2      d / dz = 2 (z - v)
                   the mean over all queries and documents of the global batch (Romero et al.,
                   "FitNets", arXiv 1412.6550, equation 3, for vectors of texts)

A rank has the vectors of its own texts. A block's travel with its queries; documents never do, and
neither (N, M) matrix ever exists. A row of the projection needs no other row, so ranks only add up
their sums and the gradient of the matrix; its products are float64, few next to all pairs' scores.

Shapes: B queries and K documents of this rank, R queries of a block or rows of a slice, T documents
of a tile, P listed pairs, E embedding width, W width of the teacher's vectors.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pipeline import comm
from pipeline.config import GuideConfig, LossConfig
from pipeline.loss.scores import (
    DOCUMENT_LENGTH,
    SMALLEST_NORM,
    Guide,
    LogMass,
    RefinedScores,
    ScoreRows,
    add_tile_,
    dot_pairs,
    pair_scores,
    segment_log_sum_exp,
    segment_max,
)
from pipeline.loss.targets import ListedPairs, LossOutput, QueryBlock, Targets, broadcast_rows
from pipeline.loss.tiles import SLICE_ROWS

# Cosines of equal vectors differ by rounding, which depends on tiles and ranks: a document as close
# as the positive must be a negative everywhere.
_TIE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A teacher's vectors of this rank's texts, as rows whose dot products are its scores."""

    query_BW: Tensor
    document_KW: Tensor
    temperature: float

    @classmethod
    def build(cls, targets: Targets, config: LossConfig) -> Teacher | None:
        """Prepare the vectors where a term of the loss needs them."""
        if config.guide is None and not config.distils_batch:
            return None
        assert targets.teacher_query is not None and targets.teacher_document is not None
        distillation = config.distillation
        # The guide compares with a margin, which follows whatever the scores are divided by.
        temperature = 1.0
        if distillation is not None and distillation.documents == "batch":
            temperature = distillation.temperature
        query = ScoreRows.build(
            targets.teacher_query, scale=1 / (temperature * DOCUMENT_LENGTH), cosine=True
        )
        document = ScoreRows.build(targets.teacher_document, scale=DOCUMENT_LENGTH, cosine=True)
        return cls(query_BW=query.rows_BE, document_KW=document.rows_BE, temperature=temperature)

    def of_block(self, block: QueryBlock) -> BlockTeacher:
        """Send a block's vectors to all ranks; a collective call."""
        return BlockTeacher(
            query_RW=broadcast_rows(self.query_BW, block),
            document_KW=self.document_KW,
            temperature=self.temperature,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockTeacher:
    """A teacher's vectors of a block's queries, on every rank."""

    query_RW: Tensor
    document_KW: Tensor
    temperature: float

    def guide(self, listed: ListedPairs, config: GuideConfig, scratch: Tensor) -> Guide:
        """Return what masks the block's tiles; a collective call.

        Args:
            listed: positives of the block's queries.
            config: the margin.
            scratch: of at least a tile's size.
        """
        score_P = pair_scores(self.query_RW, self.document_KW, listed)
        return Guide(
            query_RW=self.query_RW,
            document_KW=self.document_KW,
            ceiling_R=self._ceiling(listed, score_P, config).float(),
            scratch=scratch,
        )

    def guided_pairs(self, listed: ListedPairs, config: GuideConfig) -> Tensor:
        """Return (P,) whether a pair counts as a negative, also by the guide; a collective call."""
        score_P = pair_scores(self.query_RW, self.document_KW, listed)
        ceiling_R = self._ceiling(listed, score_P, config)
        return listed.contrasted_P & (score_P <= ceiling_R[listed.row_P])

    def _ceiling(self, listed: ListedPairs, score_P: Tensor, config: GuideConfig) -> Tensor:
        """Return (R,) float64, the highest score of a negative, given the scores of the pairs."""
        best_R = segment_max(
            listed.positives(score_P), listed.positives(listed.row_P), len(self.query_RW)
        )
        if config.margin_strategy == "absolute":
            below_R = torch.full_like(best_R, config.margin / self.temperature)
        else:
            below_R = config.margin * best_R.abs()
        return best_R - below_R + _TIE / self.temperature


def distillation_loss(
    score_P: Tensor, teacher_P: Tensor, row_P: Tensor, *, num_rows: int, num_queries: int
) -> tuple[Tensor, Tensor]:
    """Compute KL(teacher || model) over each query's listed documents, averaged over queries.

    Args:
        score_P: the model's scores, over its temperature.
        teacher_P: the teacher's, over its own.
        row_P: query of each pair.
        num_rows: queries of the block.
        num_queries: queries of the global batch.

    Returns:
        The loss, and d(loss) / d(score_P).
    """
    log_model_P = score_P - segment_log_sum_exp(score_P, row_P, num_rows)[row_P]
    log_teacher_P = teacher_P - segment_log_sum_exp(teacher_P, row_P, num_rows)[row_P]
    share_P = log_teacher_P.exp()
    loss = (share_P * (log_teacher_P - log_model_P)).sum() / num_queries
    return loss, (log_model_P.exp() - share_P) / num_queries


class DistillationTiles:
    """KL(teacher || model) of one block's queries over all documents of the global batch."""

    def __init__(
        self,
        query_RE: Tensor,
        document_KE: Tensor,
        teacher: BlockTeacher,
        *,
        columns: int,
        scratch: Tensor,
    ) -> None:
        """Prepare the block.

        Args:
            query_RE: rows whose dot product with `document_KE` is the model's score.
            document_KE: this rank's documents.
            teacher: the same for the teacher's scores.
            columns: of a tile.
            scratch: (3, at least R * columns) float32 for the scores of a tile.
        """
        # Left and right rows of the model's scores, and of the teacher's.
        self._model = query_RE, document_KE
        self._teacher = teacher.query_RW, teacher.document_KW
        self._scratch = scratch
        starts = range(0, document_KE.shape[0], columns)
        self._columns = [slice(k, min(k + columns, document_KE.shape[0])) for k in starts]
        self._refined: list[tuple[RefinedScores, RefinedScores]] = []
        # Of this rank's documents, then log of the sums over all ranks.
        self._peaks: tuple[Tensor, Tensor] | None = None
        self._logs: tuple[Tensor, Tensor] | None = None

    def loss(self) -> Tensor:
        """First pass: return (R,) float64 divergences; a collective call."""
        query_RE = self._model[0]
        model = LogMass.empty(query_RE.shape[0], query_RE.device)
        teacher = LogMass.empty(query_RE.shape[0], query_RE.device)
        # Sum of exp(t - peak) * (t - s), with the peak of the teacher's scores so far.
        gap_R = torch.zeros_like(teacher.mass)
        for here in self._columns:
            model_RT = self._scores(self._model, here, slot=0)
            teacher_RT = self._scores(self._teacher, here, slot=1)
            # Before `_add_`, which turns the scores of a tile into weights in place.
            gap_RT = torch.sub(teacher_RT, model_RT, out=self._slot(here, 2))
            before = teacher.peak
            teacher, sharp = self._add_(teacher, teacher_RT, self._teacher, here)
            # Where float32 scores are not good enough for the weight, nor are they for the gap.
            model_score = dot_pairs(query_RE, sharp.row, self._model[1][here], sharp.column)
            gap_RT[sharp.row, sharp.column] = (sharp.score - model_score).float()
            # The sum so far is relative to the peak so far: a new peak shrinks it.
            faded_R = gap_R * (before - teacher.peak).double().exp()
            gap_R = faded_R + gap_RT.mul_(teacher_RT).sum(1).double()
            model, blurred = self._add_(model, model_RT, self._model, here)
            self._refined.append((blurred, sharp))
        self._peaks = model.peak, teacher.peak
        return self._over_ranks(model, teacher, gap_R)

    def _over_ranks(self, model: LogMass, teacher: LogMass, gap_R: Tensor) -> Tensor:
        """Combine the ranks' sums into divergences."""
        # With its peak, because ranks' sums are relative to different ones.
        faded = torch.stack([teacher.peak.double(), gap_R])
        parts = comm.all_gather_stack(faded)  # (ranks, 2, R)
        model, teacher = model.over_ranks(), teacher.over_ranks()
        self._logs = model.log(), teacher.log()
        gap_R = (parts[:, 1] * (parts[:, 0] - teacher.peak.double()).exp()).sum(0) / teacher.mass
        return gap_R - self._logs[1] + self._logs[0]

    def accumulate_gradients_(
        self, weight: float, query_grad_RE: Tensor, document_grad_KE: Tensor
    ) -> None:
        """Second pass: add the gradient of `weight` times the sum of the divergences.

        Args:
            weight: of each query.
            query_grad_RE: takes the gradient by the queries, of this rank's documents only.
            document_grad_KE: takes the gradient by this rank's documents.
        """
        assert self._peaks is not None and self._logs is not None, "loss() comes first"
        # exp(score - log Z) = exp(score - peak) * exp(peak - log Z), the second in float64.
        factors = [
            (weight * (peak_R.double() - log_R).exp()).float()[:, None]
            for peak_R, log_R in zip(self._peaks, self._logs, strict=True)
        ]
        for number, here in enumerate(self._columns):
            shares = []
            for slot, rows in enumerate((self._model, self._teacher)):
                peak_R = self._peaks[slot]
                share_RT = self._scores(rows, here, slot=slot).sub_(peak_R[:, None]).exp_()
                refined = self._refined[number][slot]
                refined.write_weights_(share_RT, peak_R[refined.row])
                shares.append(share_RT.mul_(factors[slot]))
            # Model minus teacher, each already times the weight; in the memory of the first.
            grad_RT = shares[0].sub_(shares[1])
            query_grad_RE.addmm_(grad_RT, self._model[1][here])
            document_grad_KE[here].addmm_(grad_RT.T, self._model[0])

    def _scores(self, rows: tuple[Tensor, Tensor], here: slice, *, slot: int) -> Tensor:
        out: Tensor = torch.mm(rows[0], rows[1][here].T, out=self._slot(here, slot))
        return out

    def _add_(
        self, total: LogMass, score_RT: Tensor, rows: tuple[Tensor, Tensor], here: slice
    ) -> tuple[LogMass, RefinedScores]:
        return add_tile_(total, score_RT, left_RE=rows[0], right_TE=rows[1][here])

    def _slot(self, here: slice, slot: int) -> Tensor:
        """Return the memory of a tile: (R, T), contiguous also at the last tile."""
        num_rows, width = self._model[0].shape[0], here.stop - here.start
        return self._scratch[slot, : num_rows * width].view(num_rows, width)


@torch.no_grad()
def add_projection_term(
    output: LossOutput,
    query_BE: Tensor,
    document_KE: Tensor,
    targets: Targets,
    *,
    projection_EW: Tensor,
    config: LossConfig,
) -> LossOutput:
    """Add the term to a loss, whose gradients are changed in place; a collective call.

    Args:
        output: the loss without the term.
        query_BE: embeddings of this rank's queries.
        document_KE: embeddings of this rank's documents.
        targets: with the teacher's vectors of these texts.
        projection_EW: the matrix, the same on every rank.
        config: distance, weight and similarity.
    """
    assert config.projection is not None
    assert targets.teacher_query is not None and targets.teacher_document is not None
    matrix_EW = projection_EW.double()
    matrix_grad_EW = torch.zeros_like(matrix_EW)
    total = matrix_EW.new_zeros(1)
    share = config.projection.weight / (targets.num_queries + targets.num_documents)
    for rows, teacher, grad in (
        (query_BE, targets.teacher_query, output.query_grad),
        (document_KE, targets.teacher_document, output.document_grad),
    ):
        for start in range(0, rows.shape[0], SLICE_ROWS):
            part = slice(start, start + SLICE_ROWS)
            x_RE, norm_R1 = _unit(rows[part].double())
            if config.similarity != "cosine":
                x_RE, norm_R1 = rows[part].double(), torch.ones_like(norm_R1)
            v_RW, _ = _unit(teacher[part].double())
            distance_R, slope_RW = _distance(x_RE @ matrix_EW, v_RW, config.projection.distance)
            total += share * distance_R.sum()
            matrix_grad_EW.addmm_(x_RE.T, slope_RW, alpha=share)
            grad_RE = share * (slope_RW @ matrix_EW.T)
            if config.similarity == "cosine":
                # A unit row does not change along itself.
                grad_RE -= x_RE * (x_RE * grad_RE).sum(1, keepdim=True)
            grad[part] += (grad_RE / norm_R1).to(grad.dtype)
    term = float(comm.all_reduce_(total))
    return dataclasses.replace(
        output,
        loss=output.loss + term,
        projection_grad=comm.all_reduce_(matrix_grad_EW).to(projection_EW.dtype),
        metrics={**output.metrics, "teacher_distance": term / config.projection.weight},
    )


def _unit(x_RE: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of length 1, and (R, 1) their lengths before."""
    norm_R1 = x_RE.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
    return x_RE / norm_R1, norm_R1


def _distance(z_RW: Tensor, v_RW: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return (R,) distances of projected rows to the teacher's, and their derivatives by `z_RW`."""
    if kind == "squared":
        gap_RW = z_RW - v_RW
        return (gap_RW**2).sum(1), 2 * gap_RW
    u_RW, norm_R1 = _unit(z_RW)
    cosine_R1 = (u_RW * v_RW).sum(1, keepdim=True)
    return 1 - cosine_R1[:, 0], (u_RW * cosine_R1 - v_RW) / norm_R1
