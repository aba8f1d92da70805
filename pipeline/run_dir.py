"""One folder per run that explains itself, written so that a reader never sees half a file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import UserError, explain_os_error, name_full_disk

# The file beside checkpoints that names the newest whole one.
LATEST = "latest"
# First line of a run's config.yaml, which tells it from a user's file of that name.
OWN_CONFIG = (
    "# The whole config of this run, resolved. Runs overwrite this file; change your own one.\n"
)
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "mteb", "pyarrow")


class RunDir:
    """Names of everything below a run's folder.

    config.yaml ds_config.json environment.json metrics.jsonl kinds.json checkpoints/ export/
    results/ report/
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.ds_config = self.root / "ds_config.json"
        self.environment = self.root / "environment.json"
        self.metrics = self.root / "metrics.jsonl"
        # What the kinds of batches in `metrics` are: source and instruction by short name.
        self.kinds = self.root / "kinds.json"
        self.checkpoints = self.root / "checkpoints"
        self.export = self.root / "export"
        self.results = self.root / "results"
        self.report = self.root / "report"
        # Scores of single checkpoints, made while training went on.
        self.evaluations = self.root / "evaluations"
        # In a folder below it: which checkpoint, of those that may have had its name, is scored.
        self.checkpoint_digest = self.root / "checkpoint.digest"
        # Present while somebody asks the trainer to checkpoint and stop (`diffembed stop`).
        self.stop_request = self.root / "stop"
        self._lock: TextIO | None = None

    def require_own(self) -> None:
        """Check that the folder is empty, a run's, or holds only files of other names.

        Raises:
            UserError: a file that a run writes is there, but no run wrote it.
        """
        if _is_own_config(self.config):
            return
        fix = "rename or move it, or choose another output_dir"
        written = [self.config, self.ds_config, self.environment, self.metrics]
        # Somebody who copies a run may leave its config.yaml behind; its checkpoints tell.
        if any(self.checkpoints.glob("*/state.json")):
            written = [self.config]
        for path in written:
            if path.exists():
                raise UserError(
                    f"output_dir: {path} was not written by a run, and this one would overwrite it",
                    fix=fix,
                )
        for path in sorted(self.checkpoints.glob("*")):
            if path.name != LATEST and not (path / "state.json").is_file():
                raise UserError(
                    f"output_dir: {path} is no checkpoint of a run, and runs write their "
                    f"checkpoints to {self.checkpoints}",
                    fix=fix,
                )

    def claim(self, *, patience_seconds: float = 60) -> None:
        """Make sure that no other training works on this run, until this process ends.

        The system takes the lock back however the process ends.

        Args:
            patience_seconds: how long to wait for another one that may be about to end.

        Raises:
            UserError: it is still there.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = (self.root / "lock").open("a+")
        deadline = time.monotonic() + patience_seconds
        while not _lock_now(lock):
            if time.monotonic() > deadline:
                lock.seek(0)
                raise UserError(
                    f"{self.root}: another training works on this run ({lock.read().strip()})",
                    fix=f"wait for it, `diffembed stop {self.root}`, or choose another output_dir",
                )
            time.sleep(0.5)
        _sign(lock)
        self._lock = lock
        for path in (self.config, self.ds_config, self.environment, self.metrics):
            remove_unfinished(path)


def _is_own_config(path: Path) -> bool:
    """Whether a run wrote this config.yaml; runs of earlier versions wrote it without a mark."""
    if not path.is_file():
        return False
    text = path.read_text(errors="replace")
    beside = path.with_name("environment.json").is_file() and path.with_name("lock").is_file()
    return text.startswith(OWN_CONFIG) or (beside and "#" not in text)


def _lock_now(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network disks have no locks: nothing to go by
    return True


@contextlib.contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until nobody else is between these lines with the same file; it is made where missing.

    The system takes the lock back however a process ends.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        # Some network disks have no locks: nothing to go by.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def hold_lock(path: Path, *, tell: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other process holds this lock file, and remove it in the end.

    The system frees the lock however a process ends.

    Args:
        path: the lock file; its folder is made where missing.
        tell: called once with the holder's process and machine if there is one to wait for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        told = False
        while True:
            file = stack.enter_context(path.open("a+"))
            while not _lock_now(file):
                if not told:
                    file.seek(0)
                    tell(file.read().strip())
                    told = True
                time.sleep(0.5)
            # The holder may have removed the file that this process waited for.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
        stack.callback(path.unlink, missing_ok=True)
        _sign(file)
        yield


def _sign(lock: TextIO) -> None:
    """Write into a held lock file who holds it."""
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}\n")
    lock.flush()


def require_writable(folder: str | Path, *, key: str) -> None:
    """Check that files can be written below `folder`, before any work is done for it.

    Args:
        folder: may not exist yet; it is made, with its parents.
        key: the config key or flag that names it, for the message.

    Raises:
        UserError: the folder cannot be made or written to.
        MachineError: the disk is full or broken.
    """
    folder = Path(folder)
    probe = folder / f".writable.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
    except OSError as error:
        # Name the folder that the user gave instead of the probe.
        named = OSError(error.errno, os.strerror(error.errno or 0), str(folder))
        explained = explain_os_error(named)
        if explained is None:
            raise
        if isinstance(explained, UserError):
            fix = f"{explained.fix}, as {key}"
            raise UserError(f"{key}: {explained.found}", fix=fix) from error
        raise type(explained)(f"{key}: {explained}") from error
    finally:
        # A full disk takes the name of a file but not its content.
        with contextlib.suppress(OSError):
            probe.unlink()


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it is synced and takes `path`'s place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random, because two nodes that share the folder may run processes of the same number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with name_full_disk(path):
            yield temporary
            sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Delete what killed writers of `path` left of their temporary files, while nobody writes."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink()


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on disk."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def sync_dir(path: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write a whole JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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


def describe_environment() -> dict[str, Any]:
    """Versions, machine and commit of a run, for `environment.json`."""
    versions = {}
    for package in _PACKAGES:
        try:
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
    """Commit of the checkout this package runs from, with `+changes` when it differs."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if status else commit
