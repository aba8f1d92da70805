"""Hidden states of packed rows to one vector per row, in fp32.

Shapes: C rows, T tokens of all rows, D hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config import Pooling
from pipeline.model.packing import Rows


def pool(hidden_TD: Tensor, rows: Rows, how: Pooling) -> Tensor:
    """One vector per row.

    `weighted_mean` gives the i-th token of L the weight i / (1 + ... + L)
    (Muennighoff, "SGPT", arXiv 2202.08904). Tokens that are left out count as places but not in
    any sum, as in sentence-transformers.

    Args:
        hidden_TD: (T, D) of any floating type.
        rows: how T is cut into rows, and how many tokens at the front of each are left out.
        how: the pooling of the model's config.

    Returns:
        (C, D) float32.
    """
    lengths, skipped = rows.lengths, rows.skipped
    if how == "first_token":
        first = rows.boundaries[:-1].long()
        return hidden_TD[first if skipped is None else first + skipped].float()
    if how == "last_token":
        return hidden_TD[rows.boundaries[1:].long() - 1].float()
    hidden_TD = hidden_TD.float()
    places = rows.positions + 1
    if skipped is not None:
        kept = places > rows.per_token(skipped)
        hidden_TD = hidden_TD.masked_fill(~kept[:, None], 0)
    if how == "mean":
        total = lengths if skipped is None else lengths - skipped
        return _sum_rows(hidden_TD, lengths) / total[:, None]
    total = lengths * (lengths + 1) / 2
    if skipped is not None:
        total = total - skipped * (skipped + 1) / 2
    weights = places.to(hidden_TD.dtype)
    return _sum_rows(hidden_TD * weights[:, None], lengths) / total[:, None]


def _sum_rows(values_TD: Tensor, lengths: Tensor) -> Tensor:
    """(T, D) -> (C, D). Sums in order, unlike `index_add`: equal inputs give equal bits on GPUs."""
    return torch.segment_reduce(values_TD, "sum", lengths=lengths, unsafe=True)
