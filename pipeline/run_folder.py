"""Know the layout of a run's folder, claim it for one training, and describe the environment.

RUN/config.yaml         the resolved config, with a first line that marks it as a run's
    ds_config.json      the resolved DeepSpeed JSON
    environment.json    versions, machine, commit
    metrics.jsonl       one line per logged step; kinds.json explains its kinds of batches
    lock                held by the training that works on the run
    stop                exists while a stop is requested (`diffembed stop`)
    checkpoints/        see checkpoint_folder.py
    export/  results/  report/
    evaluations/        scores of checkpoints made during training, a folder like RUN per step
    jobs/               frozen configs; batch scripts and logs of Slurm jobs
"""

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
from pipeline.config import dump_config
from pipeline.errors import UserError
from pipeline.files import remove_unfinished, short_hash, sign_lock, try_lock

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
        # An installed package may lie in the repository of another project.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if status else commit
