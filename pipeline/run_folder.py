"""Know the layout of a run's folder and its checkpoints; claim a run; describe the environment.

RUN/config.yaml         the resolved config, with a first line that marks it as a run's
    ds_config.json      the resolved DeepSpeed JSON
    environment.json    versions, machine, commit
    metrics.jsonl       one line per logged step; kinds.json explains its kinds of batches
    lock                held by the training that works on the run
    stop                exists while a stop is requested (`diffembed stop`)
    checkpoints/latest                  the name of the newest whole checkpoint
                step-000020/state.json  its step, and size and SHA-256 of every other file (sealed)
                step-000020/...         files of tensors, see training/checkpoints.py
                .step-000040.partial/   being written; renamed once it is whole
                .step-000010.deleted/   being deleted
    export/  results/  report/
    evaluations/        scores of checkpoints made during training, a folder like RUN per step
    jobs/               frozen configs; batch scripts and logs of Slurm jobs

A folder with a checkpoint's name is whole: it appears, and goes, by a rename. A mirror has the
layout of checkpoints/.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

# pydantic takes the TypedDict of `typing` from Python 3.12 on only.
from typing_extensions import TypedDict

from pipeline.config import CheckpointConfig, dump_config
from pipeline.errors import UserError, say_line
from pipeline.files import (
    check_kind,
    hash_file,
    read_json,
    remove_unfinished,
    short_hash,
    sign_lock,
    sync_dir,
    sync_file,
    try_lock,
    unseal,
    write_sealed,
    write_text,
)

# The first line of a run's config.yaml, which distinguishes it from a user's file of that name.
OWN_CONFIG = (
    "# The whole config of this run, resolved. Runs overwrite this file; change your own one.\n"
)
# Files of shards, of models and of adapters: a run among them would change what they are.
_OF_OTHERS = ("manifest.json", "config.json", "adapter_config.json", "model.safetensors")
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "mteb", "pyarrow")


class RunDir:
    """The paths in a run's folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.ds_config = self.root / "ds_config.json"
        self.environment = self.root / "environment.json"
        self.metrics = self.root / "metrics.jsonl"
        # Source and instruction of each kind of batch in `metrics`, by its short name.
        self.kinds = self.root / "kinds.json"
        self.checkpoints = self.root / "checkpoints"
        self.export = self.root / "export"
        self.results = self.root / "results"
        self.report = self.root / "report"
        self.jobs = self.root / "jobs"
        # Scores of single checkpoints, made during training.
        self.evaluations = self.root / "evaluations"
        # In a folder of `evaluations`: the digest of the scored checkpoint, because a rewound run
        # writes other checkpoints of the same names.
        self.checkpoint_digest = self.root / "checkpoint.digest"
        # Exists while the trainer is requested to checkpoint and stop (`diffembed stop`).
        self.stop_request = self.root / "stop"
        self._lock: TextIO | None = None

    def require_own(self) -> None:
        """Check that the folder belongs to a run, or has no file that a run would overwrite.

        Raises:
            UserError: it has such a file, which no run wrote.
        """
        if _is_own_config(self.config):
            return
        fix = "rename or move it, or choose another output_dir"
        written = [self.config, self.ds_config, self.environment, self.metrics]
        # The copy of a run may lack its config.yaml; the checkpoints show that it is a run.
        if any(map(is_checkpoint, self.checkpoints.glob("*"))):
            written = [self.config]
        for path in written:
            if path.exists():
                raise UserError(
                    f"output_dir: {path} was not written by a run, and this one would overwrite it",
                    fix=fix,
                    docs="trouble.md#overwrite",
                )
        for name in _OF_OTHERS:
            if (self.root / name).exists():
                raise UserError(
                    f"output_dir: {self.root} holds a dataset or a model ({name})",
                    fix="choose another output_dir",
                )
        for path in sorted(self.checkpoints.glob("*")):
            if path.name != LATEST and not is_checkpoint(path):
                raise UserError(
                    f"output_dir: {path} is not a checkpoint of a run, and runs write their "
                    f"checkpoints to {self.checkpoints}",
                    fix=fix,
                )

    def claim(self, *, patience_seconds: float = 60) -> None:
        """Lock the run until this process ends, so that no other training works on it.

        Args:
            patience_seconds: how long to wait for another training that may be about to end.

        Raises:
            UserError: the other training still runs.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        # For appending: truncating it would erase the holder's name, which the error below gives.
        lock = (self.root / "lock").open("a+")
        deadline = time.monotonic() + patience_seconds
        while not try_lock(lock):
            if time.monotonic() > deadline:
                lock.seek(0)
                raise UserError(
                    f"{self.root}: another training works on this run ({lock.read().strip()})",
                    fix=f"wait for it, `diffembed stop {self.root}`, or choose another output_dir",
                    docs="trouble.md#two-trainings",
                )
            time.sleep(0.5)
        sign_lock(lock)
        # Kept open: closing the file would free the lock.
        self._lock = lock
        for path in (self.config, self.ds_config, self.environment, self.metrics):
            remove_unfinished(path)


def frozen_config(folder: Path, stem: str, config: Any) -> tuple[Path, dict[Path, str]]:
    """Return the path of a copy of the resolved config, named by its content, and that content."""
    text = dump_config(config)
    path = folder / f"{stem}-{short_hash(text)}.yaml"
    return path, {path: text}


def _is_own_config(path: Path) -> bool:
    """Return True if a run wrote this config.yaml; earlier versions wrote it without the mark."""
    if not path.is_file():
        return False
    text = path.read_text(errors="replace")
    # What a run writes has no comments: those would be a user's.
    in_run = path.with_name("environment.json").is_file() and path.with_name("lock").is_file()
    return text.startswith(OWN_CONFIG) or (in_run and "#" not in text)


def describe_environment() -> dict[str, Any]:
    """Return versions, machine and commit of a run, for `environment.json`."""
    versions = {}
    for package in _PACKAGES:
        try:
            # From metadata, because importing torch or deepspeed takes seconds.
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "git_commit": _git_commit(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _git_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, `+changes` if it differs."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # An installed package may be inside the repository of another project.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if status else commit


LATEST = "latest"
_STATE = "state.json"
_FORMAT_VERSION = 1


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


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:06d}"


def checkpoint_step(name: str) -> int | None:
    """Return the optimizer steps of the checkpoint with this name; None for any other name."""
    found = re.fullmatch(r"step-(\d+)", name)
    return int(found[1]) if found else None


def is_checkpoint(path: Path) -> bool:
    """Return True for a folder that holds a checkpoint, whole or damaged."""
    return (path / _STATE).is_file()


def steps_by_name(folder: Path) -> dict[str, int]:
    """Return the steps of each whole checkpoint by its name, oldest first."""
    found = {path.name: checkpoint_step(path.name) for path in folder.glob("*")}
    steps = {name: step for name, step in found.items() if step is not None}
    # Not by name: step-1000000 comes before step-999900 there.
    return dict(sorted(steps.items(), key=lambda item: item[1]))


def checkpoint_names(folder: Path) -> list[str]:
    """Return the names of the whole checkpoints, oldest first."""
    return list(steps_by_name(folder))


def latest_name(folder: Path) -> str | None:
    """Return the name in `latest`, which need not exist any more; None without that file.

    Raises:
        UserError: `latest` does not hold a checkpoint's name.
    """
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    if not pointer.is_file():
        raise UserError(
            f"{pointer} is not a file",
            allowed="a file with the name of a checkpoint in this folder",
            fix=f"remove it, then write one with {how_to_rewind(folder)}",
        )
    name = pointer.read_bytes().decode(errors="replace").strip()
    if checkpoint_step(name) is None:
        raise UserError(
            f"{pointer}: {name[:80]!r}",
            allowed="the name of a checkpoint in this folder",
            fix=f"write one with {how_to_rewind(folder)}",
        )
    return name


def latest_step(folder: Path) -> int:
    """Return the steps of the newest whole checkpoint by its name; 0 without one.

    Raises:
        UserError: `latest` does not hold a checkpoint's name.
    """
    return checkpoint_step(latest_name(folder) or "") or 0


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, None without one.

    Raises:
        UserError: `latest` names a checkpoint that does not exist, or holds something else.
    """
    name = latest_name(folder)
    if name is None:
        return None
    if not (folder / name).is_dir():
        raise UserError(
            f"{folder}/{LATEST} names {name}, which does not exist",
            allowed=", ".join(checkpoint_names(folder)) or "no checkpoint is left",
            fix=f"{how_to_rewind(folder)}, or delete {folder}/{LATEST} to start from step 0",
        )
    return folder / name


