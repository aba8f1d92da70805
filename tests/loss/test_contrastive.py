"""The tiled, distributed loss equals the naive one."""

from __future__ import annotations

import pytest
import torch

from pipeline import comm
from pipeline.config import LossConfig
from pipeline.loss import contrastive
from pipeline.loss.contrastive import LossOutput, contrastive_loss
from tests.loss.reference import Case, make_case, naive_loss, relative_error
from tests.support import run_ranks


def own_rows(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """An uneven, shuffled share of the batch: rank r of W takes what a seeded draw gives it."""
    g = torch.Generator().manual_seed(7)
    owner_N = torch.randint(comm.world_size(), (len(case.query),), generator=g)
    owner_M = torch.randint(comm.world_size(), (len(case.document),), generator=g)
    queries = torch.nonzero(owner_N == comm.rank())[:, 0].flip(0)
    return queries, torch.nonzero(owner_M == comm.rank())[:, 0]


def loss_of_rank(case: Case, config: LossConfig, budget: int) -> tuple[LossOutput, torch.Tensor]:
    contrastive._BUDGET_BYTES["cpu"] = budget
    queries, documents = own_rows(case)
    output = contrastive_loss(
        case.query[queries],
        case.document[documents],
        case.targets(queries, documents),
        config=config,
    )
    return output, queries, documents


def assert_equal_to_naive(case: Case, config: LossConfig, results: list, tolerance: float) -> None:
    expected = naive_loss(case, config)
    query_grad = torch.zeros_like(expected["query"])
    document_grad = torch.zeros_like(expected["document"])
    for output, queries, documents in results:
        assert float(output.loss) == pytest.approx(float(expected["loss"]), rel=tolerance)
        query_grad[queries] = output.query_grad.double()
        document_grad[documents] = output.document_grad.double()
    assert relative_error(query_grad, expected["query"]) < tolerance
    assert relative_error(document_grad, expected["document"]) < tolerance


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.5])
@pytest.mark.parametrize("budget", [64, 4 * 101 * 3, 2**20])
def test_tiled_loss_equals_naive_loss(budget: int, temperature: float) -> None:
    case, config = make_case(), LossConfig(temperature=temperature)
    assert_equal_to_naive(case, config, [loss_of_rank(case, config, budget)], 5e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_distributed_loss_equals_naive_loss(world_size: int) -> None:
    case, config = make_case(), LossConfig(temperature=0.02)
    results = run_ranks(world_size, loss_of_rank, case, config, 4 * 1024)
    assert_equal_to_naive(case, config, results, 5e-6)
