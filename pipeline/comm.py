"""The process groups, and the few collectives of the pipeline; all work with one process.

    main group      NCCL or gloo    tensors: rows, gradients, weights
    control group   gloo            barriers, numbers to agree on, objects

NCCL ends a run whose rank waits longer than its timeout, but a rank may wait hours for another that
hashes or copies files. Waiting in the control group has its own limit, occupies no GPU, and fails
at once when a rank dies on another host, which NCCL does not notice.

A rank that fails alone tells the others through the store of the groups (`end_together`), so that
all end with the same line; no collective call could tell them.

A decision on one rank's own view must be made by all (`any_rank`, `together`, `on_main`): a rank
that leaves alone would keep the others waiting in their next collective.
"""

from __future__ import annotations

import datetime
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline import launch
from pipeline.errors import DiffembedError, UserError, explain_os_error, say_line
from pipeline.launch import World

T = TypeVar("T")

# Long enough to copy a 70B's checkpoint (840 GB) to a mirror at 100 MB/s and to read it back, 4.7
# hours, while the other ranks wait.
CONTROL_TIMEOUT = datetime.timedelta(hours=6)
# Also on CPUs, where the main group is gloo too: one set of rules, which tests can then check.
_control: dist.ProcessGroup | None = None
_main_timeout = datetime.timedelta(seconds=1800)
_failures: _Failures | None = None


def start(world: World, *, timeout_seconds: int = 1800) -> None:
    """Join the process groups: NCCL on GPUs, gloo elsewhere, and gloo for control.

    Args:
        world: this rank among the others.
        timeout_seconds: how long to wait for other ranks, here and in every collective call with
            tensors, also in groups that DeepSpeed makes (see `new_group`).

    Raises:
        UserError: this rank has no GPU, torch sees none where one was requested, DeepSpeed would
            compute on another device, or the address of rank 0 is unknown.
        DiffembedError: the ranks did not find each other.
    """
    if dist.is_initialized():
        return
    launch.require_launcher()
    # torch and DeepSpeed read these, whichever launcher set its own.
    os.environ["RANK"] = str(world.rank)
    os.environ["WORLD_SIZE"] = str(world.world_size)
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    launch.require_visible_gpu(visible=torch.cuda.is_available(), torch_version=torch.__version__)
    launch.require_accelerator(visible=torch.cuda.is_available())
    if torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if world.local_rank >= num_gpus:
            raise UserError(
                f"rank {world.rank}, number {world.local_rank} on its host, sees {num_gpus} GPUs",
                allowed="numbers from 0, one rank per GPU",
                fix="start fewer ranks per host, or let each see all GPUs (no --gpus-per-task)",
            )
        torch.cuda.set_device(world.local_rank)
    with launch.end_with_launcher(world.launchers):
        _join(world, timeout_seconds)


def _join(world: World, timeout_seconds: int) -> None:
    global _control, _main_timeout, _failures
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    _main_timeout = timeout = datetime.timedelta(seconds=timeout_seconds)
    if world.world_size == 1:
        # Without a port, which another process might have taken.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
        # DeepSpeed would look for missing variables through MPI.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        return
    address, port = launch.rendezvous()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    try:
        with _telling_of_a_long_wait(world, f"{address}:{port}"):
            dist.init_process_group(backend, timeout=timeout)
            _control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT, group_desc="control")
    except RuntimeError as error:
        # May be a node that died: not the user's mistake, and the next attempt may succeed.
        message = (
            f"rank {world.rank} of {world.world_size} did not reach the others at {address}:{port} "
            f"(MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]}"
        )
        if "EADDRINUSE" in str(error):
            message += (
                " | fix: another program has the port; wait for it, or take another: "
                "deepspeed --master_port N, torchrun --master-port N, MASTER_PORT=N elsewhere"
            )
        raise DiffembedError(message) from error
    _failures = _Failures(dist.distributed_c10d._get_default_store(), world)


# Rank 0 tells of a wait first: the others wait for it, and would all say the same.
_TELL_AFTER_SECONDS = (30.0, 120.0)


