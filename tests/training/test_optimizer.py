"""Learning rate, parameter groups, and a temperature that moves as torch's optimizer would."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from pipeline.config import LossConfig, OptimizerConfig
from pipeline.training.contrastive_step import Temperature
from pipeline.training.engine import build_optimizer, learning_rate, parameter_groups


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


def test_a_fused_update_is_adamw_by_its_definition() -> None:
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, in float64."""
    torch.manual_seed(0)
    model = torch.nn.Linear(7, 5, bias=False)
    config = OptimizerConfig(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    optimizer = build_optimizer(model, config)
    assert optimizer.defaults["fused"]
    weight = model.weight.detach().double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 21):
        gradient = torch.randn(5, 7) * 10.0 ** (step % 5 - 4)
        model.weight.grad = gradient.clone()
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient.double() ** 2
        weight -= config.lr * 0.3 * weight
        mean, square = first / (1 - 0.8**step), second / (1 - 0.95**step)
        weight -= config.lr * mean / (square.sqrt() + 1e-6)
        torch.testing.assert_close(model.weight.double(), weight, atol=1e-6, rtol=1e-6)


START = 0.05
OPTIMIZER = OptimizerConfig(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)


def loss(temperature: torch.Tensor) -> torch.Tensor:
    """Any smooth function of a positive number."""
    return (temperature - 0.08) ** 2 / temperature


def test_a_learned_temperature_follows_torchs_adam_on_its_logarithm() -> None:
    """Also across a resume, whose state passes through JSON; weight decay is none of it."""
    config = LossConfig(temperature=START, learn_temperature=True)
    log = torch.nn.Parameter(torch.tensor(math.log(START), dtype=torch.float64))
    adam = torch.optim.AdamW([log], betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=0.0)
    ours = Temperature(config, OPTIMIZER)
    for step, lr in enumerate((0.1, 0.03, 0.2, 0.05)):
        if step == 2:
            state = json.loads(json.dumps(ours.state_dict()))
            ours = Temperature(config, OPTIMIZER)
            ours.load_state_dict(state)
        value = torch.tensor(ours.value, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(value), value)
        ours.step(slope.item(), lr)
        adam.zero_grad()
        loss(log.exp()).backward()
        adam.param_groups[0]["lr"] = lr
        adam.step()
        assert ours.value == pytest.approx(log.exp().item(), rel=1e-12)
    assert ours.value > 1.2 * START


def test_a_fixed_temperature_stays_as_it_is() -> None:
    fixed = Temperature(LossConfig(temperature=START), OPTIMIZER)
    fixed.step(None, 0.1)
    assert fixed.value == START
    assert fixed.state_dict() == {}