def is_mirror(folder: Path) -> bool:
    """Return True for a folder of checkpoints that is not in a run's own."""
    return folder.name != RunDir("").checkpoints.name


def how_to_rewind(folder: Path, name: str = "NAME") -> str:
    """Return the command by which the next start continues from another checkpoint of a folder."""
    if is_mirror(folder):  # `rewind` takes a run
        return f"`echo {name} > {folder / LATEST}`"
    return f"`diffembed rewind {folder.parent} {name}`"


def rewind(folder: Path, name: str) -> Path:
    """Let the run continue from an older checkpoint than its newest; nothing is deleted.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    if name not in checkpoint_names(folder):
        raise UserError(
            f"{folder}: no checkpoint {name!r}",
            allowed=", ".join(checkpoint_names(folder)) or "no checkpoint is left",
        )
    # Before `latest` changes: a damaged checkpoint would stop the next start.
    verify_checkpoint(folder / name)
    _write_latest(folder / name)
    return folder / name


def read_state(path: Path) -> State:
    """Read and check a checkpoint's `state.json`.

    Raises:
        UserError: it is missing, damaged, or of a newer format.
    """
    file, fix = path / _STATE, _how_to_continue(path)
    tree = read_json(file, fix=fix)
    # Before all other keys, which a newer format may have renamed.
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if isinstance(version, int) and version > _FORMAT_VERSION:
        raise UserError(
            f"{path}: checkpoint format {version}",
            allowed=f"up to {_FORMAT_VERSION}",
            fix="update diffembed",
        )
    return check_kind(unseal(tree, file, fix=fix), State, where=str(file), fix=fix)


def verify_checkpoint(path: Path, part: slice = slice(None)) -> State:
    """Check every file of a checkpoint by size and SHA-256; return its state.

    Args:
        path: the checkpoint.
        part: the files to check, in the order of their names, where processes share the work.

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


