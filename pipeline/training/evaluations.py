"""Scores checkpoints while training goes on, in jobs or a process that training never waits for.

    checkpoint --links--> RUN/evaluations/step-000100 --export--> scores --> RUN/evaluations/report

The links keep the files when the checkpoint itself is pruned; an export takes their place.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.config import (
    EvaluateConfig,
    EvaluateEveryConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from pipeline.errors import UserError
from pipeline.run_dir import RunDir, write_text

# What a launcher says about a rank, or Slurm about this job; a process of its own is neither.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_PREFIXES = ("OMPI_", "PMI", "SLURM_", "SBATCH_", "TORCHELASTIC_")
_KEPT = "SLURM_CONF"


class Evaluations:
    """What follows from `evaluate` in a training config; used by rank 0.

    Raises:
        UserError: the evaluation's config is wrong, or there is no Slurm to submit to.
    """

    def __init__(self, train: TrainConfig, every: EvaluateEveryConfig) -> None:
        self._train, self._every = train, every
        self._config = load_config(EvaluateConfig, every.config)
        self._folder = RunDir(train.output_dir).evaluations.absolute()
        if every.where == "slurm" and shutil.which("sbatch") is None:
            raise UserError(
                "evaluate.where: slurm, but there is no sbatch here",
                fix="set evaluate.where: local, or train inside a Slurm job",
            )

    def start(self, checkpoint: Path, step: int) -> None:
        """Begin to score a whole checkpoint, if it is its turn and nobody has begun yet.

        A fault is printed, not raised: training is worth more than a score.
        """
        folder = self._folder / checkpoint.name
        # Written last: its presence means that the folder is whole.
        if step % self._every.every or (folder / "evaluate.yaml").exists():
            return
        try:
            self._drop_links()
            self._prepare(folder, checkpoint)
            log = folder / "log"
            with log.open("ab") as file:
                subprocess.Popen(
                    ["/bin/sh", "-c", script(folder, self._every)],
                    env=own_environment(on_cpu=self._every.where == "local"),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    # The launcher ends its own session's processes when training ends.
                    start_new_session=True,
                )
            print(f"scoring {checkpoint.name}: {log}", flush=True)
        except OSError as error:
            print(f"{checkpoint.name} is not scored: {error}", flush=True)

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
        write_text(folder / "evaluate.yaml", dump_config(evaluate))


def script(folder: Path, every: EvaluateEveryConfig) -> str:
    """The shell commands that score the step whose files are in `folder`."""
    python, name = shlex.quote(sys.executable), folder.name
    train, evaluate = (shlex.quote(str(folder / f"{n}.yaml")) for n in ("train", "evaluate"))
    if every.where == "slurm":
        texts = "" if every.text_elements is None else f" {every.text_elements}"
        return f"{python} -m pipeline.submission.step {train} {name} {evaluate}{texts}"
    lock = shlex.quote(str(folder.parent / ".lock"))
    command = f"{python} -m pipeline.cli"
    steps = (
        f"{command} export {train} --checkpoint {name}",
        f"{command} evaluate run {evaluate}",
        f"{command} report {evaluate}",
    )
    # One step at a time, behind training: a slow evaluation must not pile up.
    return f"exec 9>{lock}; flock 9; renice -n 15 $$ >/dev/null; {' && '.join(steps)}"


def own_environment(*, on_cpu: bool) -> dict[str, str]:
    """This process's variables without those that make it a rank of a job."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == _KEPT
        or (name not in _RANK_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES))
    }
    # Training has the GPUs.
    return {**kept, "CUDA_VISIBLE_DEVICES": ""} if on_cpu else kept


def _link(source: str, target: str) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
