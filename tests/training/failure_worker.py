"""The trainer with one fault put in, named by FAULT in the environment."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline import comm, train
from pipeline.training import contrastive_step, engine
from pipeline.training.run_checkpoints import RunCheckpoints
from pipeline.training.zero import ZeroEngine

STEP = 1


def put_in(fault: str) -> None:
    """Let rank 1 fail by an exception, or embed to NaN, in one step."""
    if fault == "asked to stop":
        ask_to_stop_within_a_step()
        return
    if fault == "cannot save":
        RunCheckpoints.save = wait_for_each_other  # type: ignore[method-assign]
        return
    accumulate = contrastive_step.accumulate_gradients
    embed = ZeroEngine.embed
    present = 0

    def faulty_accumulate(engine: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal present
        present = batch.step
        if batch.step == STEP and comm.rank() == 1 and fault == "raises":
            raise RuntimeError("this rank broke")
        return accumulate(engine, batch, *args, **kwargs)

    def faulty_embed(self: ZeroEngine, *args: Any) -> Any:
        out = embed(self, *args)
        return out * float("nan") if present == STEP and comm.rank() == 1 else out

    contrastive_step.accumulate_gradients = faulty_accumulate
    if fault == "nan":
        ZeroEngine.embed = faulty_embed  # type: ignore[method-assign]


def wait_for_each_other(self: RunCheckpoints, step: int) -> Path:
    """Tell that the save has begun, and never come back while the other rank lives."""
    rank = comm.rank()
    (self._folder.parent / f"saving-{rank}").touch()
    dist.recv(torch.empty(1), src=1 - rank)
    raise AssertionError("no rank sends")


def ask_to_stop_within_a_step() -> None:
    """Send rank 1 a signal in the second pass of the fourth step, as if steps took minutes."""
    engine._LONG_STEP_SECONDS = engine._SPACING_SECONDS = 0.0
    backward, asked = ZeroEngine.backward, False

    def backward_and_signal(self: ZeroEngine, surrogate: Any) -> None:
        nonlocal asked
        backward(self, surrogate)
        if comm.rank() == 1 and self.optimizer_steps == 3 and not asked:
            asked = True
            os.kill(os.getpid(), signal.SIGUSR1)

    ZeroEngine.backward = backward_and_signal  # type: ignore[method-assign]


if __name__ == "__main__":
    put_in(os.environ["FAULT"])
    train.main()
