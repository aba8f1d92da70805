"""A run that moves to another number of ranks again and again, in one process tree.

The parent imports everything once and forks the ranks: five launches would import five times as
often as they compute. Ranks 0 print one JSON line per restored engine.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from checkpoint_worker import IDENTITY, start_engine, train
from safetensors.torch import save

from pipeline import comm, run_folder
from pipeline.launch import discover_world
from pipeline.training import checkpoints
from pipeline.training.zero import ZeroEngine, import_deepspeed
from tests.support import PATIENCE, free_port
from tests.traffic import Traffic
from tests.training.exactness import whole_state

WORLD_SIZES = (2, 3, 5, 6, 1)
# The stage that saved, and the one that resumes, with what else it is told.
PAIRS: tuple[tuple[int, int, dict[str, int]], ...] = (
    (1, 3, {}),
    (2, 3, {"stage3_param_persistence_threshold": 100}),
    (3, 3, {}),
    (3, 2, {}),
    (3, 1, {}),
)


def differences(engine: ZeroEngine, path: Path) -> list[str]:
    """List parameters of an engine that differ in any bit from the checkpoint's files."""
    found = []
    for name, stored in checkpoints.iterate_tensors(path):
        state = whole_state(engine, name)
        found += [f"{name}/{key}" for key in stored if not torch.equal(state[key], stored[key])]
        parameter = dict(engine.encoder.named_parameters())[name]
        with engine.hold([parameter]):
            if not torch.equal(parameter.data, stored["weight"].bfloat16()):
                found.append(name)
    return found


def run_rank(folder: Path, move: int) -> None:
    """Resume at every pair of stages from the last number of ranks; save at every stage."""
    for saved, stage, zero in PAIRS if move else ():
        path = run_folder.latest_checkpoint(folder / f"{move - 1}-{saved}")
        assert path is not None
        if comm.world_size() == 6 and stage == 3:
            zero = {**zero, "zero_hpz_partition_size": 3}
        engine = start_engine(stage, "bfloat16", **zero)
        step, _ = checkpoints.load(path, engine, IDENTITY)
        wrong = comm.all_gather_object(differences(engine, path))
        if comm.rank() == 0:
            line = {"ranks": comm.world_size(), "saved": saved, "stage": stage, "wrong": wrong}
            print(json.dumps({**line, "steps": engine.optimizer_steps, "step": step}), flush=True)
        if saved == 3:
            save_after_a_step(engine, folder / f"{move}-{stage}", step)
        engine.close()
    for stage in (1, 2, 3) if not move else ():
        engine = start_engine(stage, "bfloat16")
        save_after_a_step(engine, folder / f"{move}-{stage}", 0)
        engine.close()


def save_after_a_step(engine: ZeroEngine, folder: Path, step: int) -> None:
    """Train, so that the next move has other numbers, and save."""
    train(engine, range(step, step + 1))
    rank, world_size = comm.rank(), comm.world_size()
    own = engine.parameter_names[rank::world_size]
    states = {name: whole_state(engine, name) for name in engine.parameter_names}
    wanted = {f"{name}/{key}": states[name][key] for name in own for key in checkpoints.KEYS}
    saver = checkpoints.Saver(folder)
    with watched() as (traffic, received):
        saver.begin(engine, step=step + 1, identity=IDENTITY)
    path = saver.finish()
    file = path / f"tensors-{rank:05d}-of-{world_size:05d}.safetensors"
    # With more ranks than parameters, some write an empty file.
    assert file.read_bytes() == save(wanted)
    # No rank has seen more of a parameter than its share, except of those that it writes.
    assert not traffic.bytes
    assert [size for size in received if size] == [tensor.numel() for tensor in wanted.values()]


@contextmanager
def watched() -> Iterator[tuple[Traffic, list[int]]]:
    """Count what DeepSpeed gathers, and the elements that each exchange leaves on this rank."""
    traffic, received, real = Traffic(), [], comm.exchange

    def exchange(parts: list[torch.Tensor], sizes: list[int]) -> torch.Tensor:
        out = real(parts, sizes)
        received.append(len(out))
        return out

    comm.exchange = exchange
    try:
        yield traffic, received
    finally:
        comm.exchange = real


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    import_deepspeed()
    # DeepSpeed's imports for an engine take longer than everything else here.
    import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    for move, world_size in enumerate(WORLD_SIZES):
        os.environ.update(WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
        ranks = []
        for rank in range(world_size):
            ranks.append(os.fork())
            if not ranks[-1]:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                comm.start(discover_world(), timeout_seconds=PATIENCE)
                run_rank(folder, move)
                comm.leave(0, gracefully=True)
        if any(os.waitpid(rank, 0)[1] for rank in ranks):
            sys.exit(f"moving to {world_size} ranks failed")


if __name__ == "__main__":
    main()
