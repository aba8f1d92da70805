"""Run commands as a user would, from one process that has imported the slow libraries already."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import pkgutil
import runpy
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Imports take most of a command's time.
LIBRARIES = (
    *("torch", "torch.distributed", "transformers", "deepspeed", "peft", "datasets"),
    *("pyarrow.parquet", "pydantic", "typer", "mteb", "matplotlib.pyplot", "fsspec", "yaml"),
)
# Nothing that a result could depend on is left to the machine.
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)},
    **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120", "NO_COLOR": "1"},
    **{"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TERM": "dumb", "LC_ALL": "C.UTF-8"},
}


def import_libraries() -> None:
    """Set the environment, for children too, and import what they would, wherever it lies."""
    os.environ.update(ENVIRONMENT)
    sys.path.insert(0, str(ROOT))
    for name in LIBRARIES:
        importlib.import_module(name)
    for package in ("pipeline", "ReasonAug"):
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    # A process that has started MPI must not fork.
    assert "mpi4py.MPI" not in sys.modules


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    stdout: str
    stderr: str


class Command:
    """A command that runs in a child, with `folder` as its working directory.

    Args:
        folder: the working directory.
        words: `diffembed ...`, `ReasonAug ...` (as `python -m`), or `train ...`
            (as `python pipeline/train.py`).
        environment: variables in addition to this process's.
    """

    def __init__(
        self, folder: Path, words: Sequence[str], environment: dict[str, str] | None = None
    ) -> None:
        number = len(list(folder.glob("output/*.out")))
        name = folder / "output" / f"{number:04d}"
        name.parent.mkdir(exist_ok=True)
        self._files = (name.with_suffix(".out"), name.with_suffix(".err"))
        for file in self._files:
            file.touch()
        self._process: ForkProcess = multiprocessing.get_context("fork").Process(
            target=_run, args=(folder, tuple(words), environment or {}, *self._files)
        )
        self._process.start()

    @property
    def is_alive(self) -> bool:
        """True until it ends."""
        return self._process.is_alive()

    def kill(self) -> None:
        """End it as a node's failure would, with the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)

    def wait(self, seconds: float = 300) -> Outcome:
        """Wait for its end, and kill it if it takes longer."""
        self._process.join(seconds)
        if self._process.is_alive():
            self.kill()
            self._process.join()
        texts = [file.read_text(errors="replace") for file in self._files]
        return Outcome(self._process.exitcode or 0, *texts)


def _run(
    folder: Path, words: tuple[str, ...], environment: dict[str, str], out: Path, err: Path
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 -- until the process ends
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    # Its second execution, as __main__, is meant.
    warnings.filterwarnings("ignore", "'pipeline.cli' found in sys.modules", RuntimeWarning)
    program, *arguments = words
    sys.argv = [program, *arguments]
    if program == "train":
        sys.path.insert(0, "")  # which a script's own folder would be, and the script replaces
        runpy.run_path(str(ROOT / "pipeline" / "train.py"), run_name="__main__")
    else:
        module = "pipeline.cli" if program == "diffembed" else program
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def begin_ranks(folder: Path, words: Sequence[str], world_size: int) -> list[Command]:
    """Start a command as the ranks of one job, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    return [
        Command(folder, words, {**common, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]
