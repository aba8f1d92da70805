"""Cross-entropy in tiles equals torch's on whole scores, with all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.training.token_step import cross_entropy_in_tiles
from tests import forks
from tests.support import PATIENCE

NUM, WIDTH, VOCABULARY = 11, 6, 17


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
def test_tiles_give_the_loss_and_gradients_of_whole_scores(rows: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(NUM, WIDTH, dtype=torch.float64, requires_grad=True)
    head = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(VOCABULARY, (NUM,)), torch.rand(NUM, dtype=torch.float64)
    weights[2] = 0
    scores = hidden @ head.T
    labels[2] = scores[2].argmax()  # right, but it does not count
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


def test_memory_does_not_grow_with_the_predictions() -> None:
    code = """
import resource, sys, torch
from pipeline.training.token_step import cross_entropy_in_tiles, tile_rows
torch.set_num_threads(1)
head = torch.nn.Linear(16, 50_000, bias=False)
def peak(num):
    cross_entropy_in_tiles(
        torch.randn(num, 16), torch.zeros(num, dtype=torch.long), torch.ones(num),
        scores=head, backward=lambda loss: loss.backward(), rows=tile_rows(50_000, "cpu"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(-peak(200) + peak(1500))
"""
    done = forks.run(["-c", code], folder=forks.ROOT, timeout=PATIENCE)

    assert done.returncode == 0, done.stderr
    # All scores of the 1,300 more would be 254 MiB, in kibibytes.
    assert int(done.stdout) < 100 * 1024
