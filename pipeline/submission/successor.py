"""Continue a job as another one, for sites that forbid `scontrol requeue`."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from pipeline.errors import DiffembedError
from pipeline.submission import scheduler
from pipeline.submission.record import locked_records

# Set by every batch script that `diffembed submit` writes: where that script is kept.
SCRIPT_VARIABLE = "DIFFEMBED_BATCH_SCRIPT"
# It must find what this job still writes down, and not meet its last processes.
_DELAY = "--begin=now+10"


def submit_successor(job: str, *, without: tuple[str, ...] = ()) -> str:
    """Submit this job's own script again and let its dependents wait for the new job.

    Args:
        job: its id.
        without: nodes that the new job must not get.

    Returns:
        The new job's id.

    Raises:
        DiffembedError: the job was not submitted by `diffembed submit`, or Slurm refuses.
    """
    if SCRIPT_VARIABLE not in os.environ:
        raise DiffembedError("only `diffembed submit` leaves a script to submit again")
    script = Path(os.environ[SCRIPT_VARIABLE])
    flags = (_DELAY, *([f"--exclude={','.join(without)}"] if without else []))
    cluster = scheduler.read_settings().get("ClusterName", "")
    # Locked: who submits the chain at this moment must find one of the two jobs, not both.
    with locked_records({script.parent}, cluster) as records:
        successor = scheduler.submit_text(script, *flags, patience=scheduler.IN_A_JOB)
        # On a full disk, the next submission finds it by its script.
        with contextlib.suppress(OSError):
            records[script.parent].add(script.stem, successor)
    for dependent, dependency in _dependents(job).items():
        moved = re.sub(rf":{job}\b", f":{successor}", dependency)
        order = ("update", f"JobId={dependent}", f"Dependency={moved}")
        scheduler.ask("scontrol", *order, patience=scheduler.IN_A_JOB)
    return successor


def _dependents(job: str) -> dict[str, str]:
    """Dependencies of the jobs that wait for this one, by id."""
    words = ("--me", "--noheader", "--format=%A %E")
    listing = scheduler.ask("squeue", *words, patience=scheduler.IN_A_JOB)
    waiting = dict(line.split(maxsplit=1) for line in listing.splitlines())
    # `afterok:8(unfulfilled),afterok:10_*(unfulfilled)` is told; `afterok:8,afterok:10` is heard.
    plain = {own: re.sub(r"(_\*)?\(\w+\)", "", told) for own, told in waiting.items()}
    return {own: told for own, told in plain.items() if re.search(rf":{job}\b", told)}
