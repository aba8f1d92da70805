"""Score checkpoints during training, in Slurm jobs or a local process; training never waits.

    checkpoint --links--> RUN/evaluations/step-000100 --export--> scores --> RUN/evaluations/report

The links keep the files when the checkpoint itself is pruned. The export replaces them, and is
deleted when its scores are in the report (`pipeline/evaluation/results.py`). Scores belong to one
checkpoint, known by its digest: scores from before a rewind are ignored.

Training knows no command of a higher layer: `pipeline/train.py` passes the command lines.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pipeline.config import (
    EvaluateConfig,
    EvaluateEveryConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from pipeline.errors import UserError, say_line
from pipeline.files import write_text
from pipeline.launch import without_rank
from pipeline.run_folder import RunDir, checkpoint_digest, checkpoint_step

# Read by the commands; the evaluation's is written last, so that it marks a step as ready.
_TRAIN = "train.yaml"
_READY = "evaluate.yaml"
_SUBMITTED = "submitted"
_LOG = "log"
# For all jobs of one step; where a scheduler hangs, the next checkpoint tries again.
_SUBMIT_SECONDS = 120


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoringCommands:
    """Command lines that export, score and report one checkpoint.

    Both take the path of the training config, the checkpoint's name, and the path of the
    evaluation config.
    """

    submit: Callable[[Path, str, Path], list[str]]  # one command, which submits jobs to Slurm
    local: Callable[[Path, str, Path], list[list[str]]]  # commands to run one after another


class Evaluations:
    """Starts the evaluations that `evaluate` in a training config describes; used by rank 0.

    Args:
        train: the run.
        every: its section `evaluate`.
        commands: start the programs that score.

    Raises:
        UserError: the evaluation's config is wrong, or there is no Slurm to submit to.
    """

    def __init__(
        self, train: TrainConfig, every: EvaluateEveryConfig, commands: ScoringCommands
    ) -> None:
        self._train, self._every, self._commands = train, every, commands
        self._config = load_config(EvaluateConfig, every.config)
        self._folder = RunDir(train.output_dir).evaluations.absolute()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._last: Future[None] | None = None
        if every.where == "slurm" and shutil.which("sbatch") is None:
            raise UserError(
                "evaluate.where: slurm, but there is no sbatch here",
                fix="set evaluate.where: local, or train inside a Slurm job",
            )

    def start(self, checkpoint: Path, step: int) -> None:
        """Start to score a complete checkpoint, if its step is due and not started yet.

        Earlier steps that Slurm did not accept are submitted again at every call. A fault is
        printed, not raised: training is worth more than a score.
        """
        folder = self._folder / checkpoint.name
        try:
            self._discard_from_before_rewind(checkpoint, step)
            if step % self._every.every == 0 and not (folder / _READY).exists():
                # Links to checkpoints whose export is complete keep the disk full for nothing.
                for export in self._folder.glob("step-*/export"):
                    shutil.rmtree(RunDir(export.parent).checkpoints, ignore_errors=True)
                self._prepare(folder, checkpoint)
                if self._every.where == "local":
                    self._start_locally(folder)
        except OSError as error:
            say_line(f"{checkpoint.name} is not scored: {error}")
        # Not while another submission runs: a scheduler that hangs must not gather a queue.
        if self._every.where == "slurm" and (self._last is None or self._last.done()):
            self._last = self._thread.submit(self._submit_waiting)

    def finish(self) -> None:
        """Wait until Slurm has accepted the started steps, or give up; called at training's end.

        Slurm ends every process of a job with the job, including one that submits.
        """
        if self._last is None:
            return
        self._last.result()
        self._submit_waiting()
        for folder in self._waiting():
            command = shlex.join(self._submit_command(folder))
            say_line(f"{folder.name} is not scored; to submit it: {command}")

    def _waiting(self) -> list[Path]:
        """List folders of steps that are not submitted yet, oldest first."""
        ready = (path.parent for path in self._folder.glob(f"step-*/{_READY}"))
        return sorted(folder for folder in ready if not (folder / _SUBMITTED).exists())

    def _submit_waiting(self) -> None:
        """Submit step after step; after a failure, the others wait for the next call."""
        for folder in self._waiting():
            try:
                _submit(folder, self._submit_command(folder))
            except OSError as error:
                say_line(f"{folder.name} could not be submitted for scoring: {error}")
                return
            say_line(f"scoring {folder.name}: {folder / _LOG}")

    def _submit_command(self, folder: Path) -> list[str]:
        return self._commands.submit(folder / _TRAIN, folder.name, folder / _READY)

    def _start_locally(self, folder: Path) -> None:
        """Score the step whose files are in `folder` by a process that outlives training."""
        log = folder / _LOG
        commands = self._commands.local(folder / _TRAIN, folder.name, folder / _READY)
        with log.open("ab") as file:
            subprocess.Popen(
                ["/bin/sh", "-c", _script(commands, lock=folder.parent / ".lock")],
                # Training has the GPUs.
                env={**without_rank(os.environ), "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                # The launcher ends its own session's processes when training ends.
                start_new_session=True,
            )
        say_line(f"scoring {folder.name}: {log}")

    def _discard_from_before_rewind(self, checkpoint: Path, step: int) -> None:
        """Delete results of this step and later ones that a rewind has made obsolete."""
        for ready in sorted(self._folder.glob(f"step-*/{_READY}")):
            folder = RunDir(ready.parent)
            later = (checkpoint_step(folder.root.name) or 0) - step
            if later < 0 or (later == 0 and _is_of(folder, checkpoint)):
                continue
            say_line(
                f"{folder.root.name} was scored before the run was rewound: its scores are ignored"
            )
            # The digest goes first: results without it are ignored. The ready file goes last: after
            # a kill in between, the next call finds it and deletes the rest.
            folder.checkpoint_digest.unlink(missing_ok=True)
            (folder.root / _SUBMITTED).unlink(missing_ok=True)
            vectors = (self._folder / "store").glob(f"{folder.root.name}-*")
            for doomed in (folder.checkpoints, folder.export, *vectors):
                shutil.rmtree(doomed, ignore_errors=True)
            ready.unlink()

    def _prepare(self, folder: Path, checkpoint: Path) -> None:
        """Link the checkpoint's files and write the configs that the commands read."""
        kept = RunDir(folder).checkpoints
        partial = kept.with_name(f".{kept.name}.partial")
        # Left by an attempt that was killed.
        for earlier in (partial, kept):
            shutil.rmtree(earlier, ignore_errors=True)
        shutil.copytree(checkpoint, partial / checkpoint.name, copy_function=_link)
        partial.rename(kept)  # complete from here on
        train = dataclasses.replace(self._train, output_dir=folder, evaluate=None)
        write_text(folder / _TRAIN, dump_config(train))
        write_text(RunDir(folder).checkpoint_digest, checkpoint_digest(checkpoint))
        # Instructions are taken from the last model of the config.
        model = dataclasses.replace(
            self._config.models[-1], name=checkpoint.name, path=RunDir(folder).export
        )
        evaluate = dataclasses.replace(
            self._config,
            output_dir=self._folder,
            models=(model,),
            training_run=self._train.output_dir.absolute(),
        )
        write_text(folder / _READY, dump_config(evaluate))


