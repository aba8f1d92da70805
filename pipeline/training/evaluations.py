"""Scores checkpoints while training goes on, in jobs or a process that training never waits for.

    checkpoint --links--> RUN/evaluations/step-000100 --export--> scores --> RUN/evaluations/report

The links keep the files when the checkpoint itself is pruned; an export takes their place, and goes
in its turn when its scores are in the report (`pipeline/evaluation/results.py`). Scores
belong to one checkpoint, known by its digest: those of a future that the run was taken back from do
not count.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pipeline.checkpoint_folder import checkpoint_digest, checkpoint_step
from pipeline.config import (
    EvaluateConfig,
    EvaluateEveryConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from pipeline.errors import UserError
from pipeline.files import write_text
from pipeline.launch import without_rank
from pipeline.run_folder import RunDir

# Written last of what the commands read.
_READY = "evaluate.yaml"
_SUBMITTED = "submitted"
_LOG = "log"
# For all orders of one step to Slurm; a scheduler that hangs is asked again at the next checkpoint.
_PATIENCE_SECONDS = 120


class Evaluations:
    """What follows from `evaluate` in a training config; used by rank 0.

    Raises:
        UserError: the evaluation's config is wrong, or there is no Slurm to submit to.
    """

    def __init__(self, train: TrainConfig, every: EvaluateEveryConfig) -> None:
        self._train, self._every = train, every
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
        """Begin to score a whole checkpoint, if it is its turn and this one was not begun yet.

        Steps that Slurm did not take before are submitted again, whoever's turn it is. A fault is
        printed, not raised: training is worth more than a score.
        """
        folder = self._folder / checkpoint.name
        try:
            self._forget_future(checkpoint, step)
            if step % self._every.every == 0 and not (folder / _READY).exists():
                self._drop_links()
                self._prepare(folder, checkpoint)
                if self._every.where == "local":
                    _run_beside(folder)
        except OSError as error:
            print(f"{checkpoint.name} is not scored: {error}", flush=True)
        # Not behind one that is still at it: a scheduler that hangs must not gather a queue.
        if self._every.where == "slurm" and (self._last is None or self._last.done()):
            self._last = self._thread.submit(self._submit_waiting)

    def finish(self) -> None:
        """Wait until Slurm has the steps that were begun, or is tried in vain; at training's end.

        Slurm ends every process of a job with it, also those that submit.
        """
        if self._last is None:
            return
        self._last.result()
        self._submit_waiting()
        for folder in self._waiting():
            command = shlex.join(_submission(folder, self._every.text_elements))
            print(f"{folder.name} is not scored; to submit it: {command}", flush=True)

    def _waiting(self) -> list[Path]:
        """Folders of steps that Slurm has still to be given, oldest first."""
        ready = (path.parent for path in self._folder.glob(f"step-*/{_READY}"))
        return sorted(folder for folder in ready if not (folder / _SUBMITTED).exists())

    def _submit_waiting(self) -> None:
        """Submit step after step; after a failure, all that are left wait for the next call."""
        for folder in self._waiting():
            try:
                _submit(folder, self._every.text_elements)
            except OSError as error:
                print(f"{folder.name} could not be submitted for scoring: {error}", flush=True)
                return
            print(f"scoring {folder.name}: {folder / _LOG}", flush=True)

    def _forget_future(self, checkpoint: Path, step: int) -> None:
        """Let go of what was made of this step and later ones before the run was taken back."""
        for ready in sorted(self._folder.glob(f"step-*/{_READY}")):
            folder = RunDir(ready.parent)
            later = (checkpoint_step(folder.root.name) or 0) - step
            if later < 0 or (later == 0 and _scores(folder, checkpoint)):
                continue
            print(
                f"{folder.root.name} was scored before the run was taken back: those scores do "
                "not count any more",
                flush=True,
            )
            # Its digest goes first, so that its results count no more; the ready file last, so that
            # a kill in between is made good by the next call.
            folder.checkpoint_digest.unlink(missing_ok=True)
            (folder.root / _SUBMITTED).unlink(missing_ok=True)
            vectors = (self._folder / "store").glob(f"{folder.root.name}-*")
            for doomed in (folder.checkpoints, folder.export, *vectors):
                shutil.rmtree(doomed, ignore_errors=True)
            ready.unlink()

    def _drop_links(self) -> None:
        """Let go of the files of checkpoints whose export is whole."""
        for export in self._folder.glob("step-*/export"):
            shutil.rmtree(RunDir(export.parent).checkpoints, ignore_errors=True)

    def _prepare(self, folder: Path, checkpoint: Path) -> None:
        """Keep the checkpoint's files and write what the commands read."""
        kept = RunDir(folder).checkpoints
        partial = kept.with_name(f".{kept.name}.partial")
        for earlier in (partial, kept):
            shutil.rmtree(earlier, ignore_errors=True)
        shutil.copytree(checkpoint, partial / checkpoint.name, copy_function=_link)
        partial.rename(kept)
        train = dataclasses.replace(self._train, output_dir=folder, evaluate=None)
        write_text(folder / "train.yaml", dump_config(train))
        write_text(RunDir(folder).checkpoint_digest, checkpoint_digest(checkpoint))
        # The last model of the config says how queries are worded.
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


def _scores(folder: RunDir, checkpoint: Path) -> bool:
    """Whether a step's folder is of this very checkpoint."""
    own = folder.checkpoint_digest
    return own.is_file() and own.read_text() == checkpoint_digest(checkpoint)


def _submission(folder: Path, text_elements: int | None) -> list[str]:
    """The command that submits export, scores and report of the step whose files are in `folder`.

    A process of its own: a hung scheduler can be left behind, and training knows nothing of jobs.
    """
    words = [sys.executable, "-m", "pipeline.submission.submit"]
    words += [str(folder / "train.yaml"), folder.name, str(folder / _READY)]
    return words if text_elements is None else [*words, str(text_elements)]


def _submit(folder: Path, text_elements: int | None) -> None:
    """Run that command, and note in the folder that Slurm has the step.

    Raises:
        OSError: Slurm refuses, or does not answer in time.
    """
    log = folder / _LOG
    with log.open("ab") as file:
        process = subprocess.Popen(
            _submission(folder, text_elements),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        code = process.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)  # with the command of Slurm that hangs
        process.wait()
        raise OSError(f"no answer within {_PATIENCE_SECONDS} s") from error
    if code:
        said = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise OSError(f"exit code {code}, {said}")
    write_text(folder / _SUBMITTED, "")


def _run_beside(folder: Path) -> None:
    """Score the step whose files are in `folder` by a process that outlives training."""
    log = folder / _LOG
    with log.open("ab") as file:
        subprocess.Popen(
            ["/bin/sh", "-c", _script(folder)],
            # Training has the GPUs.
            env={**without_rank(os.environ), "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            # The launcher ends its own session's processes when training ends.
            start_new_session=True,
        )
    print(f"scoring {folder.name}: {log}", flush=True)


def _script(folder: Path) -> str:
    python = shlex.quote(sys.executable)
    train, evaluate = (shlex.quote(str(folder / name)) for name in ("train.yaml", _READY))
    lock = shlex.quote(str(folder.parent / ".lock"))
    command = f"{python} -m pipeline.cli"
    steps = (
        f"{command} export {train} --checkpoint {folder.name} --no-check",
        f"{command} evaluate run {evaluate}",
        f"{command} report {evaluate}",
    )
    # One step at a time, behind training: a slow evaluation must not pile up.
    return f"exec 9>{lock}; flock 9; renice -n 15 $$ >/dev/null; {' && '.join(steps)}"


def _link(source: str, target: str) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
