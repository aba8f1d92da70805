"""The contrastive loss of a global batch and its exact gradients, by all ranks together.

Three queries, four documents, cosine similarity, temperature 0.5; every row has length 1:

    q0   1    0        d0  0.8  0.6                   d0      d1      d2      d3
    q1   0    1        d1  0    1       scores  q0  [1.60]   0.00    2.00    1.20
    q2   0.6  0.8      d2  1    0       q . d   q1   1.20   [2.00]   0.00    1.60
                       d3  0.6  0.8     / 0.5   q2   1.92     x      1.20   [2.00]

[s] is a positive and x a masked false negative; all other pairs are negatives. Each positive is
contrasted with its query's negatives alone, whose sum of exponentials has the logarithm z:

    l = -log( exp(s) / (exp(s) + exp(z)) ) = softplus(z - s)                  mean over queries

            s       z        l      dl/dz / 3               d(loss) / d(score)
    q0    1.60    2.460    1.213     0.234          -0.234   0.020   0.148   0.066
    q1    2.00    2.227    0.813     0.186           0.066  -0.186   0.020   0.099
    q2    2.00    2.317    0.864     0.193           0.130   0.000   0.063  -0.193
                   loss    0.963

A negative's gradient is its share exp(score - z) of dl/dz, a positive's is the opposite of dl/dz.
The gradient by the queries is this matrix @ document rows / 0.5, the gradient by the documents its
transpose @ query rows / 0.5; last, the part along each row is removed, because a cosine does not
depend on a row's length.

This is InfoNCE (van den Oord et al., arXiv 1807.03748, eq. 4) once per positive: a query's other
positives are in no denominator, nor are masked documents. The loss is the mean over queries of the
mean over their positives; a symmetric one, half of it plus half of the same with the roles
exchanged: each positive document against the queries that have it as a negative.

The score matrix never exists. Rank 0 holds q0 q1 d0 d1, rank 1 holds q2 d2 d3:

    for each block of queries         [q0 q1], then [q2]
        owner ----broadcast----> all ranks                                      query_RE
        rank 0: [q0 q1] x [d0 d1]     rank 1: [q0 q1] x [d2 d3]                 in tiles (scores.py)
        ranks combine peak and mass of each query -> z, loss, d(loss) / d(z)    the same on all
        each rank: gradient of its documents (stays), of the block --reduce--> owner

Documents never travel. A symmetric loss needs the sums of every document over all queries before
any gradient: the blocks wait until then, and with them the gathered queries.

Losses, and d(loss) / d(score) of listed pairs, are float64. Every rank knows all listed scores of a
block and computes the same numbers from them.

Shapes: B queries and K documents of this rank, R queries of a block, P listed pairs of a block (its
positives first), T documents of a tile, E embedding width. A function whose name ends in `_` writes
into an argument.
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
from pipeline.loss.scores import (
    DOCUMENT_LENGTH,
    BlockTiles,
    LogMass,
    ScoreRows,
    accumulate_pair_gradients_,
    pair_scores,
    segment_log_sum_exp,
    segment_max,
    segment_sum,
)
from pipeline.loss.targets import (
    ListedPairs,
    LossOutput,
    QueryBlock,
    RankTargets,
    Targets,
    broadcast_rows,
)
from pipeline.loss.teacher_terms import (
    BlockTeacher,
    DistillationTiles,
    Teacher,
    add_projection_term,
    distillation_loss,
)
from pipeline.loss.tiles import DEFAULT_SCORE_BYTES, TeacherTerms, plan_tiles


@torch.no_grad()
def contrastive_loss(
    query_BE: Tensor,
    document_KE: Tensor,
    targets: Targets,
    *,
    config: LossConfig,
    temperature: float | None = None,
    projection: Tensor | None = None,
    score_bytes: int | None = None,
) -> LossOutput:
    """Compute the loss over all queries and documents of all ranks; a collective call.

    Args:
        query_BE: embeddings of this rank's queries.
        document_KE: embeddings of this rank's documents.
        targets: global indices of these rows, and the positive pairs.
        config: similarity, temperature, and the rest of the recipe.
        temperature: the current value of a learned temperature; given exactly where
            `config.learn_temperature` is set.
        projection: (E, W) from the embeddings to a teacher's vectors; given exactly where
            `config.projection` is set.
        score_bytes: memory for scores; the default depends on the device.

    Raises:
        UserError: see `LossConfig.require_fit`.
    """
    assert (temperature is not None) == config.learn_temperature, "temperature: learned, or fixed"
    assert (projection is not None) == (config.projection is not None), "projection: a term, or not"
    width = query_BE.shape[1]
    config.require_fit(
        width=width,
        has_scores=targets.teacher_positives is not None,
        has_vectors=targets.teacher_query is not None,
    )
    rank_targets, teacher = RankTargets(targets), Teacher.build(targets, config)
    value = config.temperature if temperature is None else temperature
    with _float32_products(query_BE.device):
        results = [
            _LossAtWidth(
                query_BE[:, :dim],
                document_KE[:, :dim],
                rank_targets,
                config,
                teacher=teacher,
                temperature=value,
                score_bytes=score_bytes or DEFAULT_SCORE_BYTES[query_BE.device.type],
            ).run()
            for dim in (*config.matryoshka_dims, width)
        ]
    # Read together: on a GPU each reading waits for all earlier work.
    numbers = torch.stack([result.numbers for result in results]).tolist()
    outputs = [
        result.output(row, config, temperature=value, num_queries=targets.num_queries)
        for result, row in zip(results, numbers, strict=True)
    ]
    output = outputs[0] if len(outputs) == 1 else _mean_over_widths(outputs)
    if projection is not None:
        output = add_projection_term(
            output, query_BE, document_KE, targets, projection_EW=projection, config=config
        )
    return output


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _NegativeSums:
    """The negatives of a block's queries over all ranks, and what their gradient needs."""

    log_mass_R: Tensor  # float64, log of their sum of exponentials
    best_R: Tensor  # the highest score among them
    # Where they come from, one of the two:
    tiles: BlockTiles | None = None  # all documents: scores against this rank's
    share_P: Tensor | None = None  # own negatives alone: d(log_mass) / d(score) of listed pairs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _ScoredBlock:
    """A block between its loss and its gradients."""

    block: QueryBlock
    query_RE: Tensor
    listed: ListedPairs
    score_P: Tensor  # float64, of the listed pairs
    score_grad_P: Tensor  # float64, d(loss) / d(score) of the listed pairs
    weight_P: Tensor  # float64, share of each positive in the mean
    negatives: _NegativeSums
    log_mass_grad_R: Tensor  # float64, d(loss) / d(log_mass)
    distillation: DistillationTiles | None  # over all documents


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    """Loss and gradients at one width, before the host has read any number.

    Apart from `_LossAtWidth`, whose buffers are gone before the next width needs its own.
    """

    # (5,) float64: the loss, the number of queries whose best positive wins, the sum of these best
    # scores, the sum of d(loss) / d(query row) . query row, for the temperature, and the number of
    # pairs that the guide left out
    numbers: Tensor
    query_grad: Tensor
    document_grad: Tensor

    def output(
        self, numbers: list[float], config: LossConfig, *, temperature: float, num_queries: int
    ) -> LossOutput:
        """Return the result with its numbers on the host."""
        loss, num_correct, best_score, dot, num_guided = numbers
        metrics = {
            "accuracy@1": num_correct / num_queries,
            "positive_similarity": best_score * temperature / num_queries,
        }
        if config.guide is not None:
            metrics["guided_per_query"] = num_guided / num_queries
        return LossOutput(
            loss=torch.tensor(loss, dtype=torch.float32),
            # d(loss) / d(temperature): scores depend on it only through the rows, q / t.
            temperature_grad=-dot / temperature if config.learn_temperature else None,
            query_grad=self.query_grad,
            document_grad=self.document_grad,
            metrics=metrics,
        )


