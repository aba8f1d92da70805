"""Run numbered tasks on child processes, MPI ranks or srun tasks.

    started by                 workers         tasks are given out by
    nothing (one process)      LocalWorkers    a pool of child processes
    mpirun                     MpiWorkers      claim files; barriers are MPI's
    srun without MPI           SrunWorkers     claim files; barriers are files, too

A task is done when its output file exists. Every process that was started calls the same functions
in the same order; `run` and `barrier` return once all of them have arrived.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.errors import DiffembedError, explain_os_error, say_error
from pipeline.files import hold_lock, require_writable, write_text

Task = Callable[[int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")
# Every launcher that brings an MPI sets one of these for its ranks.
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
_POLL_SECONDS = 0.05


class Workers(Protocol):
    """The processes that share a list of tasks; `is_main` is true in exactly one of them."""

    is_main: bool

    def run(
        self,
        work: Task,
        outputs: Sequence[Path],
        *,
        claims: Path,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        """Call `work(k)` for every k whose output is missing; return when all are done.

        Args:
            work: does one task.
            outputs: files whose existence means that a task is done.
            claims: a folder that all workers share.
            on_done: called after each task that this process did or waited for.
        """

    def barrier(self) -> None:
        """Wait until every worker has called this."""


@contextlib.contextmanager
def open_workers(num_workers: int | None, *, rendezvous: Path) -> Iterator[Workers]:
    """Yield the workers this process was started with; an error in one of them ends them all.

    Args:
        num_workers: child processes where no launcher started this one; all cores by default.
        rendezvous: prefix of the folder through which tasks of `srun` wait for each other; its
            parent must be shared.
    """
    # The work is spread over processes; each tokenizer must not take all cores again.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Before Slurm's variables, which the ranks of `mpirun` and of `srun --mpi` have too.
    if any(name in os.environ for name in _MPI_VARIABLES):
        with _open_mpi() as ranks:
            yield ranks
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        # A requeued job keeps its number, and must not find the files of its killed step.
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        step = "-".join(os.environ.get(name, "0") for name in names)
        tasks = SrunWorkers(
            int(os.environ["SLURM_PROCID"]),
            int(os.environ["SLURM_STEP_NUM_TASKS"]),
            rendezvous.with_name(f"{rendezvous.name}-{step}"),
        )
        try:
            yield tasks
        except BaseException:
            tasks.fail()
            raise
        # Not after an error: the others must still find the file that says so.
        tasks.close()
    else:
        with contextlib.closing(LocalWorkers(num_workers or num_cores())) as local:
            yield local


@contextlib.contextmanager
def build_alone(
    target: Path,
    *,
    key: str,
    num_workers: int | None,
    is_done: Callable[[], bool],
    start: Callable[[], None],
    say: Callable[[str], None],
) -> Iterator[Workers]:
    """Yield the workers that build a folder next to `target`, for which one of them keeps a lock.

    Of several calls for one folder, one works and the others wait for it.

    Args:
        target: the folder's final name.
        key: the config key that names it, for messages.
        num_workers: see `open_workers`.
        is_done: called by the main worker; after True no lock is taken and `start` is not called.
        start: called by the main worker under the lock, before the others continue; does nothing if
            another process has finished the folder while this one waited for the lock.
        say: prints a line about waiting.

    Raises:
        UserError: nothing can be written next to the folder.
    """
    rendezvous = target.with_name(f".{target.name}.step")
    with (
        open_workers(num_workers, rendezvous=rendezvous) as workers,
        contextlib.ExitStack() as stack,
    ):
        # Asked first: a finished folder may be on a read-only disk, where no lock can be held.
        if workers.is_main and not is_done():
            require_writable(target.parent, key=key)
            lock = target.with_name(f".{target.name}.lock")
            tell = "waiting for another process that writes this folder ({})"
            stack.enter_context(hold_lock(lock, tell=lambda holder: say(tell.format(holder))))
            start()
        # The others must not look for a plan before it is there, nor leave before the rename.
        workers.barrier()
        yield workers
        workers.barrier()


class LocalWorkers:
    """This process and, where there is enough to do, a pool of child processes.

    Args:
        num_workers: the most child processes.
        imports: slow modules that the tasks import themselves, in addition to their own module.
    """

    is_main = True

    def __init__(self, num_workers: int, *, imports: Sequence[str] = ()) -> None:
        self._num_workers, self._imports = num_workers, imports
        self._pool: ProcessPoolExecutor | None = None

    def run(
        self,
        work: Task,
        outputs: Sequence[Path],
        *,
        claims: Path,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        """See `Workers.run`; the pool gives out the tasks, so that `claims` is not used."""
        missing = [k for k, output in enumerate(outputs) if not output.exists()]
        for _ in self.each(work, missing):
            on_done()

    def each(
        self, work: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Call `work` for all items, started in their order; yield each with its result when done.

        Raises:
            DiffembedError: a child was killed.
        """
        if min(len(items), self._num_workers) <= 1:
            for item in items:
                yield item, work(item)
            return
        if self._pool is None:
            self._pool = self._start_pool([_module_of(work), *self._imports])
        futures = {self._pool.submit(work, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise DiffembedError(
                "a worker process was killed, perhaps for memory; run the same command again to "
                "continue, with fewer processes or smaller blocks"
            ) from error
        finally:
            # After an error or a caller that stopped asking, tasks that wait must not start.
            for future in futures:
                future.cancel()

    def _start_pool(self, imports: list[str]) -> ProcessPoolExecutor:
        context = _context(imports)
        return ProcessPoolExecutor(
            self._num_workers,
            mp_context=context,
            initializer=_start_child,
            initargs=(context.Value("i", 0), self._num_workers, dict(os.environ)),
        )

    def barrier(self) -> None:
        """Return at once: this is the only process that was started."""

    def close(self) -> None:
        """End the children."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _context(imports: list[str]) -> BaseContext:
    """Return the way to start children.

    They are forked from a server that has only imported modules, which takes seconds: a fork of
    this process would inherit the locks of the threads of torch, Arrow and the tokenizer. Where
    there are GPUs, each child imports for itself, because imports may look at the devices, and no
    fork of a process that has done so can use one.
    """
    torch = sys.modules.get("torch")
    # The server's socket is in the folder of temporary files; its path may have about 100 bytes.
    if (torch is not None and torch.cuda.is_available()) or len(tempfile.gettempdir()) > 60:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The first pool of a process starts the server; what it lacks, its children import.
    context.set_forkserver_preload(imports)
    return context


def _module_of(work: Callable[..., object]) -> str:
    while isinstance(work, functools.partial):
        work = work.func
    return work.__module__


# Set in the children of a `LocalWorkers`: this child's number among them, and how many there are.
_child_number, _num_children = 0, 1


def _start_child(counter: Any, num_children: int, environment: dict[str, str]) -> None:
    """Take a number and the parent's environment, and make sure that this child ends with it."""
    global _child_number, _num_children
    # A fork server has kept the environment it was started with.
    os.environ.clear()
    os.environ.update(environment)
    with counter.get_lock():
        _child_number = counter.value
        counter.value += 1
    _num_children = num_children
    # A killed parent cannot end its children; without this they would hold their GPUs forever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def child_number() -> int:
    """Return this process's number among the children of its parent; 0 in the parent itself."""
    return _child_number


def num_children() -> int:
    """Return how many children share the cores of this machine; 1 in a process without siblings."""
    return _num_children


class _ClaimingWorkers(ABC):
    """Processes that claim tasks by creating files, so that a fast one does more of them."""

    def run(
        self,
        work: Task,
        outputs: Sequence[Path],
        *,
        claims: Path,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        """See `Workers.run`."""
        # Every worker walks the whole list, and the claim decides who does a task: no worker has to
        # know how fast the others are.
        for task, output in enumerate(outputs):
            if not output.exists() and _claim(claims / f"{task:06d}"):
                work(task)
                on_done()
        self.barrier()

    @abstractmethod
    def barrier(self) -> None:
        """See `Workers.barrier`."""


def _claim(path: Path) -> bool:
    """Create the file; return False if another process created it first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


class MpiWorkers(_ClaimingWorkers):
    """The ranks of an MPI job."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.is_main = communicator.Get_rank() == 0

    def barrier(self) -> None:
        """See `Workers.barrier`."""
        self._communicator.Barrier()


@contextlib.contextmanager
def _open_mpi() -> Iterator[MpiWorkers]:
    from mpi4py import MPI

    try:
        yield MpiWorkers(MPI.COMM_WORLD)
    except Exception as error:
        if MPI.COMM_WORLD.Get_size() == 1:
            raise
        # The other ranks would wait for this one until the job's time limit.
        explained = error if isinstance(error, DiffembedError) else explain_os_error(error)
        if explained:
            say_error(explained)
        else:
            traceback.print_exc()
            sys.stderr.flush()
        MPI.COMM_WORLD.Abort(explained.exit_code if explained else 1)


class SrunWorkers(_ClaimingWorkers):
    """The tasks of an `srun` step without MPI, which wait for each other by files in a folder."""

    def __init__(self, rank: int, world_size: int, folder: Path) -> None:
        self.is_main = rank == 0
        self._rank, self._world_size, self._folder = rank, world_size, folder
        self._num_barriers = 0

    def barrier(self) -> None:
        """See `Workers.barrier`."""
        # A folder for each barrier: a fast task may be at the next before a slow one has looked.
        arrived = self._folder / f"{self._num_barriers:06d}"
        self._num_barriers += 1
        write_text(arrived / str(self._rank), "")
        # By digits, because a file that is still being written has another name.
        while sum(path.name.isdigit() for path in arrived.glob("*")) < self._world_size:
            if (self._folder / "failed").exists():
                raise DiffembedError("another task of this step failed; see its message")
            if not self._folder.exists():
                return  # the main task saw everyone arrive at the last barrier, and has left
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Remove the folder; called after the last barrier."""
        if self.is_main:
            shutil.rmtree(self._folder)

    def fail(self) -> None:
        """Tell the other tasks that this one will never arrive."""
        write_text(self._folder / "failed", str(self._rank))


def num_cores() -> int:
    """Return the cores this process may use: under Slurm or taskset fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_ahead(items: Iterable[Item], *, thread_name: str) -> Iterator[Item]:
    """Yield the items; a thread makes the next one while the caller uses the last one.

    None ends them.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix=thread_name) as thread:
        upcoming: Future[Item | None] = thread.submit(next, remaining, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, remaining, None)
            yield item