def _is_of(folder: RunDir, checkpoint: Path) -> bool:
    """Compare the digest in a step's folder with the checkpoint's."""
    own = folder.checkpoint_digest
    return own.is_file() and own.read_text() == checkpoint_digest(checkpoint)


def _submit(folder: Path, command: list[str]) -> None:
    """Run the command that submits a step, and note in its folder that Slurm has it.

    In a process, because a scheduler that hangs can then be left behind.

    Raises:
        OSError: Slurm refuses, or does not answer in time.
    """
    log = folder / _LOG
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    try:
        code = process.wait(_SUBMIT_SECONDS)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)  # with the command of Slurm that hangs
        process.wait()
        raise OSError(f"no answer within {_SUBMIT_SECONDS} s") from error
    if code:
        last_line = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise OSError(f"exit code {code}, {last_line}")
    write_text(folder / _SUBMITTED, "")


def _script(commands: list[list[str]], *, lock: Path) -> str:
    """Join commands to a script that waits for the lock and stops at the first failure."""
    steps = " && ".join(map(shlex.join, commands))
    # One checkpoint at a time, behind training: a slow evaluation must not pile up. File 9 holds
    # the lock until the script and all its commands have ended.
    return f"exec 9>{shlex.quote(str(lock))}; flock 9; renice -n 15 $$ >/dev/null; {steps}"


def _link(source: str, target: str) -> None:
    """Give the file another name, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
