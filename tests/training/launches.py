"""Runs on two ranks under the launchers that users have, and every process that belongs to one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType

from tests.support import PATIENCE, free_port

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "pipeline" / "train.py"
_BIN = Path(sys.executable).parent
LAUNCHERS = ("deepspeed", "torchrun", "mpirun")
_RANK_VARIABLES = (b"RANK=", b"OMPI_COMM_WORLD_RANK=", b"SLURM_PROCID=")


def _without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what would make the processes ranks of a run that is not theirs."""
    of_a_rank = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in environment.items() if name not in of_a_rank}


def launcher_words(launcher: str, port: int) -> list[str]:
    """A launcher's command line up to the script."""
    words: dict[str, list[object]] = {
        "deepspeed": [_BIN / "deepspeed", "--num_accelerators", 2, f"--master_port={port}"],
        "torchrun": [_BIN / "torchrun", "--nproc-per-node", 2, "--master-port", port],
        "mpirun": [
            *(_BIN / "mpirun", "-n", 2, "--allow-run-as-root", "--oversubscribe"),
            *("--bind-to", "none", sys.executable),
        ],
    }
    return [str(word) for word in words[launcher]]


class Launch:
    """A running training; on leaving the context nothing of it is left.

    Every process of it carries a mark in its environment, by which it is found, also when it has
    lost its parents.

    Args:
        launcher: one of `LAUNCHERS`, or the words of a command up to `script`.
        script: what the ranks run, or the first argument of a command that knows it.
        arguments: that follow.
        environment: what to add to this process's own.
    """

    def __init__(
        self,
        launcher: str | list[str],
        script: Path,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        port = free_port()
        self._mark = f"MARK_OF_RUN={port}-{os.getpid()}-{time.monotonic_ns()}".encode()
        name, _, value = self._mark.decode().partition("=")
        words = launcher_words(launcher, port) if isinstance(launcher, str) else launcher
        self._output = TemporaryFile("a+")  # noqa: SIM115 -- read while others append
        self.process = subprocess.Popen(
            [*words, str(script), *map(str, arguments)],
            cwd=ROOT,
            env={
                **_without_ranks(os.environ),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "MASTER_PORT": str(port),
                **(environment or {}),
                name: value,
            },
            stdout=self._output,
            stderr=subprocess.STDOUT,
            # Of its own group, as a shell would start it.
            start_new_session=True,
        )

    def __enter__(self) -> Launch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for pid in self.processes():
            send(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self._output.close()

    def wait(self) -> int:
        """The launcher's exit code, as a shell gives it."""
        code = self.process.wait(PATIENCE)
        return code if code >= 0 else 128 - code

    def processes(self) -> list[int]:
        """Process ids of all that carry the mark."""
        return [pid for pid, _ in self._marked()]

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in no order."""
        found = []
        for pid, environment in self._marked():
            if not any(entry.startswith(_RANK_VARIABLES) for entry in environment):
                continue
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                # Not the programs that a rank starts for a moment.
                if any(word.endswith(b".py") for word in words[1:3]):
                    found.append(pid)
        return found

    def _marked(self) -> list[tuple[int, list[bytes]]]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            # Ended meanwhile, or not ours.
            with contextlib.suppress(OSError):
                environment = (folder / "environ").read_bytes().split(b"\0")
                if self._mark in environment:
                    found.append((int(folder.name), environment))
        return found

    def require_nothing_left(self, seconds: float = PATIENCE) -> None:
        """Wait until all processes of the run are gone.

        Raises:
            AssertionError: one is still there; shows the output.
        """
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, f"left behind: {left}\n{self.output()[-3000:]}"
            time.sleep(0.1)

    def output(self) -> str:
        """Return the output so far."""
        self._output.seek(0)
        return self._output.read()


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
