"""Save and restore checkpoints, complete or not at all, on any number of ranks.

    checkpoints/step-000020/state.json                     step, sizes and SHA-256 of every file
                            tensors-00000-of-00002.safetensors   rank 0's share of the tensors
    checkpoints/latest                                     name of the newest complete checkpoint

`run_folder.py` knows the folder; this file knows the tensors. They are stored whole, by
parameter name: weight, exp_avg and exp_avg_sq in fp32. A checkpoint therefore does not depend on
the ZeRO stage or the world size that wrote it, and frozen weights (LoRA's base) are not in it.
Dropout masks and data order are functions of (seed, step, rank), so there is no other state to
save.

    a step boundary    every rank copies its share of the state to host memory     (collective)
    in the background  each rank writes its file, reads it back, compares, hashes  (next steps run)
                       and waits, with a limit, for a disk that is full or unreachable
    a later boundary   all have written: state.json, rename, then `latest`         (collective)

A rank whose write fails makes all ranks fail at that later boundary; the checkpoints before stay.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline import comm
from pipeline.errors import DiffembedError, MachineError, UserError, explain_os_error, say_line
from pipeline.files import sync_file
from pipeline.run_folder import (
    State,
    checkpoint_name,
    damaged_checkpoint,
    describe_file,
    partial_folder,
    publish_checkpoint,
    read_state,
    verify_checkpoint,
)
from pipeline.training.run_identity import require_same_run

T = TypeVar("T")
# AdamW's moments, by torch's names.
MOMENTS = ("exp_avg", "exp_avg_sq")
# Tensors stored for each parameter.
KEYS = ("weight", *MOMENTS)
# Name of the matrix of `loss.projection`, which is no parameter of the model.
PROJECTION = "loss.projection"
# A checkpoint waits this long for a disk; less than ranks wait for each other.
PATIENCE_SECONDS = 900.0
# And this long after a request to stop: a scheduler kills the process seconds later.
HURRIED_SECONDS = 5.0


class Stateful(Protocol):
    """The part of an engine that a checkpoint uses."""

    @property
    def parameter_names(self) -> list[str]:
        """Names of the trainable parameters, the same on every rank."""

    @property
    def optimizer_steps(self) -> int:
        """The number of updates that the optimizer has made."""

    def share_state(self, name: str) -> dict[str, torch.Tensor]:
        """Return this rank's flat elements of a parameter's state, by key, on its device."""

    def prepare_restore(self, optimizer_steps: int) -> None:
        """Allocate state to restore into."""

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole parameter."""

    def share_of(self, name: str) -> range:
        """Return the flat elements of a parameter whose state this rank keeps."""

    def restore_state(self, name: str, share: dict[str, torch.Tensor]) -> None:
        """Restore this rank's elements of a parameter's state."""

    def finish_restore(self) -> None:
        """Use the restored state from now on; a collective call."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    """A checkpoint on its way to disk."""

    target: Path
    description: dict[str, Any]  # see `run_folder.publish_checkpoint`
    written: Future[tuple[str, dict[str, Any]]]  # this rank's file: its name, size and hash


class Saver:
    """Writes one checkpoint at a time; all ranks call `begin` and `finish` together.

    Args:
        folder: the run's `checkpoints` folder, on a disk that all ranks share.
        in_a_hurry: returns True once the run is asked to stop; a disk that stays full is then
            waited for no longer.
    """

    def __init__(self, folder: Path, *, in_a_hurry: Callable[[], bool] = lambda: False) -> None:
        self._folder, self._in_a_hurry = folder, in_a_hurry
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: _Pending | None = None

    @property
    def is_pending(self) -> bool:
        """True between `begin` and `finish`; the same on all ranks."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """True while this rank is writing; differs between ranks."""
        return self._pending is not None and not self._pending.written.done()

    def begin(
        self,
        engine: Stateful,
        *,
        step: int,
        identity: dict[str, Any],
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Copy the state after `step` optimizer steps and start to write it; a collective call.

        Args:
            engine: what to save.
            step: finished optimizer steps; the next one to run.
            identity: values that a resuming run must share (see `load`).
            extra: plain values that `load` returns.
        """
        assert self._pending is None, "the save before this one is not finished"
        rank, world_size = comm.rank(), comm.world_size()
        target = self._folder / checkpoint_name(step)
        share = gather_own(engine)
        path = partial_folder(target) / f"tensors-{rank:05d}-of-{world_size:05d}.safetensors"
        self._pending = _Pending(
            target=target,
            description={
                "step": step,
                "optimizer_steps": engine.optimizer_steps,
                "world_size": world_size,
                "identity": identity,
                "parameters": engine.parameter_names,
                "extra": extra or {},
            },
            written=self._thread.submit(
                patiently, lambda: _write(path, share), target, in_a_hurry=self._in_a_hurry
            ),
        )

    def finish(self) -> Path:
        """Wait until all ranks have written, then publish the checkpoint; a collective call.

        Raises:
            DiffembedError: some rank could not write; raised on all ranks.
        """
        pending, self._pending = self._pending, None
        assert pending is not None, "nothing to finish"
        # A rank that raised here alone would leave the others in the gather.
        error = pending.written.exception()
        # A string is a fault, a pair is a file.
        outcomes = comm.all_gather_object(repr(error) if error else pending.written.result())
        faults = [f"rank {rank}: {o}" for rank, o in enumerate(outcomes) if isinstance(o, str)]
        if not faults and comm.rank() == 0:
            try:
                patiently(
                    lambda: publish_checkpoint(pending.target, pending.description, dict(outcomes)),
                    pending.target,
                    in_a_hurry=self._in_a_hurry,
                )
            except OSError as fault:
                faults = [repr(fault)]
        # The fault of rank 0 alone, when it published, must reach the others too.
        faults = comm.broadcast_object(faults)
        if faults:
            raise DiffembedError(
                f"{pending.target} could not be written ({'; '.join(faults)}); the checkpoints "
                f"before it are complete, run the same command to resume once this is repaired"
            )
        return pending.target