@contextmanager
def _telling_of_a_long_wait(world: World, where: str) -> Iterator[None]:
    """Print a line if the block takes long: the other ranks may never have been started."""
    text = (
        f"rank {world.rank} waits for the other ranks of {world.world_size} at {where}; where no "
        "launcher starts them, variables are left from another run: unset RANK, WORLD_SIZE, "
        "LOCAL_RANK (of srun SLURM_PROCID)"
    )
    timer = threading.Timer(_TELL_AFTER_SECONDS[world.rank > 0], say_line, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def new_group(ranks: Iterable[int]) -> dist.ProcessGroup:
    """Make a group for tensors with the main group's timeout; a collective call of all ranks.

    torch's default is 10 minutes, whatever the main group has.
    """
    group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=_main_timeout)
    return group


def device() -> torch.device:
    """Return the device on which this rank computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_name() -> str:
    """Return the name of this rank's GPU, or of the processor where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(device())
    return launch.processor_name()


def least_memory(world: World) -> float:
    """Return the bytes of the smallest GPU, or of a rank's share of RAM where there is none.

    A collective call once the group is joined: ranks that planned with different numbers would
    choose different schedules and wait for each other.
    """
    if torch.cuda.is_available():
        total = float(torch.cuda.get_device_properties(device()).total_memory)
    else:
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # Ranks of one host share its memory.
        total = ram / int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
    return _reduce_numbers((total,), "min")[0]


def peak_memory() -> float:
    """Return the most bytes this rank has held: on its GPU, or on the host where it has none."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    # Linux counts KiB.
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def rank() -> int:
    """Return this process's rank; 0 with one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks; 1 with one process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier(group=_control)


def all_reduce_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks in place; returns the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Return true on all ranks if it is true on one: the only safe way to use a rank's own view."""
    return bool(max_over_ranks(flag)[0])


def max_over_ranks(*values: float) -> list[float]:
    """Return the maximum over ranks of the first value, the second, ..., in one collective call."""
    return _reduce_numbers(values, "max")


def sum_over_ranks(*values: float) -> list[float]:
    """Return the sum over ranks of the first value, the second, ..., in one collective call."""
    return _reduce_numbers(values, "sum")


def _reduce_numbers(values: tuple[float, ...], op: str) -> list[float]:
    # In host memory, so that no agreement waits for a GPU. float64 holds counts and flags exactly.
    own = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if world_size() > 1:
        ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        dist.all_reduce(own, op=ops[op], group=_control)
    return [float(value) for value in own.tolist()]


@contextmanager
def together() -> Iterator[None]:
    """Make a block without collectives end the same way on all ranks; a collective call.

    A rank that left alone would keep the others waiting in the next collective.

    Raises:
        UserError: the block raised one on another rank.
        DiffembedError: the block raised something else on another rank.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    # A flag in one cheap collective; only after a failure do ranks exchange texts.
    if any_rank(error is not None):
        found = None if error is None else (isinstance(error, UserError), str(error))
        results = all_gather_object(found)
        if error is not None:
            raise error
        first, (by_user, text) = next((r, result) for r, result in enumerate(results) if result)
        raise UserError(text) if by_user else DiffembedError(f"rank {first}: {text}")


def all_gather_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Gather tensors that differ in their first dimension.

    Args:
        x: (B, ...) rows of this rank; B may differ per rank and may be 0.

    Returns:
        All rows in rank order (sum of B, ...), and the offset of this rank's first row.
    """
    if world_size() == 1:
        return x, 0
    count = torch.full((), x.shape[0], device=x.device)  # a copy from the host would wait too
    sizes: list[int] = all_gather_stack(count).tolist()  # waits for the GPU once
    # `all_gather` takes equal shapes only.
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: x.shape[0]] = x
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    rows = torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
    return rows, sum(sizes[: rank()])


def all_gather_stack(x: torch.Tensor) -> torch.Tensor:
    """Stack every rank's tensor of one common shape (...) in rank order: (world size, ...)."""
    if world_size() == 1:
        return x[None]
    parts = [torch.empty_like(x) for _ in range(world_size())]  # W x (...)
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)


