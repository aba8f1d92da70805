"""Checkpoint folders: names, latest, digest, verify, publish, prune."""

from __future__ import annotations

import hashlib
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from pipeline.config import CheckpointConfig
from pipeline.errors import UserError
from pipeline.files import check_kind, read_json, sync_dir, sync_file, unseal, write_text

# The file beside checkpoints that names the newest whole one.
LATEST = "latest"


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:06d}"


def checkpoint_step(name: str) -> int | None:
    """How many optimizer steps the checkpoint of this name holds; None for any other name."""
    found = re.fullmatch(r"step-(\d+)", name)
    return int(found[1]) if found else None


def checkpoint_digest(checkpoint: Path) -> str:
    """What tells a whole checkpoint from another of its name: its `state.json` hashes every file.

    A run that is taken back to an older checkpoint comes to the same names again.
    """
    return hashlib.sha256((checkpoint / "state.json").read_bytes()).hexdigest()[:16]


def read_latest(checkpoints: Path) -> str | None:
    """Name of the newest whole checkpoint of a folder, as `latest` says; None without one.

    Raises:
        UserError: `latest` holds no checkpoint's name.
    """
    pointer = checkpoints / LATEST
    if not pointer.exists():
        return None
    name = pointer.read_bytes().decode(errors="replace").strip()
    if checkpoint_step(name) is None:
        raise UserError(
            f"{pointer}: {name[:80]!r}",
            allowed="the name of a checkpoint beside it",
            fix=f"write one with `diffembed rewind {checkpoints.parent} NAME`",
        )
    return name


def write_latest(checkpoint: Path) -> None:
    """Let `latest` beside a whole checkpoint name it."""
    write_text(checkpoint.with_name(LATEST), checkpoint.name + "\n")


FORMAT_VERSION = 1


class State(TypedDict):
    """The content of `state.json`."""

    format_version: int
    step: int
    optimizer_steps: int
    world_size: int
    identity: dict[str, Any]
    parameters: list[str]
    extra: dict[str, Any]
    files: dict[str, dict[str, Any]]


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, if there is one.

    Raises:
        UserError: `latest` names a checkpoint that is not there.
    """
    name = read_latest(folder)
    if name is None:
        return None
    if not (folder / name).is_dir():
        raise UserError(
            f"{folder}/latest names {name}, which does not exist",
            allowed=", ".join(names(folder)) or "no checkpoint is left",
            fix=f"`diffembed rewind {folder.parent} NAME`, or delete {folder}/latest to start anew",
        )
    return folder / name


def steps_by_name(folder: Path) -> dict[str, int]:
    """How many steps each whole checkpoint holds, by its name, oldest first."""
    found = sorted(path.name for path in folder.glob("*"))
    return {name: step for name in found if (step := checkpoint_step(name)) is not None}


def names(folder: Path) -> list[str]:
    """Names of the whole checkpoints, oldest first."""
    return list(steps_by_name(folder))


def rewind(folder: Path, name: str) -> Path:
    """Let the run go on from an older checkpoint than its newest; nothing is deleted.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    if name not in names(folder):
        raise UserError(
            f"{folder}: no checkpoint {name!r}",
            allowed=", ".join(names(folder)) or "no checkpoint is left",
        )
    verify(folder / name)
    write_latest(folder / name)
    return folder / name


def read_state(path: Path) -> State:
    """Read and check a checkpoint's `state.json`.

    Raises:
        UserError: it is missing, damaged, or of a newer format.
    """
    file, fix = path / "state.json", _cure(path)
    tree = read_json(file, fix=fix)
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{path}: checkpoint format {version}",
            allowed=f"up to {FORMAT_VERSION}",
            fix="update diffembed",
        )
    return check_kind(unseal(tree, file, fix=fix), State, where=str(file), fix=fix)


def verify(path: Path, part: slice = slice(None)) -> State:
    """Check every file of a checkpoint by size and SHA-256; returns its state.

    Args:
        path: the checkpoint.
        part: which files to check, in the order of their names, where processes share the work.

    Raises:
        UserError: names the first file that is missing or damaged.
    """
    state = read_state(path)
    for name in sorted(state["files"])[part]:
        if not (path / name).is_file():
            raise damaged_checkpoint(path, f"{name} is missing")
        if describe_file(path / name) != state["files"][name]:
            raise damaged_checkpoint(path, f"{name} differs from its recorded size or SHA-256")
    return state


def damaged_checkpoint(path: Path, what: str) -> UserError:
    """The error that names a damaged checkpoint and the way to continue without it."""
    return UserError(f"checkpoint {path}: {what}", fix=_cure(path))


def _cure(path: Path) -> str:
    older = [name for name in names(path.parent) if name < path.name]
    if older:
        return f"`diffembed rewind {path.parent.parent} {older[-1]}` to continue from an older one"
    return "train again in another output_dir"


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def prune(folder: Path, config: CheckpointConfig, *, step: int) -> None:
    """Delete checkpoints past their time.

    Args:
        folder: of checkpoints.
        config: the newest `keep_last` stay, and every multiple of `keep_every`.
        step: of the newest. Later ones are of a future that the run was taken back from; the run
            replaces them when it comes to them again.
    """
    steps = steps_by_name(folder)
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
    verify(partial)
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
        newest = latest(self._folder)
        lasting = self._config.keep_every and step % self._config.keep_every == 0
        if newest != path and not lasting:
            return  # the mirror is slower than the run: a newer one waits
        try:
            copy(path, mirror)
            prune(mirror, self._config, step=step)
        except (OSError, shutil.Error, UserError) as error:
            # No reason to end the run: the checkpoint itself is whole.
            print(f"{path.name} could not be copied to {mirror} ({error})", flush=True)