class _LossAtWidth:
    """The loss at one embedding width; every method that takes a block is a collective call."""

    def __init__(
        self,
        query_BE: Tensor,
        document_KE: Tensor,
        targets: RankTargets,
        config: LossConfig,
        *,
        teacher: Teacher | None,
        temperature: float,
        score_bytes: int,
    ) -> None:
        self._targets, self._config, self._temperature = targets, config, temperature
        self._teacher = teacher
        self._num_queries = targets.num_queries
        cosine = config.similarity == "cosine"
        length = DOCUMENT_LENGTH if cosine else 1.0
        # Temperature and the documents' length go into the queries' rows: a product is a score.
        scale = 1 / (temperature * length)
        if config.similarity == "scaled_dot":
            scale /= query_BE.shape[1]
        self._query = ScoreRows.build(query_BE, scale=scale, cosine=cosine)
        self._document = ScoreRows.build(document_KE, scale=length, cosine=cosine)
        # The gradient of the queries shares the memory of their score rows: a block's rows are read
        # for the last time where its gradient is written. A second (B, E) buffer would be the
        # largest of the loss after the documents'.
        self._query_grad_BE = self._query.rows_BE
        self._document_grad_KE = torch.zeros_like(self._document.rows_BE)
        # Of a symmetric loss: each document's negatives, which are queries.
        self._document_sums = (
            LogMass.empty(document_KE.shape[0], document_KE.device) if config.symmetric else None
        )
        self._plan = plan_tiles(
            num_queries=max(targets.queries_of_rank),
            num_rank_documents=targets.max_documents,
            score_bytes=score_bytes,
            symmetric=config.symmetric,
            teacher_slots=TeacherTerms.of(config, width=1).num_slots,
        )
        # One allocation for all blocks: fresh ones each time leave a CPU's heap in holes.
        self._scratch = self._document.rows_BE.new_empty(
            0 if config.negatives == "own" else self._plan.num_slots,
            self._plan.rows * self._plan.columns,
        )
        self._teacher_scratch = self._scratch.new_empty(
            self._plan.teacher_slots, self._plan.rows * self._plan.columns
        )
        distillation = config.distillation
        self._contrast_share = 1.0 if distillation is None else 1 - distillation.weight
        zero = torch.zeros((), dtype=torch.float64, device=query_BE.device)
        self._loss, self._num_correct, self._best_score = zero, zero, zero
        self._query_grad_dot_query = zero  # summed over this rank's queries, for the temperature
        self._num_guided = zero  # of this rank's documents, or, with own negatives, of all

    def run(self) -> _Result:
        """Pass all blocks of all ranks, in rank order."""
        waiting = []
        # The same blocks in the same order on every rank, also of ranks without queries: each one
        # holds a broadcast and reductions, which a rank that left one out would leave hanging.
        for block in self._targets.blocks(self._plan.rows):
            scored = self._score(block)
            if self._document_sums is None:
                self._accumulate_gradients(scored)
            else:
                waiting.append(scored)
        if self._document_sums is not None:
            self._add_document_direction(waiting, self._document_sums)
        # From the gradient by score rows to the gradient by embeddings, in the buffer of the sums.
        every_row = slice(0, self._document_grad_KE.shape[0])
        self._document.write_embedding_grad_(
            self._document_grad_KE, self._document_grad_KE, rows=every_row
        )
        # The config decides, not a rank's data: a collective call is made by all ranks or by none.
        dot = self._query_grad_dot_query
        if self._config.learn_temperature:
            dot = comm.all_reduce_(dot)
        num_guided = self._num_guided
        if self._config.guide is not None and self._config.negatives == "batch":
            # A copy: without documents here it is still the zero that other sums started from.
            num_guided = comm.all_reduce_(num_guided.clone())
        return _Result(
            numbers=torch.stack([self._loss, self._num_correct, self._best_score, dot, num_guided]),
            query_grad=self._query_grad_BE,
            document_grad=self._document_grad_KE,
        )

    def _score(self, block: QueryBlock) -> _ScoredBlock:
        """Add a block to the loss; keep what its gradients need."""
        config, num_rows = self._config, block.index_R.shape[0]
        query_RE = broadcast_rows(self._query.rows_BE, block)
        with_negatives = config.negatives == "own" or config.distils_own
        listed = self._targets.pairs(block, with_negatives=with_negatives)
        score_P = pair_scores(query_RE, self._document.rows_BE, listed)
        row_P = listed.positives(listed.row_P)
        best_R = segment_max(listed.positives(score_P), row_P, num_rows)
        teacher = None if self._teacher is None else self._teacher.of_block(block)
        if config.negatives == "own":
            negatives = self._own_negatives(listed, score_P, best_R, teacher)
        else:
            negatives = self._batch_negatives(block, query_RE, listed, best_R, teacher)
        # A new tensor, not `+=`: all counters started as one shared zero.
        self._num_correct = self._num_correct + (best_R > negatives.best_R).sum()
        self._best_score = self._best_score + best_R.sum()
        weight_P = self._contrast_share * _mean_weights(row_P, num_rows, self._num_queries)
        score_grad_P, log_mass_grad_R = self._add_terms(listed, score_P, weight_P, negatives)
        distillation = None
        if config.distils_batch and teacher is not None:
            distillation = self._add_distillation(query_RE, teacher)
        return _ScoredBlock(
            block=block,
            query_RE=query_RE,
            listed=listed,
            score_P=score_P,
            score_grad_P=score_grad_P,
            weight_P=weight_P,
            negatives=negatives,
            log_mass_grad_R=log_mass_grad_R,
            distillation=distillation,
        )

    def _add_distillation(self, query_RE: Tensor, teacher: BlockTeacher) -> DistillationTiles:
        """Add the block's divergence from the teacher over all documents to the loss."""
        assert self._config.distillation is not None
        tiles = DistillationTiles(
            query_RE,
            self._document.rows_BE,
            teacher,
            columns=self._plan.columns,
            scratch=self._teacher_scratch,
        )
        share = self._config.distillation.weight / self._num_queries
        self._loss = self._loss + share * tiles.loss().sum()
        return tiles

    def _ceiling(self, best_R: Tensor) -> Tensor | None:
        """Return the score above which a negative counts as a false one, given the positives'."""
        margin = self._config.false_negative_margin
        return None if margin is None else best_R + margin / self._temperature

    def _own_negatives(
        self, listed: ListedPairs, score_P: Tensor, best_R: Tensor, teacher: BlockTeacher | None
    ) -> _NegativeSums:
        """Sum over the listed hard negatives alone; every rank knows all their scores."""
        counted_P, num_rows = listed.contrasted_P, best_R.shape[0]
        if teacher is not None and self._config.guide is not None:
            counted_P = teacher.guided_pairs(listed, self._config.guide)
            self._num_guided = self._num_guided + (listed.contrasted_P.sum() - counted_P.sum())
        ceiling_R = self._ceiling(best_R)
        if ceiling_R is not None:
            counted_P = counted_P & (score_P <= ceiling_R[listed.row_P])
        # Once: on a GPU `nonzero` waits for the count, as selecting by a mask would each time.
        counted = torch.nonzero(counted_P)[:, 0]
        row_P, counted_score_P = listed.row_P[counted], score_P[counted]
        log_mass_R = segment_log_sum_exp(counted_score_P, row_P, num_rows)
        share_P = torch.zeros_like(score_P)
        share_P[counted] = (counted_score_P - log_mass_R[row_P]).exp()
        return _NegativeSums(
            log_mass_R=log_mass_R,
            best_R=segment_max(counted_score_P, row_P, num_rows),
            share_P=share_P,
        )

    def _batch_negatives(
        self,
        block: QueryBlock,
        query_RE: Tensor,
        listed: ListedPairs,
        best_R: Tensor,
        teacher: BlockTeacher | None,
    ) -> _NegativeSums:
        """Sum over every document of the global batch that is not positive, masked or too near."""
        guide, ceiling_R = None, self._ceiling(best_R)
        if teacher is not None and self._config.guide is not None:
            guide = teacher.guide(listed, self._config.guide, self._teacher_scratch[0])
        tiles = BlockTiles(
            query_RE,
            self._document.rows_BE,
            excluded=self._targets.excluded(block),
            ceiling_R=None if ceiling_R is None else ceiling_R.float(),
            plan=self._plan,
            scratch=self._scratch,
            guide=guide,
        )
        total = tiles.sums(self._document_sums).over_ranks()
        for count in tiles.num_guided.values():
            self._num_guided = self._num_guided + count
        return _NegativeSums(log_mass_R=total.log(), best_R=total.peak, tiles=tiles)

    def _add_terms(
        self, listed: ListedPairs, score_P: Tensor, weight_P: Tensor, negatives: _NegativeSums
    ) -> tuple[Tensor, Tensor]:
        """Add the block to the loss; return its derivatives by the listed scores and log_mass."""
        num_rows = negatives.log_mass_R.shape[0]
        row_P = listed.positives(listed.row_P)
        direction = 0.5 if self._config.symmetric else 1.0
        loss, slope_P = info_nce(
            listed.positives(score_P), negatives.log_mass_R[row_P], direction * weight_P
        )
        self._loss = self._loss + loss
        # A query's positives share its sum of negatives, whose slopes add up.
        log_mass_grad_R = segment_sum(slope_P, row_P, num_rows)
        score_grad_P = torch.zeros_like(score_P)
        listed.positives(score_grad_P).sub_(slope_P)  # through the view, into score_grad_P
        if negatives.share_P is not None:
            score_grad_P += log_mass_grad_R[listed.row_P] * negatives.share_P
        distillation = self._config.distillation
        if distillation is not None and self._config.distils_own and listed.teacher_P is not None:
            loss, distill_P = distillation_loss(
                score_P,
                listed.teacher_P / distillation.temperature,
                listed.row_P,
                num_rows=num_rows,
                num_queries=self._num_queries,
            )
            self._loss = self._loss + distillation.weight * loss
            score_grad_P += distillation.weight * distill_P
        return score_grad_P, log_mass_grad_R

    def _add_document_direction(self, waiting: list[_ScoredBlock], sums: LogMass) -> None:
        """Add the other half of a symmetric loss, each positive document against its negatives.

        All gradients follow. Unlike a query's, a document's terms are known to its rank alone.
        """
        log_mass_K = sums.log()
        # Complete before the first gradient: a document's negatives are in all blocks.
        log_mass_grad_K = torch.zeros_like(log_mass_K)
        loss = torch.zeros_like(self._loss)
        for scored in waiting:
            # Positives are listed first, so their numbers come first too.
            here = scored.listed.here[: scored.listed.num_positives_here]
            local = scored.listed.local_P[here]
            term, slope = info_nce(
                scored.score_P[here],
                log_mass_K[local],
                scored.weight_P[here] / 2,
            )
            loss += term
            log_mass_grad_K.index_add_(0, local, slope)
            # A pair's gradient is used by the document's rank alone, so the other ranks need not
            # learn of this.
            scored.score_grad_P[here] -= slope
        self._loss = self._loss + comm.all_reduce_(loss)
        for scored in waiting:
            self._accumulate_gradients(scored, (sums, log_mass_grad_K))

    def _accumulate_gradients(
        self, scored: _ScoredBlock, documents: tuple[LogMass, Tensor] | None = None
    ) -> None:
        """Add a block to the gradient of this rank's documents; send its own to its owner."""
        if scored.negatives.tiles is None:
            query_grad_RE = torch.zeros_like(scored.query_RE)
        else:
            query_grad_RE = scored.negatives.tiles.accumulate_gradients_(
                scored.negatives.log_mass_R,
                scored.log_mass_grad_R,
                self._document_grad_KE,
                documents,
            )
        accumulate_pair_gradients_(
            scored.score_grad_P,
            scored.listed,
            query_RE=scored.query_RE,
            document_KE=self._document.rows_BE,
            query_grad_RE=query_grad_RE,
            document_grad_KE=self._document_grad_KE,
        )
        if scored.distillation is not None:
            assert self._config.distillation is not None
            scored.distillation.accumulate_gradients_(
                self._config.distillation.weight / self._num_queries,
                query_grad_RE,
                self._document_grad_KE,
            )
        # Each rank added the part of its own documents; only the owner gets the sum.
        comm.reduce_(query_grad_RE, scored.block.owner)
        if comm.rank() == scored.block.owner:
            dot = (query_grad_RE * scored.query_RE).sum(dtype=torch.float64)
            self._query_grad_dot_query = self._query_grad_dot_query + dot
            # From here on these rows of the shared buffer are a gradient.
            rows = scored.block.rows
            self._query.write_embedding_grad_(self._query_grad_BE[rows], query_grad_RE, rows=rows)