def exchange(parts: list[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    """Send every rank its part; return a copy of what all ranks sent to this one, in rank order.

    Args:
        parts: flat tensors of one type, for each rank; may be empty.
        sizes: numbers of elements that each rank sends to this one.
    """
    sent = torch.cat(parts)
    if world_size() == 1:
        return sent
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [len(part) for part in parts])
    return received


def broadcast_(tensor: torch.Tensor, src: int) -> torch.Tensor:
    """Overwrite the tensor with rank `src`'s; returns it."""
    if world_size() > 1:
        dist.broadcast(tensor, src=src)
    return tensor


def reduce_(tensor: torch.Tensor, dst: int) -> torch.Tensor:
    """Sum over ranks into the tensor of rank `dst`; other ranks' content is undefined after."""
    if world_size() > 1:
        dist.reduce(tensor, dst=dst)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Return rank 0's picklable value on all ranks."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """Call the function on rank 0; return its result, or raise its error, on all ranks.

    Raises:
        DiffembedError: any error of this package, or of a disk; another one ends rank 0 alone.
    """
    outcome: T | DiffembedError | None = None
    if rank() == 0:
        try:
            outcome = function()
        except DiffembedError as error:
            outcome = error
        except Exception as error:
            # A bug: no rank can continue, and the launcher ends the others.
            if (outcome := explain_os_error(error)) is None:
                raise
    outcome = broadcast_object(outcome)
    if isinstance(outcome, DiffembedError):
        raise outcome
    return outcome


def all_gather_object(value: Any) -> list[Any]:
    """Return every rank's picklable value, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


class _Failures:
    """The first failure of any rank: a line in the store of the process groups, which ends all.

    Under NCCL the others would wait for a rank that has ended until their timeout. A thread reads
    the store; it makes no collective call.
    """

    _KEY, _SEEN = "diffembed/failed", "diffembed/failed/seen"

    def __init__(self, store: Any, world: World) -> None:
        self._store, self._world = store, world
        self._ending = threading.Lock()  # held by the thread of this process that ends it
        self._left = threading.Event()
        own = store.clone()  # the other one serves the main thread alone
        threading.Thread(target=self._watch, args=(own,), name="failures", daemon=True).start()

    def tell(self, line: str) -> str:
        """Give every rank this line, unless another one came first; return the first."""
        self._ending.acquire()  # never released: where the watcher has it, it ends this process
        line = f"rank {self._world.rank}: {line}"
        try:
            # Sets the line only where there is none; answers with the line that is there then.
            first: str = self._store.compare_set(self._KEY, "", line).decode()
            if first == line:
                self._outlast(self._store, self._world.world_size - 1)
        except RuntimeError:  # the store's process has ended
            return line
        return first

    def stop(self) -> None:
        """End no process any more."""
        self._left.set()

    def _outlast(self, store: Any, num_others: int) -> None:
        """Keep the process that may hold the store until the others have read the line."""
        for _ in range(100):  # 10 s at most: a rank that has ended already reads nothing
            if self._world.rank != 0 or store.add(self._SEEN, 0) >= num_others:
                return
            time.sleep(0.1)

    def _watch(self, store: Any) -> None:
        # All ranks ask one process: 512 times a second at most, however many they are.
        seconds = max(0.5, self._world.world_size / 512)
        with suppress(RuntimeError):  # the store's process has ended
            while not self._left.wait(seconds):
                if not store.check([self._KEY]):
                    continue
                line = store.get(self._KEY).decode()
                if self._ending.acquire(blocking=False):
                    say_line(line, file=sys.stderr)
                    store.add(self._SEEN, 1)
                    self._outlast(store, self._world.world_size - 1)
                    sys.stdout.flush()
                    os._exit(1)
                return


def end_together(line: str) -> str:
    """Tell all ranks that this one fails, so that they end too; return the line to end with.

    Args:
        line: the reason. If another rank failed first, its reason is returned instead, because it
            is usually what made this rank fail.
    """
    return line if _failures is None else _failures.tell(line)


def leave(code: int, *, gracefully: bool) -> None:
    """End this process with `code`.

    Skips the interpreter's finalisation: gloo's background thread can abort a finished process
    there, which a cluster would count as a failed job.

    Args:
        code: exit code.
        gracefully: wait for the other ranks first; false after a fault, when they may never come.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if not gracefully:
        os._exit(code)
    if dist.is_initialized():
        if _failures is not None:
            _failures.stop()
        barrier()
        dist.destroy_process_group()
    mpi = sys.modules.get("mpi4py.MPI")
    # mpirun reports failure when a rank that initialised MPI leaves without finalising it.
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
