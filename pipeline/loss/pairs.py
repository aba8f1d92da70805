"""Scores of single (query, document) pairs and what is computed from them, in float64.

P pairs of a block of R queries, `row_P` the query's place in the block (ascending); K documents of
this rank, `local_P` the document's place among them, -1 where it is on another rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.loss.tiles import SLICE_BYTES

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
