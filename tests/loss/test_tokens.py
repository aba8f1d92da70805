"""Cross-entropy in tiles equals torch's on whole scores, with all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.loss.tokens import cross_entropy_in_tiles

NUM, WIDTH, VOCABULARY = 11, 6, 17


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
def test_tiles_give_the_loss_and_gradients_of_whole_scores(rows: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(NUM, WIDTH, dtype=torch.float64, requires_grad=True)
    head = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(VOCABULARY, (NUM,)), torch.rand(NUM, dtype=torch.float64)
    weights[2] = 0
    scores = hidden @ head.T
    loss = (F.cross_entropy(scores, labels, reduction="none") * weights).sum()
    by_hidden, by_head = torch.autograd.grad(loss, (hidden, head))

    sums = cross_entropy_in_tiles(
        hidden,
        labels,
        weights,
        scores=lambda tile: tile @ head.T,
        backward=lambda tile_loss: tile_loss.backward(),
        rows=rows,
    )

    assert sums.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(sums.gradient, by_hidden)
    torch.testing.assert_close(head.grad, by_head)
    right = (scores.argmax(dim=1) == labels) & (weights > 0)
    assert sums.correct.item() == right.sum().item()


def test_a_prediction_without_weight_may_be_infinite() -> None:
    hidden = torch.tensor([[1.0], [2.0]])
    table = torch.tensor([[0.0, 1.0], [torch.inf, 0.0]])
    sums = cross_entropy_in_tiles(
        hidden,
        torch.tensor([1, 1]),
        torch.tensor([1.0, 0.0]),
        scores=lambda tile: tile + table,
        backward=lambda loss: loss.backward(),
        rows=2,
    )
    assert sums.loss.item() == pytest.approx(F.cross_entropy(table[:1] + 1, torch.tensor([1])))
    assert sums.correct.item() == 1
