"""Learning rate and parameter groups."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pipeline.config import OptimizerConfig
from pipeline.training.optim import build_optimizer, learning_rate, parameter_groups


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_learning_rate_equals_torch_schedulers(decay: str) -> None:
    config = OptimizerConfig(lr=0.1, warmup_steps=4, decay=decay)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, 1.0, total_iters=3)
    rest: torch.optim.lr_scheduler.LRScheduler
    if decay == "linear":
        rest = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=16)
    elif decay == "cosine":
        rest = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
    else:
        rest = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, rest], [4])
    stopped_early = dataclasses.replace(config, decay_steps=20)
    for step in range(20):
        wanted = optimizer.param_groups[0]["lr"]
        assert learning_rate(step, config, 20) == pytest.approx(wanted, abs=1e-12)
        assert learning_rate(step, stopped_early, 9) == learning_rate(step, config, 20)
        optimizer.step()
        both.step()


def test_norms_and_biases_do_not_decay_and_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    model[2].requires_grad_(False)
    decayed, kept = parameter_groups(model, 0.1)
    assert [p is model[0].weight for p in decayed["params"]] == [True]
    assert decayed["weight_decay"] == 0.1
    assert {id(p) for p in kept["params"]} == {
        id(model[0].bias),
        id(model[1].weight),
        id(model[1].bias),
    }
    assert kept["weight_decay"] == 0.0


def test_adamw_gets_the_numbers_of_the_config() -> None:
    config = OptimizerConfig(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    decayed, kept = build_optimizer(torch.nn.Linear(3, 2), config).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    for group in (decayed, kept):
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.95), 1e-6)
