"""Which checkpoints stay, and their copies on slower storage."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pipeline.config import CheckpointConfig
from pipeline.errors import UserError
from pipeline.run_dir import sync_dir, sync_file, write_latest
from pipeline.training import checkpoint


def prune(folder: Path, config: CheckpointConfig, *, step: int) -> None:
    """Delete checkpoints past their time.

    Args:
        folder: of checkpoints.
        config: the newest `keep_last` stay, and every multiple of `keep_every`.
        step: of the newest. Later ones are of a future that the run was taken back from; the run
            replaces them when it comes to them again.
    """
    steps = checkpoint.steps_by_name(folder)
    past = [name for name, number in steps.items() if number <= step]
    for name in past[: -config.keep_last]:
        if config.keep_every and steps[name] % config.keep_every == 0:
            continue
        # Renamed first, so that a kill in the middle leaves no half checkpoint under its name.
        doomed = folder / f".{name}.deleted"
        (folder / name).rename(doomed)
        shutil.rmtree(doomed)


def copy(path: Path, mirror: Path) -> None:
    """Copy a whole checkpoint to a folder of the same layout; it appears there by rename too.

    Raises:
        UserError: what arrived differs from what was sent.
    """
    partial, target = mirror / f".{path.name}.partial", mirror / path.name
    shutil.rmtree(partial, ignore_errors=True)  # of a killed copy
    shutil.copytree(path, partial)
    for file in partial.iterdir():
        sync_file(file)
    checkpoint.verify(partial)
    shutil.rmtree(target, ignore_errors=True)  # of a future that the run was taken back from
    partial.rename(target)
    sync_dir(mirror)
    write_latest(target)


class Keeper:
    """Prunes and mirrors behind the back of training, one thing at a time; rank 0 only.

    Args:
        folder: the run's checkpoints.
        config: what to keep, and where to.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self._folder, self._config = folder, config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keep")
        self._last: Future[None] | None = None

    def keep(self, path: Path, step: int) -> None:
        """See to a new whole checkpoint; returns at once."""
        self._last = self._thread.submit(self._keep, path, step)

    def wait(self) -> None:
        """Wait until all is done."""
        if self._last is not None:
            self._last.result()

    def _keep(self, path: Path, step: int) -> None:
        # Pruning comes after the copy, so that it never deletes what is being copied.
        if self._config.mirror is not None:
            self._copy(path, step, self._config.mirror)
        try:
            prune(self._folder, self._config, step=step)
        except OSError as error:
            print(f"{self._folder}: old checkpoints could not be deleted ({error})", flush=True)

    def _copy(self, path: Path, step: int, mirror: Path) -> None:
        there = mirror / path.name / "state.json"
        if there.exists() and there.read_bytes() == (path / "state.json").read_bytes():
            return
        newest = checkpoint.latest(self._folder)
        lasting = self._config.keep_every and step % self._config.keep_every == 0
        if newest != path and not lasting:
            return  # the mirror is slower than the run: a newer one waits
        try:
            copy(path, mirror)
            prune(mirror, self._config, step=step)
        except (OSError, shutil.Error, UserError) as error:
            # No reason to end the run: the checkpoint itself is whole.
            print(f"{path.name} could not be copied to {mirror} ({error})", flush=True)
