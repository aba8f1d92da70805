"""Submit a chain of jobs, each job once.

    chain ──> locked records + Slurm's queue ──> keep, submit, or replace each job ──> ids and logs

    python -m pipeline.submission.submit TRAIN_YAML CHECKPOINT EVALUATE_YAML [TEXT_ELEMENTS]

submits the export and the evaluation of one checkpoint, for the training job that wrote it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config import ExportStep
from pipeline.errors import UserError, errors_end_the_process
from pipeline.files import write_text
from pipeline.submission import chain, slurm
from pipeline.submission.chain import Chain, evaluate_chain, export_chain
from pipeline.submission.jobs import (
    SITE_VARIABLE,
    Flag,
    Job,
    Site,
    batch_text,
    expand_log,
    last_value,
    parse_flags,
    read_site,
    split_flags,
)
from pipeline.submission.slurm import (
    SCRIPT_VARIABLE,
    JobRecord,
    QueuedJob,
    job_name,
    locked_records,
)

# Jobs whose folder `diffembed watch` describes, one of each folder.
_WATCHED = ("synthesize", "train", "evaluate", "evaluate-embed")
_DEPENDENCY = re.compile(r"#SBATCH '?(-d|--dependency|--kill-on-invalid-dep)")
# In a path, Slurm takes the first as a request to expand nothing; the others end the line.
_NOT_IN_PATHS = ("\\", "\n", "\r")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """The options of one submission, in addition to its chain.

    Args:
        flags: of `sbatch`, for the jobs whose array of flags in the site's file is `flags_of`.
        flags_of: the name of that array.
        after: ids of jobs that the first jobs of the chain wait for.
    """

    flags: tuple[Flag, ...] = ()
    flags_of: str = ""
    after: tuple[str, ...] = ()

    def flags_for(self, job: Job) -> tuple[Flag, ...]:
        """Return the flags of `sbatch` for one job."""
        return self.flags if job.flags == self.flags_of else ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Changes:
    """The difference between a chain and Slurm's queue.

    Args:
        kept: jobs that wait or run, by name.
        new: jobs to submit.
        replaced: ids of waiting jobs to cancel: the job that they wait for is gone, and a new job
            replaces each.
    """

    kept: Mapping[str, QueuedJob]
    new: tuple[Job, ...]
    replaced: tuple[str, ...]


def batch_scripts(chain: Chain, submission: Submission) -> str:
    """Return all batch scripts as they would be submitted, with NAME for ids not known yet.

    Raises:
        UserError: a folder of the chain cannot be written, or a flag is refused.
    """
    # A dry run writes nothing, but finds what would stop a submission.
    for folder in {job.folder for job in chain.jobs}:
        _require_writable(folder)
    site = read_site()
    names = {job.name: job.name.upper() for job in chain.jobs}
    texts = [_text(job, site, submission, _waits_for(job, names, submission)) for job in chain.jobs]
    lines = [f"# finished, not submitted: {line}" for line in chain.finished]
    return "\n".join([*lines, *texts])


def _require_writable(folder: Path) -> None:
    """Refuse a folder that could not be made or written, without making it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{folder}: cannot be written", fix="choose another output_dir")


def submit(chain: Chain, submission: Submission) -> None:
    """Submit all jobs that are neither finished nor in Slurm already; print every job's id.

    Raises:
        UserError: Slurm refuses a job (then none is submitted), or another job that waits or runs
            uses a folder.
    """
    site = read_site()
    for line in chain.finished:
        print(f"finished, not submitted: {line}")
    if not chain.jobs:
        return
    # Before anything is written: a login node without Slurm ends here.
    settings = slurm.read_settings()
    folders = {job.folder for job in chain.jobs}
    # Locked over comparison and submission: two people must not both find that a job is missing.
    with locked_records(folders, settings.get("ClusterName", "")) as records:
        queue = slurm.list_jobs(i for record in records.values() for i in record.ids())
        active = {folder: record.find(queue) for folder, record in records.items()}
        _print_unclear(chain, records, active)
        changes = _compare(chain, active)
        _require_acceptable(changes.new, active, settings, site, submission)
        ids = _submit_new(chain, changes, records, site, submission)
        # Only now: a chain that cannot be submitted must not lose the jobs that wait.
        for job in changes.replaced:
            slurm.cancel(job)
        if changes.new:
            shown = slurm.list_jobs(ids.values())
            for record in records.values():
                record.confirm(shown)
    _print_how_to_watch(chain.jobs, ids, site, submission)


