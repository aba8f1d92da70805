"""What one block of queries adds to the loss, from the scores of its listed pairs; no collectives.

All float64. Each function returns its share of the global mean and d(share) / d(score) of the
pairs, so that every rank, holding all pair scores of a block, computes the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pipeline.loss.pairs import segment_log_sum_exp, segment_sum


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


def distillation(
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
