"""Who does the tasks of a build: this process, a pool of its children, or the ranks of MPI."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import DiffembedError

Task = Callable[[int], None]

# Set for the ranks of a job by the launchers that bring an MPI with them.
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


class Crew(Protocol):
    """Runs tasks that need not know who else runs any."""

    is_main: bool

    def run(self, work: Task, outputs: Sequence[Path], *, claims: Path) -> None:
        """Call `work(k)` for every k whose output is missing; return when all are done."""

    def wait(self) -> None:
        """Wait until every rank has come here."""


class Alone:
    """One process and, where there is enough to do, a pool of its children."""

    is_main = True

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None

    def run(self, work: Task, outputs: Sequence[Path], *, claims: Path) -> None:
        """See `Crew.run`; no claims are needed."""
        missing = [k for k, output in enumerate(outputs) if not output.exists()]
        if min(len(missing), self._num_workers) <= 1:
            for task in missing:
                work(task)
            return
        if self._pool is None:
            # A forked child would inherit the locks of the tokenizer's and Arrow's threads.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._num_workers, mp_context=context)
        futures = [self._pool.submit(work, task) for task in missing]
        try:
            for future in as_completed(futures):
                future.result()
        except BrokenProcessPool as error:
            raise DiffembedError(
                "a worker process was killed, perhaps for memory; run the same command again to "
                "continue, with fewer workers or a smaller block_bytes"
            ) from error
        finally:
            for future in futures:
                future.cancel()

    def wait(self) -> None:
        """See `Crew.wait`: there is nobody to wait for."""

    def close(self) -> None:
        """End the children."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class Ranks:
    """The ranks of an MPI job, who claim tasks by creating files: a quick one does more."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.is_main = communicator.Get_rank() == 0

    def run(self, work: Task, outputs: Sequence[Path], *, claims: Path) -> None:
        """See `Crew.run`."""
        for task, output in enumerate(outputs):
            if not output.exists() and _claim(claims / f"{task:06d}"):
                work(task)
        self.wait()

    def wait(self) -> None:
        """See `Crew.wait`."""
        self._communicator.Barrier()


def _claim(path: Path) -> bool:
    """Whether this process is the one that made the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def gather_crew(num_workers: int | None) -> Iterator[Crew]:
    """The crew this process was started with.

    Inside MPI an error of one rank ends all of them with its exit code: the others would otherwise
    wait for it until the job's time is over.
    """
    # Parallel over processes; each tokenizer must not take all cores again.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not any(name in os.environ for name in _MPI_VARIABLES):
        alone = Alone(num_workers or _num_cores())
        try:
            yield alone
        finally:
            alone.close()
        return
    from mpi4py import MPI

    try:
        yield Ranks(MPI.COMM_WORLD)
    except Exception as error:
        if MPI.COMM_WORLD.Get_size() == 1:
            raise
        if isinstance(error, DiffembedError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
            sys.stderr.flush()
        MPI.COMM_WORLD.Abort(getattr(error, "exit_code", 1))


def _num_cores() -> int:
    """Cores this process may use, fewer than the machine's under Slurm or taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