def gather_own(engine: Stateful) -> dict[str, torch.Tensor]:
    """Return the tensors that this rank writes, whole, in host memory; a collective call.

    Rank r writes every W-th parameter from the r-th, where W is the number of ranks. Of W
    parameters at a time, each rank sends every other rank its elements of the one that this other
    rank writes. So a rank sends and receives 12 / W bytes a parameter, and its device holds one
    whole tensor, its own, next to the elements that it sends.
    """
    names, rank, world_size = engine.parameter_names, comm.rank(), comm.world_size()
    # (W, P) elements of each parameter, by the rank that keeps them.
    counts = comm.all_gather_object([len(engine.share_of(name)) for name in names])
    own = {}
    for first in range(0, len(names), world_size):
        group = names[first : first + world_size]
        states = [engine.share_state(name) for name in group]
        mine = first + rank
        for key in KEYS:
            sent = [state[key] for state in states]
            # Ranks without a parameter in the last group receive nothing.
            sent += [sent[0][:0]] * (world_size - len(group))
            sizes = [count[mine] if mine < len(names) else 0 for count in counts]
            whole = comm.exchange(sent, sizes)
            if mine < len(names):
                own[f"{names[mine]}/{key}"] = whole.reshape(engine.shape_of(names[mine])).cpu()
    return own


def patiently(
    write: Callable[[], T], target: Path, *, in_a_hurry: Callable[[], bool] = lambda: False
) -> T:
    """Call `write` until it succeeds, while the disk is full or unreachable; return its result.

    The state to write is in memory, and training runs its next steps meanwhile: a minute's fault
    of a disk costs nothing. Faults of paths and permissions are not retried.

    Args:
        write: may be called again after it failed.
        target: path to name in messages.
        in_a_hurry: returns True where there are only seconds left to wait.
    """
    waited = 0.0
    for pause in itertools.chain((5.0, 10.0, 20.0), itertools.repeat(30.0)):
        try:
            return write()
        except Exception as error:
            explained = explain_os_error(error)
            hurried = in_a_hurry()
            patience = HURRIED_SECONDS if hurried else PATIENCE_SECONDS
            if not isinstance(explained, MachineError) or waited >= patience:
                raise
            again = f"{pause:.0f} s, for {(patience - waited) / 60:.0f} more minutes"
            if hurried:
                again = f"a second, for {patience - waited:.0f} s: a stop is requested"
            say_line(f"{target.name} is not written yet ({explained}); trying again in {again}")
        # In steps of a second, because a request to stop may come meanwhile.
        for _ in range(round(pause)):
            time.sleep(1.0)
            waited += 1.0
            if in_a_hurry():
                break
    raise AssertionError("the pauses never end")


