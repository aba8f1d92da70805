"""An engine without a model: state in a dict, for tests of what needs no real one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from pipeline import comm
from pipeline.training.checkpoints import Saver, Stateful, equal_share


class Memory:
    """Named parameters of two elements each, all of one value."""

    def __init__(self, **values: float) -> None:
        self.state = {
            name: {key: torch.full((2,), value) for key in ("weight", "exp_avg", "exp_avg_sq")}
            for name, value in values.items()
        }
        self.optimizer_steps = 0

    @property
    def parameter_names(self) -> list[str]:
        return list(self.state)

    def share_state(self, name: str) -> dict[str, torch.Tensor]:
        own = self.share_of(name)
        return {key: tensor[own.start : own.stop] for key, tensor in self.state[name].items()}

    def prepare_restore(self, optimizer_steps: int) -> None:
        self.optimizer_steps = optimizer_steps

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name]["weight"].shape)

    def share_of(self, name: str) -> range:
        size = self.state[name]["weight"].numel()
        return equal_share(size, rank=comm.rank(), share=math.ceil(size / comm.world_size()))

    def restore_state(self, name: str, share: dict[str, torch.Tensor]) -> None:
        self.state[name] = share

    def finish_restore(self) -> None:
        pass


def save(
    folder: Path,
    engine: Stateful,
    *,
    step: int,
    identity: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> Path:
    """A whole checkpoint of any engine; a collective call."""
    saver = Saver(folder)
    saver.begin(engine, step=step, identity=identity, extra=extra)
    return saver.finish()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
