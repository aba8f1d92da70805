"""What several tests need: functions run by a few real ranks, and patience."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Seconds after which a test takes a process for hung: far more than one needs on a slow machine,
# and less than the half hour for which a rank waits for one that is gone.
PATIENCE = 600


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(
        "gloo",
        init_method=address,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=PATIENCE),
    )
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `function(*args)` on gloo ranks of this machine; its results in rank order.

    The function must be importable (defined at the top of a module) and its arguments and result
    picklable. A rank that fails ends the others and raises here, with its traceback.
    """
    with TemporaryDirectory() as folder:
        mp.spawn(
            _rank_main,
            args=(world_size, free_port(), folder, function, args),
            nprocs=world_size,
        )
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def launch_ranks(world_size: int, script: Path, *arguments: str, seconds: float = PATIENCE) -> str:
    """Run a Python script as ranks of one job, as torchrun would; what rank 0 printed.

    For engines that want a process of their own. The first rank that fails, or the end of so
    many seconds, ends all of them and raises with the rank's output.
    """
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    processes, outputs = [], []
    deadline = time.monotonic() + seconds
    try:
        for rank in range(world_size):
            outputs.append(TemporaryFile("w+"))  # noqa: SIM115 -- read after the ranks end
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(script), *arguments],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=outputs[-1],
                    stderr=subprocess.STDOUT,
                )
            )
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = []
    for output in outputs:
        output.seek(0)
        texts.append(output.read())
        output.close()
    codes = [process.returncode for process in processes]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}\n" + "\n".join(text[-4000:] for text in texts))
    return texts[0]
