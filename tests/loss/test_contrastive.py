"""The tiled, distributed loss equals the naive one, whatever the recipe, tiling and world size."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from pipeline import comm
from pipeline.config import DistillationConfig, LossConfig
from pipeline.loss.contrastive import LossOutput, contrastive_loss
from tests.loss.reference import Case, make_case, naive_loss, relative_error
from tests.support import run_ranks

ROOMY = 2**20
THREE_ROWS = 4 * 101 * 3  # blocks of three queries against all 101 documents
TINY = 256  # tiles of 8 x 8, scored twice

RECIPES = {
    "in-batch": LossConfig(),
    "cold": LossConfig(temperature=0.01),
    "dot": LossConfig(similarity="dot", temperature=5),
    "own negatives": LossConfig(negatives="own"),
    "margin": LossConfig(false_negative_margin=-0.05),
    "own negatives, margin": LossConfig(negatives="own", false_negative_margin=-0.2),
    "symmetric": LossConfig(symmetric=True),
    "matryoshka": LossConfig(matryoshka_dims=(8, 16)),
    "learned temperature": LossConfig(learn_temperature=True, temperature=0.05),
    "distillation": LossConfig(distillation=DistillationConfig(weight=0.3, temperature=0.5)),
    "distillation only": LossConfig(distillation=DistillationConfig(weight=1.0)),
    "all together": LossConfig(
        temperature=0.03,
        learn_temperature=True,
        symmetric=True,
        matryoshka_dims=(8, 16),
        false_negative_margin=0.02,
        distillation=DistillationConfig(),
    ),
}


@dataclasses.dataclass
class Share:
    """What one rank held and got."""

    output: LossOutput
    queries: Tensor
    documents: Tensor


def loss_of_rank(case: Case, configs: list[LossConfig], score_bytes: int) -> list[Share]:
    """Each config's loss on this rank's uneven, unordered share of the batch."""
    g = torch.Generator().manual_seed(7)
    owner_N = torch.randint(comm.world_size(), (len(case.query),), generator=g)
    owner_M = torch.randint(comm.world_size(), (len(case.document),), generator=g)
    queries = torch.nonzero(owner_N == comm.rank())[:, 0].flip(0)
    documents = torch.nonzero(owner_M == comm.rank())[:, 0]
    return [
        Share(
            contrastive_loss(
                case.query[queries],
                case.document[documents],
                case.targets(queries, documents),
                config=config,
                temperature=config.temperature if config.learn_temperature else None,
                score_bytes=score_bytes,
            ),
            queries,
            documents,
        )
        for config in configs
    ]


def assert_equal_to_naive(
    case: Case, config: LossConfig, shares: list[Share], tolerance: float = 1e-6
) -> None:
    expected = naive_loss(case, config)
    query_grad = torch.full_like(expected.query, torch.nan)
    document_grad = torch.full_like(expected.document, torch.nan)
    for share in shares:
        output = share.output
        assert float(output.loss) == pytest.approx(expected.loss, rel=tolerance)
        query_grad[share.queries] = output.query_grad.double()
        document_grad[share.documents] = output.document_grad.double()
        if config.learn_temperature:
            assert output.temperature_grad == pytest.approx(
                expected.temperature, rel=10 * tolerance
            )
    assert relative_error(query_grad, expected.query) < tolerance
    assert relative_error(document_grad, expected.document) < tolerance


@pytest.mark.parametrize("score_bytes", [TINY, THREE_ROWS, ROOMY])
@pytest.mark.parametrize("recipe", RECIPES)
def test_tiled_loss_equals_naive_loss(recipe: str, score_bytes: int) -> None:
    case, config = make_case(teacher=True), RECIPES[recipe]
    (share,) = loss_of_rank(case, [config], score_bytes)
    assert_equal_to_naive(case, config, [share])


@pytest.mark.parametrize("world_size", [2, 3])
def test_distributed_loss_equals_naive_loss(world_size: int) -> None:
    case, configs = make_case(teacher=True), list(RECIPES.values())
    by_rank = run_ranks(world_size, loss_of_rank, case, configs, THREE_ROWS)
    for number, config in enumerate(configs):
        assert_equal_to_naive(case, config, [shares[number] for shares in by_rank])


def test_rank_without_documents_or_queries_takes_part() -> None:
    case, config = make_case(num_queries=9, num_documents=20), LossConfig()
    for shares in zip(*run_ranks(2, loss_with_idle_rank, case, config), strict=True):
        assert_equal_to_naive(case, config, list(shares))


def loss_with_idle_rank(case: Case, config: LossConfig) -> list[Share]:
    """Once all rows on rank 0; once queries on rank 0 and documents on rank 1."""
    everything = torch.arange(len(case.query)), torch.arange(len(case.document))
    nothing = torch.arange(0)
    results = []
    for query_owner, document_owner in ((0, 0), (0, 1)):
        queries = everything[0] if comm.rank() == query_owner else nothing
        documents = everything[1] if comm.rank() == document_owner else nothing
        output = contrastive_loss(
            case.query[queries],
            case.document[documents],
            case.targets(queries, documents),
            config=config,
        )
        results.append(Share(output, queries, documents))
    return results