def _mean_weights(row_P: Tensor, num_rows: int, num_queries: int) -> Tensor:
    """Return (P,) the share of each positive in the mean over queries of the mean over theirs."""
    # Not `bincount`, which waits for a GPU to find the largest row.
    count_R = segment_sum(torch.ones_like(row_P, dtype=torch.float64), row_P, num_rows)
    return 1 / (count_R[row_P] * num_queries)


def info_nce(score_P: Tensor, log_mass_P: Tensor, weight_P: Tensor) -> tuple[Tensor, Tensor]:
    """Contrast each positive with the negatives of its query (or, symmetric, of its document).

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


@contextlib.contextmanager
def _float32_products(device: torch.device) -> Iterator[None]:
    """Turn off autocast and TF32: bfloat16 scores put 1e-2 of error into the gradients."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _mean_over_widths(outputs: list[LossOutput]) -> LossOutput:
    """Average over Matryoshka widths (Kusupati et al., arXiv 2205.13147, eq. 1, equal weights).

    The last output is the full width's; its metrics are kept, and its gradients take the sum.
    """
    full, share = outputs[-1], 1 / len(outputs)
    # In place: gradients of the full width are the largest buffers, and nothing else reads them.
    for side in ("query_grad", "document_grad"):
        total = getattr(full, side)
        for output in outputs[:-1]:
            narrow = getattr(output, side)
            total[:, : narrow.shape[1]] += narrow
        total *= share
    slopes = [o.temperature_grad for o in outputs if o.temperature_grad is not None]
    return dataclasses.replace(
        full,
        loss=torch.stack([output.loss for output in outputs]).mean(),
        temperature_grad=sum(slopes) * share if slopes else None,
    )
