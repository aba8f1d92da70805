"""The learned temperature moves as a parameter of torch's own optimizer does."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pipeline.config import LossConfig, OptimizerConfig
from pipeline.training.optim import Temperature

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
