"""The softmax temperature, fixed or learned in log space, the same number on every rank."""

from __future__ import annotations

import math

import torch

from pipeline.config import LossConfig, OptimizerConfig


class Temperature:
    """A scalar that every rank updates alike: its gradient is that of the global loss.

    Learned as its logarithm (Radford et al., arXiv 2103.00020, section 2.5), without weight decay.

    Args:
        config: where it starts, and whether it is learned.
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
        """Take d(loss) / d(temperature); does nothing when the temperature is fixed."""
        if not self._learned:
            return
        assert gradient is not None, "the loss was not asked for the gradient"
        self._log.grad = torch.tensor(gradient * self.value, dtype=torch.float64)
        self._adam.param_groups[0]["lr"] = lr
        self._adam.step()

    def state_dict(self) -> dict[str, float]:
        """Plain numbers that `load_state_dict` takes back without loss."""
        if not self._learned:
            return {}
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
