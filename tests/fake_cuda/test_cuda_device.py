"""The pretended device refuses and counts what CUDA would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.fake_cuda.fake_cuda import CUDA, CudaTensor, FakeCuda, WrongDeviceError


def test_numbers_are_real_and_gradients_flow() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    with FakeCuda():
        ours = CudaTensor(weight.clone()).requires_grad_()
        (ours.square().sum() * 2).backward()

    assert torch.equal(ours.grad.inner, 4 * weight)


def test_a_tensor_of_the_host_is_refused_unless_it_is_a_scalar() -> None:
    with FakeCuda():
        ours = torch.ones(3, device="cuda")
        assert (ours * torch.tensor(2.0)).inner.tolist() == [2, 2, 2]
        with pytest.raises(WrongDeviceError):
            ours + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            ours.numpy()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.repeat_interleave(x.long()),
        lambda x: bool((x > 0).any()),
        lambda x: x + torch.ones(3).to("cuda"),
        lambda x: x + torch.tensor([1.0], device="cuda"),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.__setitem__(x.long(), 2.0),
        lambda x: torch.isin(x, x),
    ],
    ids=range(15),
)
def test_waiting_for_the_device_is_recorded(wait: Callable[[Any], Any]) -> None:
    with FakeCuda() as record:
        x = torch.ones(3, device="cuda")
        assert record.num_syncs == 0
        wait(x)

    assert record.num_syncs >= 1


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x @ x,
        lambda x: x[:, 0],
        lambda x: x.repeat_interleave(x[0].long(), dim=0, output_size=3),
        lambda x: x.index_select(0, torch.tensor([0, 1]).to("cuda", non_blocking=True)),
        lambda x: torch.zeros(3, device=x.device) + x,
        lambda x: torch.tensor([1, 2]).to("cuda", non_blocking=True),
        lambda x: x.to(torch.bfloat16),
        lambda x: x.copy_(torch.ones(3), non_blocking=True),
        lambda x: x.__setitem__(x > 0, 2.0) or x,
        lambda x: x.__setitem__(x.long(), torch.zeros((), device=x.device)) or x,
    ],
    ids=range(10),
)
def test_ordinary_work_does_not_wait(work: Callable[[Any], Any]) -> None:
    with FakeCuda() as record:
        out = work(torch.ones(3, 3, device="cuda"))

    assert out.device == CUDA
    assert record.num_syncs == 0


def test_random_numbers_come_from_a_generator_of_the_device() -> None:
    with FakeCuda():
        torch.manual_seed(1)
        ours, state = torch.rand(4, device="cuda"), torch.cuda.get_rng_state()
        host = torch.rand(4)
        more = torch.nn.functional.dropout(ours, 0.5)
        torch.cuda.set_rng_state(state)
        again = torch.nn.functional.dropout(ours, 0.5)

    # Both generators were seeded, and neither's draws move the other.
    assert torch.equal(ours.inner, host)
    assert torch.equal(more.inner, again.inner)


def test_views_launch_nothing() -> None:
    with FakeCuda() as record:
        x = torch.ones(3, 3, device="cuda")
        before = record.num_launches
        x.view(9).unsqueeze(0).transpose(0, 1)
        assert record.num_launches == before
        x + x
        assert record.num_launches == before + 1
