"""Each form of the loss on the pretended device equals the CPU's, and waits as often as written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.loss.contrastive import contrastive_loss
from pipeline.loss.targets import LossOutput, RaggedIndex, Targets
from tests.fake_cuda.fake_cuda import CudaTensor, FakeCuda
from tests.loss.reference import make_case
from tests.loss.test_contrastive import RECIPES

# Waits of a loss of one block and one tile: the sizes of all ranks, the sizes of all blocks, the
# significant scores of a tile, and the results. For in-batch and for own negatives.
MAX_SYNCS = 4


def on_device(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return CudaTensor(value.clone())
    if isinstance(value, RaggedIndex):
        return RaggedIndex(offsets=on_device(value.offsets), values=on_device(value.values))
    if isinstance(value, Targets):
        return Targets(**{name: on_device(getattr(value, name)) for name in value.__slots__})
    return value


@pytest.mark.parametrize("score_bytes", [2**20, 4 * 40 * 64], ids=["one tile", "tiles"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_equals_that_of_the_cpu(recipe: str, score_bytes: int) -> None:
    config = RECIPES[recipe]
    case = make_case(teacher=config.distillation is not None or config.needs_vectors)
    targets = case.targets(
        torch.randperm(len(case.query), generator=torch.Generator().manual_seed(1)),
        torch.randperm(len(case.document), generator=torch.Generator().manual_seed(2)),
    )
    rows = case.query[targets.query_index], case.document[targets.document_index]
    given: Any = {
        "config": config,
        "temperature": config.temperature if config.learn_temperature else None,
        "score_bytes": score_bytes,
    }
    matrix = None if config.projection is None else case.projection
    wanted = contrastive_loss(*(x.clone() for x in rows), targets, projection=matrix, **given)
    with FakeCuda() as record:
        ours: LossOutput = contrastive_loss(
            *on_device_all(*rows), on_device(targets), projection=on_device(matrix), **given
        )

    assert torch.equal(ours.loss, wanted.loss)
    grads = [
        (ours.query_grad, wanted.query_grad),
        (ours.document_grad, wanted.document_grad),
    ]
    if wanted.projection_grad is not None:
        grads.append((ours.projection_grad, wanted.projection_grad))
    for mine, theirs in grads:
        tensor: Any = mine
        torch.testing.assert_close(tensor.inner, theirs, rtol=1e-6, atol=1e-9)
    assert ours.metrics == pytest.approx(wanted.metrics)
    if score_bytes == 2**20:
        widths = 1 + len(config.matryoshka_dims)
        # Every width searches its tile; a symmetric one searches it twice, and distillation over
        # the batch the model's scores and the teacher's. A projection reads its term.
        most = MAX_SYNCS + (widths - 1) + widths * (config.symmetric + 2 * config.distils_batch)
        most += config.projection is not None
        assert record.num_syncs <= most, dict(record.syncs)


def on_device_all(*tensors: torch.Tensor) -> list[Any]:
    return [on_device(x) for x in tensors]
