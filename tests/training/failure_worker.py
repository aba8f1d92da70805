"""The trainer with one fault put in, named by FAULT in the environment."""

from __future__ import annotations

import os
import signal
from typing import Any

from pipeline import comm, train
from pipeline.training import objective
from pipeline.training.zero import ZeroEngine

STEP = 1


def put_in(fault: str) -> None:
    """Let rank 1 fail, by signal or exception, or embed to NaN, in one step."""
    accumulate = objective.accumulate_gradients
    embed = ZeroEngine.embed
    present = 0

    def faulty_accumulate(engine: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal present
        present = batch.step
        if batch.step == STEP and comm.rank() == 1:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "raises":
                raise RuntimeError("this rank broke")
        return accumulate(engine, batch, *args, **kwargs)

    def faulty_embed(self: ZeroEngine, *args: Any) -> Any:
        out = embed(self, *args)
        return out * float("nan") if present == STEP and comm.rank() == 1 else out

    objective.accumulate_gradients = faulty_accumulate
    if fault == "nan":
        ZeroEngine.embed = faulty_embed  # type: ignore[method-assign]


if __name__ == "__main__":
    put_in(os.environ["FAULT"])
    train.main()