def _print_unclear(
    chain: Chain, records: Mapping[Path, JobRecord], active: Mapping[Path, Mapping[str, QueuedJob]]
) -> None:
    for folder, record in records.items():
        if record.is_damaged:
            print(
                f"{record.path}: damaged; {len(active[folder])} of its jobs are found in Slurm's "
                f"queue"
            )
    for job in chain.jobs:
        if other := records[job.folder].elsewhere(job):
            print(f"{job.name}: also submitted to cluster {other}, which is not checked here")


def _compare(chain: Chain, active: Mapping[Path, Mapping[str, QueuedJob]]) -> _Changes:
    """Compare a chain with the jobs in Slurm's queue."""
    kept: dict[str, QueuedJob] = {}
    new, replaced = [], []
    for job in chain.jobs:
        queued = active[job.folder].get(job.key)
        # In the order of the chain, so that `kept` already has the jobs that this one waits for.
        if queued and _is_still_right(job, queued, kept):
            kept[job.name] = queued
            continue
        new.append(job)
        # A job that has started is not cancelled: the new one will find its changes done.
        if queued and not queued.has_started:
            replaced.append(queued.id)
    return _Changes(kept=kept, new=tuple(new), replaced=tuple(replaced))


def _is_still_right(job: Job, queued: QueuedJob, kept: Mapping[str, QueuedJob]) -> bool:
    """Return True if a job in the queue waits for exactly the jobs that it must wait for now."""
    if job.exclusive and queued.has_started:
        return True  # only one may run
    return all(name in kept and kept[name].id in queued.waits_for for name in job.after)


def _submit_new(
    chain: Chain,
    changes: _Changes,
    records: Mapping[Path, JobRecord],
    site: Site,
    submission: Submission,
) -> dict[str, str]:
    """Submit the new jobs in order and print each job of the chain; return the ids by name."""
    ids: dict[str, str] = {}
    for job in chain.jobs:
        if job in changes.new:
            text = _text(job, site, submission, _waits_for(job, ids, submission))
            # Before the job exists, so that it finds its files even if it starts at once.
            for path, content in {**job.files, job.text_path: text}.items():
                write_text(path, content)
            ids[job.name] = slurm.submit_text(job.text_path)
            records[job.folder].add(job.key, ids[job.name])
            state = "submitted"
        else:
            ids[job.name] = changes.kept[job.name].id
            state = f"{changes.kept[job.name].description} already"
            if _has_other_flags(job, _text(job, site, submission, ())):
                state += f", with other flags (to change them, scancel {ids[job.name]} and repeat)"
        waits = ", ".join(f"{name} {ids[name]}" for name in job.after)
        print(f"{job.name} {ids[job.name]} {state}" + (f", after {waits}" if waits else ""))
    return ids


def _has_other_flags(job: Job, text: str) -> bool:
    """Return True if a job that waits or runs was submitted with other flags than this text's."""

    def flags(script: str) -> list[str]:
        lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
        # The jobs that it waits for are compared by id.
        return [line for line in lines if not _DEPENDENCY.match(line)]

    # A copied folder need not have it.
    return job.text_path.exists() and flags(job.text_path.read_text()) != flags(text)


def _require_acceptable(
    new: Sequence[Job],
    active: Mapping[Path, Mapping[str, QueuedJob]],
    settings: Mapping[str, str],
    site: Site,
    submission: Submission,
) -> None:
    """Refuse the whole chain before any part of it is in the queue."""
    longest = max((len(job.array) and job.array[-1] for job in new), default=0)
    # One more than the largest number of an element; 1001 by default.
    limit = int(settings.get("MaxArraySize", "1001"))
    if longest and longest >= limit:
        raise UserError(
            f"an array with element {longest}",
            allowed=f"up to {limit - 1} (MaxArraySize of this Slurm)",
            fix="fewer models in one config, or --texts N",
            docs="trouble.md#array-size",
        )
    for job in new:
        # The same stage with other arguments: both would write into one folder.
        others = [
            other
            for key, other in active[job.folder].items()
            if job_name(key) == job.name and key != job.key
        ]
        if job.exclusive and others:
            raise UserError(
                f"{job.folder.parent}: job {others[0].id} is {others[0].description} there with "
                f"another config",
                fix=f"wait, scancel {others[0].id}, or choose another output_dir",
            )
        # Without the jobs that it waits for, which have no ids yet.
        slurm.check_text(job.name, _text(job, site, submission, ()), by_submission=True)


def _waits_for(job: Job, ids: dict[str, str], submission: Submission) -> tuple[str, ...]:
    return tuple(ids[name] for name in job.after) or submission.after