def describe_file(path: Path) -> dict[str, Any]:
    """Return the entry of a file in `state.json`: its size and SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def damaged_checkpoint(path: Path, found: str) -> UserError:
    """Return the error that names a damaged checkpoint and the way to continue without it."""
    return UserError(f"checkpoint {path}: {found}", fix=_how_to_continue(path))


def _how_to_continue(path: Path) -> str:
    steps, own = steps_by_name(path.parent), checkpoint_step(path.name) or 0
    older = [name for name, step in steps.items() if step < own]
    if older:
        return f"{how_to_rewind(path.parent, older[-1])} to continue from an older one"
    return "train again in another output_dir"


def checkpoint_digest(path: Path) -> str:
    """Return a short hash of a checkpoint's content: `state.json` holds the hash of every file.

    The name is not enough: a run that was rewound writes other checkpoints of the same names.
    """
    return hash_file(path / _STATE)[:16]


def partial_folder(path: Path) -> Path:
    """Return the folder in which the checkpoint `path` is written before it appears."""
    return path.with_name(f".{path.name}.partial")


def publish_checkpoint(
    path: Path, description: Mapping[str, Any], files: Mapping[str, Any]
) -> None:
    """Let a checkpoint appear whose files are all in its partial folder; may be called again.

    Args:
        path: the checkpoint; an earlier one of this name is replaced.
        description: its `state.json` without version and files.
        files: its files, each as `describe_file` describes it.
    """
    partial = partial_folder(path)
    if partial.exists():  # not yet renamed by a call that failed after that
        state = {"format_version": _FORMAT_VERSION, **description, "files": files}
        # The last file: a folder without it is not a checkpoint.
        write_sealed(partial / _STATE, state)
        sync_dir(partial)
        if path.exists():  # from before the run was rewound
            path.rename(_doomed(path))
        partial.rename(path)
    sync_dir(path.parent)
    # Last: `latest` must never name a checkpoint that is not whole.
    _write_latest(path)
    # Whatever cannot be deleted now is deleted by the next start.
    shutil.rmtree(_doomed(path), ignore_errors=True)


def _write_latest(path: Path) -> None:
    write_text(path.with_name(LATEST), path.name + "\n")


def _doomed(path: Path) -> Path:
    return path.with_name(f".{path.name}.deleted")


def prune_checkpoints(folder: Path, config: CheckpointConfig, *, step: int) -> None:
    """Delete old checkpoints.

    Args:
        folder: of checkpoints.
        config: the newest `keep_last` stay, and every multiple of `keep_every`.
        step: of the newest. Later ones were written before the run was rewound; the run replaces
            them when it reaches their steps again.
    """
    steps = steps_by_name(folder)
    past = [name for name, number in steps.items() if number <= step]
    for name in past[: -config.keep_last]:
        if config.keep_every and steps[name] % config.keep_every == 0:
            continue
        # Renamed first, so that a kill in the middle leaves no half checkpoint under its name.
        doomed = _doomed(folder / name)
        (folder / name).rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete everything that killed saves and deletions left, while no process writes here."""
    for path in (*folder.glob(".step-*.partial"), *folder.glob(".step-*.deleted")):
        shutil.rmtree(path)
    remove_unfinished(folder / LATEST)


