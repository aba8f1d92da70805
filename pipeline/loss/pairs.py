"""Scores of single (query, document) pairs and what is computed from them, in float64.

P pairs of a block of R queries, `row_P` the query's place in the block (ascending).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of the rows gathered for pairs at one time.
_SLICE_BYTES = 16 * 2**20


def _slices(num_pairs: int, width: int) -> list[slice]:
    step = max(_SLICE_BYTES // (16 * width), 1)
    return [slice(start, start + step) for start in range(0, num_pairs, step)]


def pair_scores(query_RE: Tensor, row_P: Tensor, document_KE: Tensor, local_P: Tensor) -> Tensor:
    """The score of each pair whose document is on this rank, zero for the others.

    Args:
        query_RE: the block's queries.
        row_P: the pair's query.
        document_KE: this rank's documents.
        local_P: the pair's document on this rank, -1 where it is on another.
    """
    score_P = torch.zeros(row_P.shape[0], dtype=torch.float64, device=row_P.device)
    here = torch.nonzero(local_P >= 0)[:, 0]
    for part in _slices(here.shape[0], query_RE.shape[1]):
        pair = here[part]
        query_PE = query_RE[row_P[pair]].double()
        score_P[pair] = (query_PE * document_KE[local_P[pair]]).sum(1)
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


def segment_log_softmax(score_P: Tensor, row_P: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Log-softmax within each row (P,), and each row's log-sum-exp (R,)."""
    peak_R = segment_max(score_P, row_P, num_rows)
    mass_R = segment_sum((score_P - peak_R[row_P]).exp(), row_P, num_rows)
    log_mass_R = peak_R + mass_R.log()
    return score_P - log_mass_R[row_P], log_mass_R
