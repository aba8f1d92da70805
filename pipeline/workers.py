"""Run numbered tasks on child processes, MPI ranks or srun tasks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import DiffembedError, explain_os_error, say_error
from pipeline.files import write_text

Task = Callable[[int], None]
# Set for its ranks by every launcher that brings an MPI with it.
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
_POLL_SECONDS = 0.05
# Number of this process among the children of one `Alone`, and how many they are.
_number, _num_children = 0, 1


def _begin_child(counter: Any, num_children: int) -> None:
    """Take a number, and end with the parent."""
    global _number, _num_children
    with counter.get_lock():
        _number = counter.value
        counter.value += 1
    _num_children = num_children
    # A killed parent cannot end its children; without this they would hold their GPUs for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def child_number() -> int:
    """Number of this process among the children that share its work; 0 where there are none."""
    return _number


def num_children() -> int:
    """How many children share the work and the cores of this machine; 1 where there are none."""
    return _num_children


class Crew(Protocol):
    """Runs tasks that need not know who else runs any."""

    is_main: bool

    def run(
        self,
        work: Task,
        outputs: Sequence[Path],
        *,
        claims: Path,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        """Call `work(k)` for every k whose output is missing; return when all are done.

        Args:
            work: does one task.
            outputs: files whose existence means that a task is done.
            claims: a folder, shared by all who run tasks.
            tell: called after each task that this process did or waited for.
        """

    def wait(self) -> None:
        """Wait until every rank has come here."""


class Alone:
    """One process and, where there is enough to do, a pool of its children."""

    is_main = True

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None

    def run(
        self,
        work: Task,
        outputs: Sequence[Path],
        *,
        claims: Path,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        """See `Crew.run`; no claims are needed."""
        missing = [k for k, output in enumerate(outputs) if not output.exists()]
        for _ in self.each(work, missing):
            tell()

    def each(self, work: Task, tasks: Sequence[int]) -> Iterator[int]:
        """Call `work` for all tasks, begun in their order; yield each one when it is done.

        Raises:
            DiffembedError: a child was killed.
        """
        if min(len(tasks), self._num_workers) <= 1:
            for task in tasks:
                work(task)
                yield task
            return
        if self._pool is None:
            # A forked child would inherit the locks of the tokenizer's and Arrow's threads.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self._num_workers,
                mp_context=context,
                initializer=_begin_child,
                initargs=(context.Value("i", 0), self._num_workers),
            )
        futures = {self._pool.submit(work, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool as error:
            raise DiffembedError(
                "a worker process was killed, perhaps for memory; run the same command again to "
                "continue, with fewer processes or smaller blocks"
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


class _Claiming(ABC):
    """Ranks who claim tasks by creating files: a quick one does more."""

    def run(
        self,
        work: Task,
        outputs: Sequence[Path],
        *,
        claims: Path,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        """See `Crew.run`."""
        for task, output in enumerate(outputs):
            if not output.exists() and _claim(claims / f"{task:06d}"):
                work(task)
                tell()
        self.wait()

    @abstractmethod
    def wait(self) -> None:
        """See `Crew.wait`."""


class MpiRanks(_Claiming):
    """The ranks of an MPI job."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.is_main = communicator.Get_rank() == 0

    def wait(self) -> None:
        """See `Crew.wait`."""
        self._communicator.Barrier()


class StepTasks(_Claiming):
    """The tasks of an `srun` step without MPI, who meet through files in a shared folder."""

    def __init__(self, rank: int, world_size: int, folder: Path) -> None:
        self.is_main = rank == 0
        self._rank, self._world_size, self._folder = rank, world_size, folder
        self._meetings = 0

    def wait(self) -> None:
        """See `Crew.wait`."""
        meeting = self._folder / f"{self._meetings:06d}"
        self._meetings += 1
        write_text(meeting / str(self._rank), "")
        while sum(path.name.isdigit() for path in meeting.glob("*")) < self._world_size:
            if (self._folder / "failed").exists():
                raise DiffembedError("another task of this step failed; see its message")
            if not self._folder.exists():
                return  # the main task saw all of the last meeting and has left
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """After the last meeting: remove its traces."""
        if self.is_main:
            shutil.rmtree(self._folder)

    def fail(self) -> None:
        """Tell the others that they wait in vain."""
        write_text(self._folder / "failed", str(self._rank))


def _claim(path: Path) -> bool:
    """Whether this process is the one that made the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def gather_crew(num_workers: int | None, *, meeting_folder: Path) -> Iterator[Crew]:
    """The crew this process was started with; an error of one of its ranks ends all of them.

    Args:
        num_workers: processes of a crew that no launcher started; all cores by default.
        meeting_folder: where tasks of `srun` meet; the folder's parent must be shared.
    """
    # Parallel over processes; each tokenizer must not take all cores again.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if any(name in os.environ for name in _MPI_VARIABLES):
        with _mpi_ranks() as ranks:
            yield ranks
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        # A requeued job has its old number; what its killed step left must not be met again.
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        step = "-".join(os.environ.get(name, "0") for name in names)
        tasks = StepTasks(
            int(os.environ["SLURM_PROCID"]),
            int(os.environ["SLURM_STEP_NUM_TASKS"]),
            meeting_folder.with_name(f"{meeting_folder.name}-{step}"),
        )
        try:
            yield tasks
        except BaseException:
            tasks.fail()
            raise
        tasks.close()
    else:
        with contextlib.closing(Alone(num_workers or num_cores())) as alone:
            yield alone


@contextlib.contextmanager
def _mpi_ranks() -> Iterator[MpiRanks]:
    from mpi4py import MPI

    try:
        yield MpiRanks(MPI.COMM_WORLD)
    except Exception as error:
        if MPI.COMM_WORLD.Get_size() == 1:
            raise
        # The others would wait for this rank until the job's time is over.
        explained = error if isinstance(error, DiffembedError) else explain_os_error(error)
        if explained:
            say_error(explained)
        else:
            traceback.print_exc()
            sys.stderr.flush()
        MPI.COMM_WORLD.Abort(explained.exit_code if explained else 1)


def num_cores() -> int:
    """Cores this process may use, fewer than the machine's under Slurm or taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
