"""The contrastive loss of a global batch and its exact gradients.

All float64. Each function returns its share of the global mean and d(share) / d(score) of the
pairs, so that every rank, holding all pair scores of a block, computes the same numbers.

    for each block of queries:  owner ----broadcast----> all ranks
        every rank: scores against its own documents, tile by tile      (sweep, pairs)
        ranks combine peak and mass of each query -> loss, weights      (log_mass, terms)
        every rank: gradient of its documents (stays), of the block --reduce--> owner

Documents never travel. The symmetric loss needs the sums of every document over all queries before
any gradient: there the blocks wait, and with them the gathered queries.

Each (query i, positive p) is contrasted with the query's negatives alone,

    l_ip = -log( exp(s_ip) / (exp(s_ip) + sum_j exp(s_ij)) ),   j over the negatives of i,

which is InfoNCE (van den Oord et al., arXiv 1807.03748, eq. 4) once per positive; the other
positives stand in no denominator, as masked false negatives do not. The loss is the mean over
queries of the mean over their positives; symmetric, half of it plus half of the same with the roles
exchanged: document p against the queries that have it as a negative.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pipeline import comm
from pipeline.config import LossConfig
from pipeline.errors import UserError
from pipeline.loss import scores
from pipeline.loss.scores import (
    DEFAULT_SCORE_BYTES,
    DOCUMENT_LENGTH,
    LogMass,
    ScoreRows,
    Sweep,
    plan_tiles,
    segment_log_sum_exp,
    segment_sum,
)
from pipeline.loss.targets import Block, BlockPairs, Layout, LossOutput, RaggedIndex, Targets

__all__ = ["LossOutput", "RaggedIndex", "Targets"]


def mean_weights(row_P: Tensor, num_rows: int, num_queries: int) -> Tensor:
    """(P,) share of each positive in the mean over queries of the mean over their positives."""
    # Not `bincount`, which waits for a GPU to find the largest row.
    count_R = segment_sum(torch.ones_like(row_P, dtype=torch.float64), row_P, num_rows)
    return 1 / (count_R[row_P] * num_queries)


def info_nce(score_P: Tensor, log_mass_P: Tensor, weight_P: Tensor) -> tuple[Tensor, Tensor]:
    """Each positive against the negatives of its query (or, symmetric, of its document).

    -log(exp(s) / (exp(s) + exp(z))) = softplus(z - s), whose derivative by z is sigmoid(z - s) and
    by s the opposite: no gradient is ever a difference of nearly equal numbers.

    Args:
        score_P: s, scores of the positives.
        log_mass_P: z, log of the sum of exponentials over the negatives.
        weight_P: share of each positive in the mean.

    Returns:
        The loss, and d(loss) / d(log_mass_P), which is also -d(loss) / d(score_P).
    """
    gap_P = log_mass_P - score_P
    return (weight_P * softplus(gap_P)).sum(), weight_P * gap_P.sigmoid()


def distillation_loss(
    score_P: Tensor, teacher_P: Tensor, row_P: Tensor, *, num_rows: int, num_queries: int
) -> tuple[Tensor, Tensor]:
    """KL(teacher || model) over each query's list, averaged over queries.

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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Negatives:
    """The negatives of a block's queries, all ranks together."""

    log_mass_R: Tensor  # float64, log of their sum of exponentials
    best_R: Tensor  # the highest score among them
    share_P: Tensor | None = None  # d(log_mass) / d(score) of the listed pairs, own negatives only
    sweep: Sweep | None = None  # holds the scores against this rank's documents otherwise


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Scored:
    """A block between its loss and its gradients."""

    block: Block
    query_RE: Tensor
    listed: BlockPairs
    score_P: Tensor  # float64, of the listed pairs
    grad_P: Tensor  # float64, d(loss) / d(score) of the listed pairs
    weight_P: Tensor  # float64, share of each positive in the mean
    negatives: _Negatives
    pull_R: Tensor  # float64, d(loss) / d(log_mass)


