"""Parameter groups and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch

from pipeline.config import OptimizerConfig


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, norms and biases do not.

    Call before ZeRO-3 partitions the parameters: a partitioned one has lost its shape.
    """
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Parameters loaded straight into partitions carry their shape in `ds_shape`.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) >= 2 else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters.

    torch's own AdamW, so that no machine needs a compiler to build an optimizer.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based), nothing to save or restore.

    Linear warm-up over `warmup_steps` from lr/warmup_steps to lr, then the chosen decay, which
    would reach 0 at `decay_steps`, or `num_steps` without it.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    end = config.decay_steps or num_steps
    progress = (step - config.warmup_steps) / (end - config.warmup_steps)
    if config.decay == "linear":
        return config.lr * (1 - progress)
    if config.decay == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr
