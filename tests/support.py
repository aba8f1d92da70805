"""Helpers of several tests: functions and scripts run by a few real ranks, and patience."""

from __future__ import annotations

import fcntl
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import forks

# Seconds after which a test takes a process for hung: far more than one needs on a slow machine,
# and less than the half hour for which a rank waits for one that is gone.
PATIENCE = 600
STOPPED = 75  # exit code of a run that was asked to stop
_CALL = "from tests.support import call_as_rank; call_as_rank()"


def free_port() -> int:
    """A TCP port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def share_folder(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Path:
    """Return a folder that `make` fills, once for all workers of a run, and no test changes.

    Files that share folders of the same name have different ones.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = factory.mktemp(name)
        make(folder)
        return folder
    caller = Path(sys._getframe(1).f_code.co_filename)
    # Each worker's base is below the run's.
    folder = factory.getbasetemp().parent / f"{caller.parent.name}-{caller.stem}-{name}"
    done = folder.with_name(f"{folder.name}.done")
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            done.touch()
    return folder


def call_as_rank() -> None:
    """Be one rank of `run_ranks`: its folder, its rank and the world size are the arguments."""
    folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with (folder / "call.pickle").open("rb") as file:
        sys.path[:] = pickle.load(file)
        function, args = pickle.load(file)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=PATIENCE)
    )
    torch.save(function(*args), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `function(*args)` on gloo ranks of this machine; its results in rank order.

    The function must be importable (defined at the top of a module) and its arguments and result
    picklable. A rank that fails ends the others and raises here, with its traceback.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "call.pickle").open("wb") as file:
            pickle.dump(sys.path, file)
            pickle.dump((function, args), file)
        commands = [["-c", _CALL, folder, rank, world_size] for rank in range(world_size)]
        _run_to_success(commands, PATIENCE)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def output_of_code(code: str) -> str:
    """Run code in a new process, which has imported nothing yet; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=forks.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def launch_ranks(world_size: int, script: Path, *arguments: str, seconds: float = PATIENCE) -> str:
    """Run a Python script as ranks of one job, as torchrun would; what rank 0 printed.

    For engines that need a separate process. The first rank that fails, or the end of so
    many seconds, ends all of them and raises with the rank's output.
    """
    return _run_to_success([[script, *arguments]] * world_size, seconds)[0]


def rank_environments(world_size: int) -> list[dict[str, str]]:
    """Variables of the ranks of one job on this machine, as torchrun sets them."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    return [
        {**common, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(world_size)
    ]


def run_together(
    commands: Sequence[Sequence[object]],
    *,
    folder: Path | None = None,
    one_stream: bool = False,
    seconds: float = PATIENCE,
    end_together: bool = True,
) -> list[subprocess.CompletedProcess[str]]:
    """Run one Python command per rank, all at once; `-9` is the exit code of one that was killed.

    The first rank that fails ends all of them, unless `end_together` is false; so does the end of
    so many seconds. A run that is asked to stop has not failed.
    """
    processes: list[forks.Process] = []
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        files = [
            [stack.enter_context(TemporaryFile("w+")) for _ in range(1 if one_stream else 2)]
            for _ in commands
        ]
        try:
            for words, environment, streams in zip(
                commands, rank_environments(len(commands)), files, strict=True
            ):
                process = forks.Process(
                    [str(word) for word in words],
                    folder=folder or Path.cwd(),
                    environment=environment,
                    stdout=streams[0],
                    stderr=streams[-1],
                )
                processes.append(process)
            while any(process.poll() is None for process in processes):
                failed = any(process.poll() not in (None, 0, STOPPED) for process in processes)
                if (failed and end_together) or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        done = []
        for process, streams in zip(processes, files, strict=True):
            texts = []
            for stream in streams:
                stream.seek(0)
                texts.append(stream.read())
            done.append(subprocess.CompletedProcess((), process.returncode or 0, *texts))
    return done


def _run_to_success(commands: Sequence[Sequence[object]], seconds: float) -> list[str]:
    """Run one command per rank; what each printed, with its errors.

    Raises:
        RuntimeError: a rank failed or took too long; has the output of all.
    """
    done = run_together(commands, one_stream=True, seconds=seconds)
    codes = [one.returncode for one in done]
    if any(codes):
        texts = "\n".join(one.stdout[-4000:] for one in done)
        raise RuntimeError(f"exit codes {codes}\n{texts}")
    return [one.stdout for one in done]
