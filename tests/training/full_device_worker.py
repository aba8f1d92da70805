"""Runs of two ranks of which one finds its device full in one part of a step: rank 1, or rank 0.

The parent imports everything once and forks the ranks. Prints one JSON line per part.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pipeline import train
from pipeline.training import contrastive_step, token_step
from pipeline.training.collectives import Reduction
from pipeline.training.schedules import LayerSweep
from pipeline.training.zero import ZeroEngine, import_deepspeed
from tests.support import PATIENCE, free_port

TOKENS = (
    "chunks={max_tokens: 200, min_chunks: 1}",
    "objective={masked_diffusion: {}}",
    "loss={temperature: 0.02, learn_temperature: false}",
)
CACHE, SWEEP = ("schedule=cache",), ("schedule=sweep",)
# Part -> the function in which the device is full, the number of its call, and keys of the run.
FATAL: dict[str, tuple[Any, str, int, tuple[str, ...]]] = {
    "hold": (ZeroEngine, "hold", 2, CACHE),
    "loss": (contrastive_step, "contrastive_loss", 2, CACHE),
    "reduction": (Reduction, "finish", 2, CACHE),
    "update": (ZeroEngine, "step", 2, CACHE),
    "save": (ZeroEngine, "share_state", 1, CACHE),
    "layer of a sweep": (ZeroEngine, "hold", 8, SWEEP),
}
REPEATED: dict[str, tuple[Any, str, int, tuple[str, ...]]] = {
    "forward of a sweep": (LayerSweep, "_forward_stage", 2, SWEEP),
    "backward of a sweep": (LayerSweep, "_backward_one", 4, SWEEP),
    "head of a sweep": (token_step, "_through_the_head", 2, (*SWEEP, *TOKENS)),
}


OF_RANK_0 = "update"  # whose process holds the store that tells the others


def fill_device(
    owner: Any, name: str, call: int, *, at_fault: str, then: Callable[[], None]
) -> None:
    """Let one rank run out of memory in one call of a function, and the other do `then` in it."""
    real, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            if os.environ["RANK"] == at_fault:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU")
            then()
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def wait_as_in_nccl() -> None:
    """Wait in a call that does not notice the other rank's end."""
    threading.Event().wait()


def run(part: str, words: list[str], folder: Path) -> dict[str, Any]:
    """Run two ranks; return their exit codes, what they wrote to stderr, and losses by step."""
    folder.mkdir()
    os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    ranks = []
    for rank in range(2):
        ranks.append(os.fork())
        if not ranks[-1]:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            for stream in (1, 2):
                os.dup2(os.open(folder / f"{rank}-{stream}", os.O_WRONLY | os.O_CREAT), stream)
            owner, name, call, keys = {**FATAL, **REPEATED}[part]
            then = wait_as_in_nccl if part in FATAL else (lambda: None)
            at_fault = "0" if part == OF_RANK_0 else "1"
            fill_device(owner, name, call, at_fault=at_fault, then=then)
            sys.argv = ["train", *words, *keys, f"output_dir={folder / 'run'}"]
            train.main()
    codes = wait_for(ranks)
    metrics = folder / "run" / "metrics.jsonl"
    return {
        "part": part,
        "codes": codes,
        "said": [(folder / f"{rank}-2").read_text().splitlines() for rank in range(2)],
        "printed": (folder / "0-1").read_text(),
        "losses": [json.loads(line)["loss"] for line in metrics.open()] if metrics.exists() else [],
    }


def wait_for(ranks: list[int]) -> list[int]:
    """Return exit codes; -9 of a rank that hangs."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE / 4
    while len(codes) < len(ranks):
        for rank in ranks:
            if rank not in codes and time.monotonic() > deadline:
                os.kill(rank, signal.SIGKILL)
            if rank not in codes and (ended := os.waitpid(rank, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.02)
    return [codes[rank] for rank in ranks]


def main() -> None:
    recipe, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    import_deepspeed()
    for name in ("deepspeed.runtime.zero.muon.muon_optimizer", "pipeline.training.trainer"):
        import_module(name)  # here, so that no rank does
    words = [recipe, "--deepspeed", "ds_configs/zero3.json", "num_steps=2"]
    words += ["optimizer.warmup_steps=1", "model.attention_dropout=0.0"]
    for part in sys.argv[3:] or (*FATAL, *REPEATED):
        print(json.dumps(run(part, words, folder / part)), flush=True)


if __name__ == "__main__":
    main()