def _write(path: Path, share: dict[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Write this rank's tensors, read them back, compare; return the file's name, size and hash."""
    # A partitioned parameter that was not gathered is empty.
    if empty := [key for key, tensor in share.items() if not tensor.numel()]:
        raise ValueError(f"{empty[0]} is empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(share, path)
    # A published checkpoint must survive a power failure: its bytes go to the disk first.
    sync_file(path)
    with safe_open(path, framework="pt") as file:
        for key, tensor in share.items():
            written = file.get_tensor(key)
            # As bytes, in which a NaN equals itself.
            if not torch.equal(
                written.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)
            ):
                raise OSError(f"{path.name}: {key} was read back with other values")
    return path.name, describe_file(path)


def load(path: Path, engine: Stateful, identity: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Restore the engine; return the next step to run and `extra`. A collective call.

    Raises:
        UserError: the checkpoint is damaged or belongs to another run, on all ranks.
    """

    def check() -> State:
        state = read_state(path)
        require_same_run(path, state, identity)
        return state

    state = comm.on_main(check)
    # Each rank hashes a part of the files.
    with comm.together():
        verify_checkpoint(path, slice(comm.rank(), None, comm.world_size()))
    if odd := sorted(set(state["parameters"]) ^ set(engine.parameter_names)):
        raise UserError(
            f"checkpoint {path} and the model differ in {len(odd)} parameters, first {odd[0]}",
            fix="resume with the model section that the run started with",
        )
    with comm.together():
        _check_shapes(path, engine)
    # Nothing of the engine has changed so far: every refusal comes before this line.
    engine.prepare_restore(state["optimizer_steps"])
    for file, names in _parameters_by_file(path).items():
        with _open(path, file) as tensors:
            for name in names:
                # Of a file that another number of ranks wrote, only this rank's elements are read.
                elements = engine.share_of(name)
                share = {
                    key: read_share(tensors.get_slice(f"{name}/{key}"), elements) for key in KEYS
                }
                engine.restore_state(name, share)
    engine.finish_restore()
    return state["step"], state["extra"]


def _check_shapes(path: Path, engine: Stateful) -> None:
    """Compare the shapes of parameters, which flat elements no longer show.

    Raises:
        UserError: names the first one that differs.
    """
    for file, names in _parameters_by_file(path).items():
        with _open(path, file) as tensors:
            for name in names:
                found = tuple(tensors.get_slice(f"{name}/weight").get_shape())
                if found != engine.shape_of(name):
                    raise UserError(
                        f"checkpoint {path}: {name} has shape {list(found)}",
                        allowed=f"{list(engine.shape_of(name))}, as the model has",
                        fix="resume with the model section that the run started with",
                    )


def iterate_tensors(path: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield (parameter name, its whole state) in a fixed order; needs no engine."""
    for file, names in _parameters_by_file(path).items():
        with _open(path, file) as tensors:
            for name in names:
                yield name, {key: tensors.get_tensor(f"{name}/{key}") for key in KEYS}


def _parameters_by_file(path: Path) -> dict[str, list[str]]:
    """Return names of parameters by file, in an order that all ranks share."""
    found = {}
    for file in sorted(read_state(path)["files"]):
        with _open(path, file) as tensors:
            keys = tensors.keys()
            found[file] = list(dict.fromkeys(key.rpartition("/")[0] for key in keys))
    return found


@contextmanager
def _open(path: Path, file: str) -> Iterator[Any]:
    """Open a checkpoint's file of tensors.

    Raises:
        UserError: the file is damaged, also where a read inside the block finds it.
    """
    try:
        with safe_open(path / file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise damaged_checkpoint(path, f"{file} cannot be read ({error})") from error


def read_share(tensor: Any, elements: range) -> torch.Tensor:
    """Read flat elements of a tensor in a file, and little more of the file than these.

    Args:
        tensor: a slice as safetensors' `get_slice` returns it.
        elements: may be empty.
    """
    shape = tensor.get_shape()
    if not shape:  # a number, which has no rows
        return torch.as_tensor(tensor[...]).reshape(1)[elements.start : elements.stop]
    rows = covering_rows(shape, elements)
    read: torch.Tensor = tensor[rows.start : rows.stop].reshape(-1)
    before = rows.start * math.prod(shape[1:])  # elements of earlier rows
    return read[elements.start - before : elements.stop - before]


def equal_share(num_elements: int, *, rank: int, share: int) -> range:
    """Return the flat elements of one rank where every rank has room for `share` of them.

    Ranks beyond the last element get an empty range.
    """
    start = min(rank * share, num_elements)
    return range(start, min(start + share, num_elements))


def covering_rows(shape: Sequence[int], elements: range) -> range:
    """Return the rows, along the first dimension, that hold these flat elements."""
    width = math.prod(shape[1:])
    return range(elements.start // width, -(-elements.stop // width))
