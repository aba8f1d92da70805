"""The layout of a run folder: config, environment, lock, checkpoints, logs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from pipeline.checkpoint_folder import LATEST, is_checkpoint
from pipeline.errors import UserError
from pipeline.files import remove_unfinished, sign_lock, try_lock

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
        if any(map(is_checkpoint, self.checkpoints.glob("*"))):
            written = [self.config]
        for path in written:
            if path.exists():
                raise UserError(
                    f"output_dir: {path} was not written by a run, and this one would overwrite it",
                    fix=fix,
                )
        for path in sorted(self.checkpoints.glob("*")):
            if path.name != LATEST and not is_checkpoint(path):
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
        while not try_lock(lock):
            if time.monotonic() > deadline:
                lock.seek(0)
                raise UserError(
                    f"{self.root}: another training works on this run ({lock.read().strip()})",
                    fix=f"wait for it, `diffembed stop {self.root}`, or choose another output_dir",
                )
            time.sleep(0.5)
        sign_lock(lock)
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