class OneWidth:
    """The loss over all blocks; every method that meets a block is a collective call."""

    def __init__(
        self,
        query_BE: Tensor,
        document_KE: Tensor,
        layout: Layout,
        config: LossConfig,
        *,
        temperature: float,
        score_bytes: int,
    ) -> None:
        self._layout, self._config, self._temperature = layout, config, temperature
        self._num_queries = layout.targets.num_queries
        cosine = config.similarity == "cosine"
        length = DOCUMENT_LENGTH if cosine else 1.0
        scale = 1 / (temperature * length)
        if config.similarity == "scaled_dot":
            scale /= query_BE.shape[1]
        self._query = ScoreRows.build(query_BE, scale=scale, cosine=cosine)
        self._document = ScoreRows.build(document_KE, scale=length, cosine=cosine)
        self._document_grad_KE = torch.zeros_like(self._document.rows_BE)
        self._columns = (
            LogMass.empty(document_KE.shape[0], document_KE.device) if config.symmetric else None
        )
        self._plan = plan_tiles(
            num_queries=max(layout.queries_of_rank),
            num_rank_documents=layout.max_documents,
            score_bytes=score_bytes,
            symmetric=config.symmetric,
        )
        # One allocation for all blocks: fresh ones each time leave a CPU's heap in holes.
        self._scratch = self._document.rows_BE.new_empty(
            0 if config.negatives == "own" else self._plan.num_slots,
            self._plan.rows * self._plan.columns,
        )
        distillation = config.distillation
        self._contrast_share = 1.0 if distillation is None else 1 - distillation.weight
        zero = torch.zeros((), dtype=torch.float64, device=query_BE.device)
        self._loss, self._num_correct, self._best_score, self._pull = zero, zero, zero, zero

    def run(self) -> LossOutput:
        """All blocks of all ranks, in rank order."""
        waiting = []
        for block in self._layout.blocks(self._plan.rows):
            scored = self._score(block)
            if self._columns is None:
                self._accumulate_gradients(scored)
            else:
                waiting.append(scored)
        if self._columns is not None:
            self._add_document_direction(waiting, self._columns)
        num_documents = self._document_grad_KE.shape[0]
        self._document.become_gradient_(self._document_grad_KE, slice(0, num_documents))
        num_correct, best_score = torch.stack([self._num_correct, self._best_score]).tolist()
        return LossOutput(
            loss=self._loss.float(),
            temperature_grad=self._temperature_grad() if self._config.learn_temperature else None,
            query_grad=self._query.rows_BE,
            document_grad=self._document.rows_BE,
            metrics={
                "accuracy@1": num_correct / self._num_queries,
                "positive_similarity": best_score * self._temperature / self._num_queries,
            },
        )

    def _score(self, block: Block) -> _Scored:
        """Add a block's share of the loss; keep what its gradients need."""
        config, num_rows = self._config, block.index_R.shape[0]
        query_RE = self._broadcast(block)
        own = config.negatives == "own"
        listed = self._layout.pairs(block, with_negatives=own or config.distillation is not None)
        score_P = comm.all_reduce_(
            scores.pair_scores(query_RE, listed.row_P, self._document.rows_BE, listed.local_P)
        )
        row_P = listed.positives(listed.row_P)
        best_R = scores.segment_max(listed.positives(score_P), row_P, num_rows)
        ceiling_R = None
        if config.false_negative_margin is not None:
            ceiling_R = best_R + config.false_negative_margin / self._temperature
        if own:
            negatives = _own_negatives(listed, score_P, ceiling_R, num_rows)
        else:
            negatives = self._batch_negatives(block, query_RE, ceiling_R)
        self._num_correct = self._num_correct + (best_R > negatives.best_R).sum()
        self._best_score = self._best_score + best_R.sum()
        weight_P = self._contrast_share * mean_weights(row_P, num_rows, self._num_queries)
        grad_P, pull_R = self._add_terms(listed, score_P, weight_P, negatives)
        return _Scored(
            block=block,
            query_RE=query_RE,
            listed=listed,
            score_P=score_P,
            grad_P=grad_P,
            weight_P=weight_P,
            negatives=negatives,
            pull_R=pull_R,
        )

    def _broadcast(self, block: Block) -> Tensor:
        shape = (block.index_R.shape[0], self._query.rows_BE.shape[1])
        if comm.rank() == block.owner:
            query_RE = self._query.rows_BE[block.rows]
        else:
            query_RE = self._query.rows_BE.new_empty(shape)
        return comm.broadcast_(query_RE, block.owner)

    def _batch_negatives(
        self, block: Block, query_RE: Tensor, ceiling_R: Tensor | None
    ) -> _Negatives:
        """Every document of the global batch that is neither positive nor masked nor too near."""
        sweep = Sweep(
            query_RE,
            self._document.rows_BE,
            excluded=self._layout.excluded(block),
            ceiling_R=None if ceiling_R is None else ceiling_R.float(),
            plan=self._plan,
            scratch=self._scratch,
        )
        total = sweep.statistics(self._columns).over_ranks()
        return _Negatives(log_mass_R=total.log(), best_R=total.peak, sweep=sweep)

    def _add_terms(
        self, listed: BlockPairs, score_P: Tensor, weight_P: Tensor, negatives: _Negatives
    ) -> tuple[Tensor, Tensor]:
        """Add the block to the loss; its derivatives by the listed scores and by log_mass."""
        num_rows = negatives.log_mass_R.shape[0]
        row_P = listed.positives(listed.row_P)
        direction = 0.5 if self._config.symmetric else 1.0
        loss, pull_P = info_nce(
            listed.positives(score_P), negatives.log_mass_R[row_P], direction * weight_P
        )
        self._loss = self._loss + loss
        pull_R = scores.segment_sum(pull_P, row_P, num_rows)
        grad_P = torch.zeros_like(score_P)
        listed.positives(grad_P).sub_(pull_P)
        if negatives.share_P is not None:
            grad_P += pull_R[listed.row_P] * negatives.share_P
        distillation = self._config.distillation
        if distillation is not None and listed.teacher_P is not None:
            loss, distill_P = distillation_loss(
                score_P,
                listed.teacher_P / distillation.temperature,
                listed.row_P,
                num_rows=num_rows,
                num_queries=self._num_queries,
            )
            self._loss = self._loss + distillation.weight * loss
            grad_P += distillation.weight * distill_P
        return grad_P, pull_R

    def _add_document_direction(self, waiting: list[_Scored], columns: LogMass) -> None:
        """The symmetric half: each positive document against queries; then all gradients."""
        log_mass_K = columns.log()
        weight_K = torch.zeros_like(log_mass_K)
        loss = torch.zeros_like(self._loss)
        for scored in waiting:
            local_P = scored.listed.positives(scored.listed.local_P)
            here = local_P >= 0
            local = local_P[here]
            part, pull = info_nce(
                scored.listed.positives(scored.score_P)[here],
                log_mass_K[local],
                scored.weight_P[here] / 2,
            )
            loss += part
            weight_K.index_add_(0, local, pull)
            # A pair's gradient is used by the document's rank alone, so no other needs this.
            grad_P = scored.listed.positives(scored.grad_P)
            grad_P[here] = grad_P[here] - pull
        self._loss = self._loss + comm.all_reduce_(loss)
        for scored in waiting:
            self._accumulate_gradients(scored, (columns, weight_K))

    def _accumulate_gradients(
        self, scored: _Scored, columns: tuple[LogMass, Tensor] | None = None
    ) -> None:
        if scored.negatives.sweep is None:
            query_grad_RE = torch.zeros_like(scored.query_RE)
        else:
            query_grad_RE = scored.negatives.sweep.accumulate_gradients(
                scored.negatives.log_mass_R, scored.pull_R, self._document_grad_KE, columns
            )
        scores.accumulate_pair_gradients(
            scored.grad_P,
            scored.listed.row_P,
            scored.listed.local_P,
            query_RE=scored.query_RE,
            document_KE=self._document.rows_BE,
            query_grad_RE=query_grad_RE,
            document_grad_KE=self._document_grad_KE,
        )
        comm.reduce_(query_grad_RE, scored.block.owner)
        if comm.rank() == scored.block.owner:
            self._pull = self._pull + (query_grad_RE * scored.query_RE).sum(dtype=torch.float64)
            self._query.become_gradient_(query_grad_RE, scored.block.rows)

    def _temperature_grad(self) -> float:
        """d(loss) / d(temperature): scores depend on it only through the query rows, r / t."""
        return float(-comm.all_reduce_(self._pull) / self._temperature)


