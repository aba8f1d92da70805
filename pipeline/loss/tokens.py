"""Cross-entropy over a large vocabulary, a tile of predictions at a time, exact.

Shapes: P predictions, D width, V vocabulary. The (P, V) scores never exist at once: each tile's
graph is gone after its backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Memory for the scores of a tile per kind of device: a CPU's cache likes few, a GPU many.
TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
# Scores and their gradient in the model's type, and in float32 the scores, their logarithm, and
# the gradient.
_BYTES_PER_SCORE = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenSums:
    """Sums over the predictions of a chunk, and the gradient by the hidden states that made them.

    Attributes:
        loss: float64 sum of weight * cross-entropy.
        correct: how many predictions of positive weight gave the highest score to their label.
        gradient: (P, D) gradient of `loss` by the hidden states.
    """

    loss: Tensor
    correct: Tensor
    gradient: Tensor


def tile_rows(vocabulary: int, device: str) -> int:
    """Predictions whose scores fit into the memory of a tile."""
    return max(1, TILE_BYTES[device] // (_BYTES_PER_SCORE * vocabulary))


def cross_entropy_in_tiles(
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    scores: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], None],
    rows: int,
) -> TokenSums:
    """Score, compare and go back through the head, tile by tile.

    Args:
        hidden: (P, D) hidden states; their own graph is left alone.
        labels: (P,) tokens to predict.
        weights: (P,) factor on each prediction's cross-entropy.
        scores: (R, D) hidden states to (R, V) float32 scores.
        backward: takes a scalar and accumulates its gradients, also those of the head.
        rows: predictions of a tile.
    """
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    # One tensor for all tiles: what outlives a tile must not lie between the tiles' large ones.
    gradient = torch.empty_like(hidden)
    tiles = [torch.split(x, rows) for x in (hidden.detach(), labels, weights, gradient)]
    for part, label, weight, out in zip(*tiles, strict=True):
        leaf = part.requires_grad_()
        with torch.enable_grad():
            score_RV = scores(leaf)
            losses = F.cross_entropy(score_RV, label, reduction="none")
            # A prediction that does not count is left out of the sum even where it is infinite.
            weighted = torch.where(weight > 0, losses * weight, 0.0)
            backward(weighted.sum())
        loss += weighted.detach().double().sum()
        correct += ((score_RV.argmax(dim=1) == label) & (weight > 0)).sum()
        assert leaf.grad is not None
        out.copy_(leaf.grad)
        leaf.grad = None
    return TokenSums(loss=loss, correct=correct, gradient=gradient)
