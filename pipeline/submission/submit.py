"""Submits a chain: every job once, however often it is asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.run_dir import write_text
from pipeline.submission import scheduler
from pipeline.submission.chain import Chain
from pipeline.submission.job import Job, batch_text
from pipeline.submission.record import Record, locked_records
from pipeline.submission.site import Site, read_site
from pipeline.submission.successor import SCRIPT_VARIABLE

_SITE_FILE = "DIFFEMBED_CLUSTER_ENV"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What one command asks for, beside its chain.

    Args:
        flags: of `sbatch`, for the jobs whose flags in the site's file are `flags_of`.
        flags_of: the name of that array.
        after: ids of jobs that the first jobs of the chain wait for.
    """

    flags: tuple[str, ...] = ()
    flags_of: str = ""
    after: tuple[str, ...] = ()


def show(chain: Chain, submission: Submission) -> str:
    """All batch scripts as they would be submitted; ids of jobs to come are written as NAME."""
    site = read_site()
    names = {job.name: job.name.upper() for job in chain.jobs}
    texts = [_text(job, site, submission, _waits_for(job, names, submission)) for job in chain.jobs]
    lines = [f"# finished, not submitted: {line}" for line in chain.finished]
    return "\n".join([*lines, *texts])


def submit(chain: Chain, submission: Submission) -> None:
    """Submit what is neither finished nor in Slurm already, and print every job's id.

    Raises:
        UserError: Slurm refuses a job (then none is submitted), or a folder belongs to another
            job that waits or runs.
    """
    site = read_site()
    for line in chain.finished:
        print(f"finished, not submitted: {line}")
    with locked_records({job.folder for job in chain.jobs}) as records:
        active = _active(chain, records)
        new = [job for job in chain.jobs if records[job.folder].id_of(job) not in active]
        _check(new, records, active, site, submission)
        ids: dict[str, str] = {}
        for job in chain.jobs:
            record = records[job.folder]
            if job in new:
                text = _text(job, site, submission, _waits_for(job, ids, submission))
                for path, content in {**job.files, job.text_path: text}.items():
                    write_text(path, content)
                record.add(job, scheduler.submit_text(job.text_path))
            ids[job.name] = record.id_of(job)
            state = "submitted" if job in new else f"{active[ids[job.name]]} already"
            waits = ", ".join(f"{name} {ids[name]}" for name in job.after)
            print(f"{job.name} {ids[job.name]} {state}" + (f", after {waits}" if waits else ""))
    _say_how_to_watch(chain.jobs, ids)


def _active(chain: Chain, records: dict[Path, Record]) -> dict[str, str]:
    """Which of all recorded jobs wait or run, with their states."""
    ids = [job_id for record in records.values() for job_id in record.ids()]
    return scheduler.active_jobs(ids)


def _check(
    new: Sequence[Job],
    records: dict[Path, Record],
    active: dict[str, str],
    site: Site,
    submission: Submission,
) -> None:
    """Refuse the whole chain before a part of it is in the queue."""
    longest = max((len(job.array) and job.array[-1] for job in new), default=0)
    if longest and longest >= (limit := scheduler.max_array_size()):
        raise UserError(
            f"an array with element {longest}",
            allowed=f"up to {limit - 1} (MaxArraySize of this Slurm)",
            fix="fewer models in one config, or --texts N",
        )
    for job in new:
        others = [other for other in records[job.folder].others(job) if other in active]
        if job.exclusive and others:
            raise UserError(
                f"{job.folder.parent}: job {others[0]} is {active[others[0]]} there with "
                f"another config",
                fix=f"wait, scancel {others[0]}, or choose another output_dir",
            )
        scheduler.check_text(job.name, _text(job, site, submission, ()))


def _waits_for(job: Job, ids: dict[str, str], submission: Submission) -> tuple[str, ...]:
    return tuple(ids[name] for name in job.after) or submission.after


def _text(job: Job, site: Site, submission: Submission, after: Sequence[str]) -> str:
    script = Path("slurm") / job.script
    if not script.is_file():
        raise UserError(f"{script}: no such file", fix="go to the folder that holds slurm/")
    environment = {SCRIPT_VARIABLE: str(job.text_path.absolute())}
    if _SITE_FILE in os.environ:
        environment[_SITE_FILE] = str(site.path.absolute())
    return batch_text(
        job,
        script.read_text(),
        site_flags=site.flags_of(job.flags),
        own_flags=submission.flags if job.flags == submission.flags_of else (),
        after=after,
        array_limit=site.array_limit,
        environment=environment,
    )


def _say_how_to_watch(jobs: Sequence[Job], ids: dict[str, str]) -> None:
    if not jobs:
        return
    print(f"watch: squeue --jobs={','.join(ids.values())}")
    for job in jobs:
        log = str(job.log).replace("%x", f"diffembed-{job.name}")
        for token, value in (("%j", ids[job.name]), ("%A", ids[job.name]), ("%a", "*")):
            log = log.replace(token, value)
        print(f"log:   tail -F {log}")
    if any(job.name == "train" for job in jobs):
        run = next(job.folder.parent for job in jobs if job.name == "train")
        print(f"stop:  diffembed stop {run} (saves a checkpoint; submit again to go on)")
    print(f"end:   scancel {' '.join(ids.values())}")