def _own_negatives(
    listed: BlockPairs, score_P: Tensor, ceiling_R: Tensor | None, num_rows: int
) -> _Negatives:
    """The listed hard negatives alone; every rank knows all their scores."""
    counted_P = listed.contrasted_P
    if ceiling_R is not None:
        counted_P = counted_P & (score_P <= ceiling_R[listed.row_P])
    row_P, counted_score_P = listed.row_P[counted_P], score_P[counted_P]
    log_mass_R = scores.segment_log_sum_exp(counted_score_P, row_P, num_rows)
    share_P = torch.zeros_like(score_P)
    share_P[counted_P] = (counted_score_P - log_mass_R[row_P]).exp()
    return _Negatives(
        log_mass_R=log_mass_R,
        best_R=scores.segment_max(counted_score_P, row_P, num_rows),
        share_P=share_P,
    )


@torch.no_grad()
def contrastive_loss(
    query_BE: Tensor,
    document_KE: Tensor,
    targets: Targets,
    *,
    config: LossConfig,
    temperature: float | None = None,
    score_bytes: int | None = None,
) -> LossOutput:
    """The loss over all queries and documents of all ranks; a collective call.

    Args:
        query_BE: embeddings of this rank's queries.
        document_KE: embeddings of this rank's documents.
        targets: where these rows belong and which pairs are positive.
        config: similarity, temperature, and the rest of the recipe.
        temperature: the present value of a learned temperature; given exactly where
            `config.learn_temperature` is set.
        score_bytes: memory for scores; by default what suits the device.

    Raises:
        UserError: a Matryoshka width is not below that of the embeddings, or distillation is
            configured and there are no teacher scores.
    """
    assert (temperature is not None) == config.learn_temperature, "temperature: learned, or fixed"
    width = query_BE.shape[1]
    check_loss(config, width=width, has_scores=targets.teacher_positives is not None)
    layout = Layout(targets)
    outputs = []
    with _float32_products(query_BE.device):
        for dim in (*config.matryoshka_dims, width):
            one_width = OneWidth(
                query_BE[:, :dim],
                document_KE[:, :dim],
                layout,
                config,
                temperature=config.temperature if temperature is None else temperature,
                score_bytes=score_bytes or DEFAULT_SCORE_BYTES[query_BE.device.type],
            )
            outputs.append(one_width.run())
    return outputs[0] if len(outputs) == 1 else _mean(outputs)


