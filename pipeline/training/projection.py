"""The matrix of `loss.projection`: the objective's own parameter, which ZeRO never sees.

    Contrastive   weight -> loss -> gradient, summed over ranks -> step(lr)
    checkpoint    one more tensor next to the model's (`WithProjection`)

Every rank keeps it whole and makes the same updates from the same gradients. So it works with every
stage, schedule and adapter, at 16 bytes per element on each rank. It is no part of the model: an
export leaves it out, and the gradient norm of a step, which clipping reads, does not count it.
"""

from __future__ import annotations

import numpy as np
import torch

from pipeline import comm
from pipeline.config import TrainConfig
from pipeline.training.checkpoints import KEYS, PROJECTION, Stateful

# Keeps its draw apart from others of the run's seed.
_PURPOSE = 0x9E3779B9


class Projection:
    """A trained (E, W) matrix from the model's vectors to a teacher's.

    Args:
        config: `loss.projection`, AdamW's hyper-parameters, and the seed of the first values.
        width: E, of the model's vectors.
        teacher_width: W, of the teacher's.
        device: where it is kept.
    """

    def __init__(
        self, config: TrainConfig, *, width: int, teacher_width: int, device: torch.device
    ) -> None:
        assert config.loss.projection is not None
        optimizer = config.optimizer
        # By numpy, whose draws are the same on every kind of processor.
        drawn = np.random.default_rng([config.seed, _PURPOSE]).standard_normal(
            (width, teacher_width)
        )
        weight = torch.from_numpy((drawn / width**0.5).astype(np.float32))
        self.weight = torch.nn.Parameter(weight.to(device))
        # Its rate is this share of the model's.
        self._rate = config.loss.projection.lr / optimizer.lr
        self._adam = torch.optim.AdamW(
            [self.weight],
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )

    def step(self, gradient: torch.Tensor, lr: float) -> None:
        """Apply d(loss) / d(weight), given the model's learning rate."""
        self.weight.grad = gradient
        self._adam.param_groups[0]["lr"] = lr * self._rate
        self._adam.step()
        self.weight.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of weight and moments; the moments are zeros before the first update."""
        moments = self._adam.state.get(self.weight, {})
        weight = self.weight.detach()
        return {
            "weight": weight.clone(),
            **{
                key: moments[key].clone() if key in moments else torch.zeros_like(weight)
                for key in KEYS[1:]
            },
        }

    def restore(self, state: dict[str, torch.Tensor], optimizer_steps: int) -> None:
        """Continue with weight and moments, as after `optimizer_steps` updates."""
        with torch.no_grad():
            self.weight.copy_(state["weight"])
        moments = {key: state[key] for key in KEYS[1:]}
        self._adam.state[self.weight] = {"step": torch.tensor(float(optimizer_steps)), **moments}


class WithProjection:
    """An engine's state and a projection's, as one (`checkpoints.Stateful`)."""

    def __init__(self, engine: Stateful, projection: Projection) -> None:
        self._engine, self._projection = engine, projection
        self._steps = 0
        self._restored: dict[str, torch.Tensor] = {}

    @property
    def parameter_names(self) -> list[str]:
        """The engine's, and the projection's at the end."""
        return [*self._engine.parameter_names, PROJECTION]

    @property
    def optimizer_steps(self) -> int:
        """The engine's: both are updated in the same steps."""
        return self._engine.optimizer_steps

    def share_state(self, name: str) -> dict[str, torch.Tensor]:
        """Return this rank's flat elements of a parameter's state, by key, on its device."""
        if name != PROJECTION:
            return self._engine.share_state(name)
        share = self.share_of(name)
        return {
            key: value.flatten()[share.start : share.stop]
            for key, value in self._projection.state().items()
        }

    def prepare_restore(self, optimizer_steps: int) -> None:
        """Allocate state to restore into."""
        self._steps = optimizer_steps
        self._restored = {
            key: torch.zeros_like(value) for key, value in self._projection.state().items()
        }
        self._engine.prepare_restore(optimizer_steps)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole parameter."""
        if name == PROJECTION:
            return tuple(self._projection.weight.shape)
        return self._engine.shape_of(name)

    def share_of(self, name: str) -> range:
        """Return the flat elements that this rank saves; of the projection an equal share."""
        if name != PROJECTION:
            return self._engine.share_of(name)
        size = self._projection.weight.numel()
        share = -(-size // comm.world_size())
        start = min(comm.rank() * share, size)
        return range(start, min(start + share, size))

    def restore_state(self, name: str, share: dict[str, torch.Tensor]) -> None:
        """Restore this rank's elements of a parameter's state."""
        if name != PROJECTION:
            self._engine.restore_state(name, share)
            return
        here = self.share_of(name)
        for key, values in share.items():
            self._restored[key].view(-1)[here.start : here.stop] = values

    def finish_restore(self) -> None:
        """Use the restored state from now on; a collective call."""
        # Zeros outside of a rank's share: their sum is the whole.
        whole = {key: comm.all_reduce_(value) for key, value in self._restored.items()}
        self._projection.restore(whole, self._steps)
        self._restored = {}
        self._engine.finish_restore()
