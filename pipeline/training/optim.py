"""AdamW and its learning rate for the model, and the temperature, which may be learned too."""

from __future__ import annotations

import math
from typing import Any

import torch

from pipeline.config import LossConfig, OptimizerConfig


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters.

    torch's own AdamW, so that no machine needs a compiler to build an optimizer.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into two groups: matrices decay, norms and biases do not."""
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # A parameter that ZeRO-3 has partitioned has lost its shape to `ds_shape`.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) >= 2 else kept).append(parameter)
    # DeepSpeed cannot partition an empty group.
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0-based); there is no state to save.

    Linear warm-up over `warmup_steps` from lr/warmup_steps to lr, then the chosen decay, which
    would reach 0 at `decay_steps`, or `num_steps` without it.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    # Without decay_steps, a longer run would change rates of steps already made: see run_identity.
    end = config.decay_steps or num_steps
    progress = (step - config.warmup_steps) / (end - config.warmup_steps)
    if config.decay == "linear":
        return config.lr * (1 - progress)
    if config.decay == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr


class Temperature:
    """A scalar that every rank updates in the same way: its gradient is the global loss's.

    Learned as its logarithm (Radford et al., arXiv 2103.00020, section 2.5), without weight decay.
    ZeRO never sees it: one number needs no sharding, and all ranks compute the same update.

    Args:
        config: the initial value, and whether it is learned.
        optimizer: AdamW's hyper-parameters.
    """

    def __init__(self, config: LossConfig, optimizer: OptimizerConfig) -> None:
        self._learned = config.learn_temperature
        self._fixed = config.temperature
        log = torch.tensor(math.log(config.temperature), dtype=torch.float64)
        self._log = torch.nn.Parameter(log)
        self._adam = torch.optim.Adam([self._log], betas=optimizer.betas, eps=optimizer.eps)

    @property
    def value(self) -> float:
        """The temperature of the next step."""
        return math.exp(self._log.item()) if self._learned else self._fixed

    def step(self, gradient: float | None, lr: float) -> None:
        """Apply d(loss) / d(temperature); does nothing when the temperature is fixed."""
        if not self._learned:
            return
        assert gradient is not None, "the loss was not asked for the gradient"
        # d(loss) / d(log t) = d(loss) / dt * t
        self._log.grad = torch.tensor(gradient * self.value, dtype=torch.float64)
        self._adam.param_groups[0]["lr"] = lr
        self._adam.step()

    def state_dict(self) -> dict[str, float]:
        """Return plain numbers from which `load_state_dict` restores everything."""
        if not self._learned:
            return {}
        # Empty before the first update.
        moments = self._adam.state.get(self._log, {})
        return {"log": self._log.item(), **{k: float(v) for k, v in moments.items()}}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict`."""
        if not self._learned or not state:
            return
        with torch.no_grad():
            self._log.fill_(state["log"])
        if "step" in state:
            self._adam.state[self._log] = {
                "step": torch.tensor(state["step"]),
                "exp_avg": torch.tensor(state["exp_avg"], dtype=torch.float64),
                "exp_avg_sq": torch.tensor(state["exp_avg_sq"], dtype=torch.float64),
            }