def check_loss(config: LossConfig, *, width: int, has_scores: bool) -> None:
    """Refuse a loss that the model or the data cannot have; asked before a run starts.

    Args:
        config: the loss section.
        width: of the embeddings.
        has_scores: whether the data hold a teacher's scores.

    Raises:
        UserError: see `contrastive_loss`.
    """
    for dim in config.matryoshka_dims:
        if dim >= width:
            raise UserError(
                f"loss.matryoshka_dims: {dim}",
                allowed=f"widths below that of the embeddings ({width}), which is always trained",
            )
    if config.distillation is not None and not has_scores:
        raise UserError(
            "loss.distillation is set but the data set holds no teacher scores",
            fix="prepare the data with scores, or remove loss.distillation",
        )


@contextlib.contextmanager
def _float32_products(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32: bfloat16 scores put 1e-2 of error into the gradients."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _mean(outputs: list[LossOutput]) -> LossOutput:
    """The mean over Matryoshka widths (Kusupati et al., arXiv 2205.13147, eq. 1, equal weights).

    The last output is the full width's; the metrics are its own.
    """
    full, share = outputs[-1], 1 / len(outputs)
    for side in ("query_grad", "document_grad"):
        total = getattr(full, side)
        for output in outputs[:-1]:
            part = getattr(output, side)
            total[:, : part.shape[1]] += part
        total *= share
    slopes = [o.temperature_grad for o in outputs if o.temperature_grad is not None]
    return dataclasses.replace(
        full,
        loss=torch.stack([output.loss for output in outputs]).mean(),
        temperature_grad=sum(slopes) * share if slopes else None,
    )