def _text(job: Job, site: Site, submission: Submission, after: Sequence[str]) -> str:
    script = Path("slurm") / job.script
    if not script.is_file():
        raise UserError(
            f"{script}: no such file",
            fix="go to the folder that holds slurm/, or let `diffembed files` copy it here",
        )
    if any(character in str(job.folder) for character in _NOT_IN_PATHS):
        raise UserError(
            f"{str(job.folder)!r}: Slurm cannot write a log there",
            fix="choose an output_dir without backslashes and line breaks",
        )
    # In the script, because `sbatch --export=NONE` would not pass them on.
    environment = {SCRIPT_VARIABLE: str(job.text_path.absolute())}
    if SITE_VARIABLE in os.environ:
        environment[SITE_VARIABLE] = str(site.path.absolute())
    return batch_text(
        job,
        script.read_text(),
        site_flags=site.flags_of(job.flags),
        own_flags=submission.flags_for(job),
        after=after,
        array_limit=site.array_limit,
        environment=environment,
    )


def _print_how_to_watch(
    jobs: Sequence[Job], ids: dict[str, str], site: Site, submission: Submission
) -> None:
    print(f"queue: squeue --jobs={','.join(ids.values())}")
    for job in jobs:
        if job.name in _WATCHED:
            print(f"watch: diffembed watch {shlex.quote(str(job.folder.parent))}")
    for job in jobs:
        # The user's flags override the log and the name of the submission.
        flags = submission.flags_for(job)
        log = last_value(flags, "--output", str(job.log))
        name = last_value(flags, "--job-name", job.slurm_name)
        print(f"log:   tail -F {expand_log(log, job=ids[job.name], name=name)}")
    if any(job.name == "train" for job in jobs):
        run = next(job.folder.parent for job in jobs if job.name == "train")
        stop = f"diffembed stop {shlex.quote(str(run))}"
        print(f"stop:  {stop} (saves a checkpoint; submit again to continue)")
    print(f"end:   scancel {' '.join(ids.values())}")


# The array of `slurm/cluster.env` whose jobs get the flags of `--sbatch`.
_MAIN_FLAGS = {
    "synthesize": "SYNTHESIZE_FLAGS",
    "prepare": "PREPARE_FLAGS",
    "mine": "MINE_FLAGS",
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
    """Submit the jobs of `diffembed submit`, or print their batch scripts.

    Args:
        what: the kind of job, or `all`.
        config: its YAML file; of a chain for `all`.
        overrides: changes to it.
        deepspeed: the DeepSpeed JSON of a training run.
        exports: checkpoint and folder of an export.
        text_elements: see `evaluate_chain`.
        flags: flags of `sbatch` as one string.
        after: ids of jobs that must succeed first.
        dry_run: print the batch scripts and submit nothing.

    Raises:
        UserError: a config is wrong, or Slurm refuses a job.
    """
    if flags and what == "all":
        raise UserError("--sbatch with all", fix="set the flags of each kind in slurm/cluster.env")
    for job in after:
        if not job.isdecimal():
            raise UserError(f"--after {job}", allowed="the id of a job")
    if what == "synthesize":
        jobs = chain.synthesize_chain(config, overrides)
    elif what == "prepare":
        # An earlier job may write the rows; below, the shards, the checkpoints or the exports.
        jobs = chain.prepare_chain(config, overrides, rows_follow=bool(after))
    elif what == "mine":
        jobs = chain.mine_chain(config, overrides, shards_follow=bool(after))
    elif what == "train":
        jobs = chain.train_chain(config, overrides, deepspeed, shards_follow=bool(after))
    elif what == "export":
        jobs = chain.export_chain(config, overrides, (exports,), ready=not after)
    elif what == "evaluate":
        jobs = chain.evaluate_chain(config, overrides, text_elements=text_elements, ready=not after)
    elif what == "report":
        jobs = chain.report_chain(config, overrides)
    else:
        jobs = chain.whole_chain(config, overrides)
    submission = Submission(
        flags=parse_flags(split_flags(flags), "--sbatch"),
        flags_of=_MAIN_FLAGS.get(what, ""),
        after=after,
    )
    if dry_run:
        print(batch_scripts(jobs, submission))
    else:
        submit(jobs, submission)


def main(words: list[str]) -> None:
    """Submit the export and evaluation of a checkpoint, without finished or submitted jobs."""
    train, checkpoint, evaluate, *texts = words
    exports = export_chain(Path(train), (), (ExportStep(checkpoint=checkpoint),))
    scores = evaluate_chain(
        Path(evaluate),
        text_elements=int(texts[0]) if texts else None,
        ready=not exports.jobs,  # no export is left to make
    )
    submit(exports.then(scores), Submission())


if __name__ == "__main__":
    with errors_end_the_process():
        main(sys.argv[1:])
