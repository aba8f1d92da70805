"""One rank that trains in every way there is while a recorder checks its collective calls.

Started by test_nccl_rules.py through a launcher; writes `rank-N.json` next to the recipe.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline import comm, train
from pipeline.errors import DiffembedError
from pipeline.launch import discover_world
from pipeline.training import contrastive_step
from pipeline.training.evaluations import ScoringCommands
from pipeline.training.zero import ZeroEngine
from tests.nccl_rules import Recorder, timeouts
from tests.support import PATIENCE
from tests.training.failure_worker import ask_to_stop_within_a_step

TOKENS = "loss={temperature: 0.02, learn_temperature: false}"


class Runs:
    """Runs of one recipe in folders next to it, and what came of each."""

    def __init__(self, recipe: Path, mistakes: list[str]) -> None:
        self.recorder = Recorder()
        self.mistakes = mistakes
        self.outcomes: dict[str, str] = {}
        self._recipe = recipe

    def folder(self, name: str) -> Path:
        return self._recipe.parent / f"{name}-{comm.world_size()}"

    def train(self, name: str, *changes: str, zero: int = 3) -> None:
        self.recorder.phase = name
        folder = f"output_dir={self.folder(name)}"
        words = [str(self._recipe), folder, "optimizer.warmup_steps=1", *changes]
        try:
            train.run([*words, "--deepspeed", f"ds_configs/zero{zero}.json"])
            self.outcomes[name] = "done"
        except DiffembedError as error:
            self.outcomes[name] = f"{type(error).__name__}: {error}"

    def write(self) -> None:
        report = {
            "calls": self.recorder.calls,
            "faults": self.recorder.faults,
            "outcomes": self.outcomes,
            "mistakes": self.mistakes,
            "timeouts": timeouts(),
            "losses": {
                name: [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
                for name in self.outcomes
                if (folder := self.folder(name)).joinpath("metrics.jsonl").exists()
            },
        }
        (self._recipe.parent / f"rank-{comm.rank()}-of-{comm.world_size()}.json").write_text(
            json.dumps(report)
        )


def at_fault() -> bool:
    return comm.rank() == comm.world_size() - 1


@contextmanager
def in_a_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Let the rank at fault do something before it accumulates the gradients of a step."""
    real = contrastive_step.accumulate_gradients

    def accumulate(engine: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if batch.step == step and at_fault():
            act()
        return real(engine, batch, *args, **kwargs)

    contrastive_step.accumulate_gradients = accumulate
    try:
        yield
    finally:
        contrastive_step.accumulate_gradients = real


def run_out_of_memory_once(engine: type[ZeroEngine] = ZeroEngine) -> None:
    """Let a chunk with a graph not fit on the rank at fault."""
    real = engine.embed

    def embed(self: ZeroEngine, *args: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and at_fault():
            engine.embed = real  # type: ignore[method-assign]
            raise torch.OutOfMemoryError("the test's stand-in for a full device")
        return real(self, *args)

    engine.embed = embed  # type: ignore[method-assign]


def schedules(runs: Runs, evaluate: Path, mined: Path) -> None:
    """Train contrastively and on tokens, with checkpoints, one of which is scored."""
    # The programs that score are no ranks: any will do.
    commands = ScoringCommands(submit=lambda *_: ["true"], local=lambda *_: [["true"]])
    train.scoring_commands = lambda _: commands
    scored = f"evaluate={json.dumps({'every': 2, 'config': str(evaluate), 'where': 'local'})}"
    runs.train("cache", "schedule=cache", "num_steps=3", scored)
    again = ("schedule=cache", "num_steps=3", "deterministic=true")
    runs.train("cache, deterministic", *again)
    own = "loss={temperature: 0.1, symmetric: true, matryoshka_dims: [8], learn_temperature: true}"
    runs.train("sweep", "schedule=sweep", "num_steps=2", own)
    taught = (f"data.path={mined}", "loss.guide={}", "loss.projection={}")
    runs.train("projection", "schedule=cache", "num_steps=2", *taught)
    diffusion = ("objective={masked_diffusion: {}}", TOKENS)
    runs.train("masked diffusion", *diffusion, "schedule=sweep", "num_steps=2")
    if comm.world_size() > 2:  # other stages and objectives make no other calls there
        return
    runs.train("plain", "schedule=plain", "num_steps=2", zero=2)
    runs.train("cache at ZeRO-1", "schedule=cache", "num_steps=2", zero=1)
    runs.train("sweep of LoRA", "schedule=sweep", "num_steps=2", "model.lora={rank: 5}", zero=2)
    runs.train("mntp", "objective={mntp: {}}", "schedule=cache", TOKENS, "num_steps=2")
    causal = ("objective={next_token: {}}", TOKENS, "model.attention=causal")
    runs.train("next token", *causal, "schedule=sweep", "num_steps=2", zero=2)


def interruptions(runs: Runs) -> None:
    """Stop by a signal, resume, resume from damage, run out of memory, stop within a step."""
    with in_a_step(2, lambda: os.kill(os.getpid(), signal.SIGUSR1)):
        runs.train("stopped", "schedule=cache", "num_steps=4")
    stopped = runs.folder("stopped") / "checkpoints"
    if comm.rank() == 0:
        for copy in ("resumed", "damaged"):
            # The folder itself is kept by the stopped run for as long as this process lives.
            shutil.copytree(stopped, runs.folder(copy) / "checkpoints")
        *_, last = sorted((runs.folder("damaged") / "checkpoints").rglob("*.safetensors"))
        content = bytearray(last.read_bytes())
        content[-1] ^= 1
        last.write_bytes(content)
    comm.barrier()
    runs.train("resumed", "schedule=cache", "num_steps=4")
    runs.train("damaged", "schedule=cache", "num_steps=4")
    run_out_of_memory_once()
    runs.train("out of memory", "schedule=cache", "num_steps=2")
    ask_to_stop_within_a_step()
    runs.train("stopped within a step", "schedule=sweep", "num_steps=6")


def break_rules() -> list[str]:
    """Return a recorder's findings on calls that gloo accepts and NCCL refuses."""
    recorder = Recorder()
    recorder.phase = "mistakes"
    other = comm.new_group(range(comm.world_size()))
    dist.all_reduce(torch.ones(4, 2).T)
    with suppress(RuntimeError):
        dist.all_reduce(torch.ones(2, dtype=torch.int16))
    work = dist.all_reduce(torch.ones(3), async_op=True)
    dist.all_reduce(torch.ones(3), group=other)
    work.wait()
    dist.all_reduce(torch.ones(3), group=other)
    dist.barrier()
    dist.broadcast_object_list(["text"], src=0)
    thread = threading.Thread(target=dist.all_reduce, args=(torch.ones(5),), name="saver")
    thread.start()
    thread.join()
    recorder.stop()
    return recorder.faults


def fail(runs: Runs) -> None:
    """Let one rank break in a step: the others are told by the call that they are waiting in."""

    def leave() -> None:
        runs.write()
        comm.leave(0, gracefully=False)

    try:
        with in_a_step(1, leave):
            runs.train("broken rank", "schedule=cache", "num_steps=3")
    except RuntimeError as error:
        runs.outcomes["broken rank"] = f"RuntimeError: {error}"
    leave()


def main() -> None:
    recipe, evaluate, mined = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    comm.start(discover_world(), timeout_seconds=PATIENCE)
    mistakes = break_rules()
    runs = Runs(recipe, mistakes)
    schedules(runs, evaluate, mined)
    interruptions(runs)
    fail(runs)


if __name__ == "__main__":
    main()
