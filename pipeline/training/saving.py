"""Saves that training waits for only as long as it takes to copy the state to host memory.

    a step boundary    every rank copies its share of the state to host memory     (collective)
    behind its back    each rank writes its file, reads it back, compares, hashes  (next steps run)
                       and waits, with a limit, for a disk that is full or away
    a later boundary   all have written: state.json, rename, then `latest`         (collective)

A rank whose write fails makes all ranks fail at that later boundary; the checkpoints before stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline import comm
from pipeline.errors import DiffembedError, MachineError, explain_os_error
from pipeline.files import write_sealed
from pipeline.run_dir import (
    LATEST,
    checkpoint_name,
    remove_unfinished,
    sync_dir,
    sync_file,
    write_latest,
)
from pipeline.training.checkpoint import FORMAT_VERSION, Stateful, describe_file

T = TypeVar("T")
# How long a checkpoint waits for a disk; less than ranks wait for each other.
PATIENCE_SECONDS = 900.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    """A checkpoint on its way to disk."""

    target: Path
    partial: Path
    description: dict[str, Any]  # state.json but for the files
    written: Future[tuple[str, dict[str, Any]]]  # this rank's file: its name, size and hash


class Saver:
    """Writes one checkpoint at a time; all ranks call `begin` and `finish` alike.

    Args:
        folder: the run's `checkpoints` folder, on a disk that all ranks share.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: _Pending | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint was begun and not finished; the same on all ranks."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank has still something to write; differs between ranks."""
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
            identity: what a resuming run must have in common (see `checkpoint.load`).
            extra: plain values that `checkpoint.load` hands back.
        """
        assert self._pending is None, "the save before this one is not finished"
        rank, world_size = comm.rank(), comm.world_size()
        target = self._folder / checkpoint_name(step)
        partial = self._folder / f".{target.name}.partial"
        share = {}
        for index, name in enumerate(engine.parameter_names):
            state = engine.gather_state(name)
            # Every rank takes part in the gather, one keeps the result: writing is shared out.
            if index % world_size == rank:
                for key, tensor in state.items():
                    share[f"{name}/{key}"] = tensor.detach().cpu().contiguous()
        path = partial / f"tensors-{rank:05d}-of-{world_size:05d}.safetensors"
        self._pending = _Pending(
            target=target,
            partial=partial,
            description={
                "format_version": FORMAT_VERSION,
                "step": step,
                "optimizer_steps": engine.optimizer_steps,
                "world_size": world_size,
                "identity": identity,
                "parameters": engine.parameter_names,
                "extra": extra or {},
            },
            written=self._thread.submit(patiently, lambda: _write(path, share), target),
        )

    def finish(self) -> Path:
        """Wait until all ranks have written, and let the checkpoint appear; a collective call.

        Raises:
            DiffembedError: some rank could not write, on all ranks alike.
        """
        pending, self._pending = self._pending, None
        assert pending is not None, "nothing to finish"
        error = pending.written.exception()
        outcomes = comm.all_gather_object(repr(error) if error else pending.written.result())
        faults = [f"rank {rank}: {o}" for rank, o in enumerate(outcomes) if isinstance(o, str)]
        if not faults and comm.rank() == 0:
            try:
                patiently(lambda: _publish(pending, dict(outcomes)), pending.target)
            except OSError as fault:
                faults = [repr(fault)]
        faults = comm.broadcast_object(faults)
        if faults:
            raise DiffembedError(
                f"{pending.target} could not be written ({'; '.join(faults)}); the checkpoints "
                f"before it are whole, run the same command to resume once this is mended"
            )
        return pending.target


def patiently(write: Callable[[], T], target: Path) -> T:
    """Return what `write` returns, repeated while the disk is full or away.

    The state to write is in memory, and training has the next steps to do meanwhile: a minute's
    fault of a disk costs nothing. What another path or other permissions would cure is not
    repeated.

    Args:
        write: may be called again after it failed.
        target: what is being written, for messages.
    """
    waited = 0.0
    for pause in itertools.chain((5.0, 10.0, 20.0), itertools.repeat(30.0)):
        try:
            return write()
        except Exception as error:
            explained = explain_os_error(error)
            if not isinstance(explained, MachineError) or waited >= PATIENCE_SECONDS:
                raise
            with contextlib.suppress(OSError):  # standard output may be on the same disk
                print(
                    f"{target.name} is not written yet ({explained}); trying again in {pause:.0f} "
                    f"s, for {(PATIENCE_SECONDS - waited) / 60:.0f} more minutes",
                    flush=True,
                )
        time.sleep(pause)
        waited += pause
    raise AssertionError("the pauses never end")


def remove_leftovers(folder: Path) -> None:
    """Delete what killed saves and deletions left; rank 0 only, while nobody saves."""
    for pattern in (".step-*.partial", ".step-*.deleted"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    remove_unfinished(folder / LATEST)


def _write(path: Path, share: dict[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Write this rank's tensors and compare what can be read back; its name, size and hash."""
    # What a partitioned parameter looks like where it was not gathered.
    if empty := [key for key, tensor in share.items() if not tensor.numel()]:
        raise ValueError(f"{empty[0]} is empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(share, path)
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


def _publish(pending: _Pending, files: dict[str, Any]) -> None:
    """Describe the files, and give the folder its name."""
    target, replaced = pending.target, pending.target.with_name(f".{pending.target.name}.deleted")
    if pending.partial.exists():  # not yet renamed by a call that failed after it
        write_sealed(pending.partial / "state.json", {**pending.description, "files": files})
        sync_dir(pending.partial)
        if target.exists():  # of a future that the run was taken back from
            target.rename(replaced)
        pending.partial.rename(target)
    sync_dir(target.parent)
    # Last: `latest` must never name a checkpoint that is not whole.
    write_latest(target)
    # What cannot be deleted now is a leftover of the next start.
    shutil.rmtree(replaced, ignore_errors=True)
