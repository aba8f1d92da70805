"""`diffembed submit`: from the words of the command to a chain that is shown or submitted."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import ExportStep
from pipeline.errors import UserError
from pipeline.submission import chain
from pipeline.submission.flags import parse_flags, split_flags
from pipeline.submission.submit import Submission, show, submit

# The array of `slurm/cluster.env` whose jobs `--sbatch` is for.
_MAIN_FLAGS = {
    "prepare": "PREPARE_FLAGS",
    "train": "TRAIN_FLAGS",
    "export": "CPU_FLAGS",
    "evaluate": "EVALUATE_FLAGS",
    "report": "CPU_FLAGS",
}


def submit_command(
    what: str,
    config: Path,
    overrides: tuple[str, ...],
    *,
    deepspeed: Path,
    exports: ExportStep,
    text_elements: int | None,
    flags: str,
    after: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Show or submit what a command asks for.

    Args:
        what: the kind of job, or `all`.
        config: its YAML file; of a chain for `all`.
        overrides: changes to it.
        deepspeed: the DeepSpeed JSON of a training run.
        exports: which checkpoint is exported, and where to.
        text_elements: see `evaluate_chain`.
        flags: flags of `sbatch` as one string.
        after: ids of jobs that must have succeeded first.
        dry_run: print the batch scripts and submit nothing.

    Raises:
        UserError: a config is wrong, or Slurm refuses a job.
    """
    if flags and what == "all":
        raise UserError("--sbatch with all", fix="set the flags of each kind in slurm/cluster.env")
    for job in after:
        if not job.isdecimal():
            raise UserError(f"--after {job}", allowed="the id of a job")
    if what == "prepare":
        jobs = chain.prepare_chain(config, overrides)
    elif what == "train":
        # Behind another job, neither the shards nor the exports need be there yet.
        jobs = chain.train_chain(config, overrides, deepspeed, shards_follow=bool(after))
    elif what == "export":
        jobs = chain.export_chain(config, overrides, (exports,))
    elif what == "evaluate":
        jobs = chain.evaluate_chain(config, overrides, text_elements=text_elements, ready=not after)
    elif what == "report":
        jobs = chain.report_chain(config, overrides)
    else:
        jobs = chain.whole_chain(config, overrides)
    submission = Submission(
        flags=parse_flags(split_flags(flags, "--sbatch"), "--sbatch"),
        flags_of=_MAIN_FLAGS.get(what, ""),
        after=after,
    )
    if dry_run:
        print(show(jobs, submission))
    else:
        submit(jobs, submission)