def copy_checkpoint(path: Path, mirror: Path) -> None:
    """Copy a whole checkpoint to a mirror, where it appears by a rename too.

    Raises:
        UserError: the copy differs from the original.
    """
    target = mirror / path.name
    partial = partial_folder(target)
    shutil.rmtree(partial, ignore_errors=True)  # of a killed copy
    shutil.copytree(path, partial)
    for file in partial.iterdir():
        sync_file(file)
    # The copy is read back: storage that lost bytes on the way must not replace a good checkpoint.
    verify_checkpoint(partial)
    shutil.rmtree(target, ignore_errors=True)  # from before the run was rewound
    partial.rename(target)
    sync_dir(mirror)
    _write_latest(target)


class Keeper:
    """Prune and mirror in the background of training, one checkpoint at a time; rank 0 only.

    Args:
        folder: the run's checkpoints.
        config: which of them to keep, and where to copy them.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self._folder, self._config = folder, config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keep")
        self._last: Future[None] | None = None

    def keep(self, path: Path, step: int) -> None:
        """Start to mirror a new whole checkpoint and to prune; return at once."""
        self._last = self._thread.submit(self._keep, path, step)

    def wait(self) -> None:
        """Wait until everything is done."""
        if self._last is not None:
            self._last.result()

    def _keep(self, path: Path, step: int) -> None:
        # Pruning comes after the copy, so that it never deletes the one being copied.
        if self._config.mirror is not None:
            self._copy(path, step, self._config.mirror)
        try:
            prune_checkpoints(self._folder, self._config, step=step)
        except OSError as error:
            say_line(f"{self._folder}: old checkpoints could not be deleted ({error})")

    def _copy(self, path: Path, step: int, mirror: Path) -> None:
        copied = mirror / path.name
        if is_checkpoint(copied) and checkpoint_digest(copied) == checkpoint_digest(path):
            return
        newest = latest_checkpoint(self._folder)
        lasting = self._config.keep_every and step % self._config.keep_every == 0
        if newest != path and not lasting:
            return  # the mirror is slower than the run: a newer checkpoint waits
        try:
            copy_checkpoint(path, mirror)
            prune_checkpoints(mirror, self._config, step=step)
        except (OSError, shutil.Error, UserError) as error:
            # No reason to end the run: the checkpoint itself is whole.
            say_line(f"{path.name} could not be copied to {mirror} ({error})")
