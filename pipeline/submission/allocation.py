"""Ask about the current Slurm job from inside it, check its nodes, requeue it or continue it.

    python -m pipeline.submission.allocation

prints the address of the job's first node, for `slurm/train.sbatch`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import DiffembedError, errors_end_the_process
from pipeline.submission import slurm
from pipeline.submission.health import MARK, Health
from pipeline.submission.slurm import IN_A_JOB, SCRIPT_VARIABLE, locked_records

# A successor starts after this job has written its last files and its processes have ended.
_DELAY = "--begin=now+10"


def submit_successor(job: str, *, without: tuple[str, ...] = ()) -> str:
    """Submit this job's own script again, and let jobs that depend on it wait for the new one.

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
    cluster = slurm.read_settings().get("ClusterName", "")
    # Locked: a process that submits the chain at this moment must find one of the two jobs.
    with locked_records({script.parent}, cluster) as records:
        successor = slurm.submit_text(script, *flags, patience=slurm.IN_A_JOB)
        # Without this entry (a full disk), the next submission finds the job by its script.
        with contextlib.suppress(OSError):
            records[script.parent].add(script.stem, successor)
    for dependent, dependency in _dependents(job).items():
        # A whole id: 12 must not be found in 123.
        moved = re.sub(rf":{job}\b", f":{successor}", dependency)
        order = ("update", f"JobId={dependent}", f"Dependency={moved}")
        slurm.check_output("scontrol", *order, patience=slurm.IN_A_JOB)
    return successor


def _dependents(job: str) -> dict[str, str]:
    """Return the dependencies of the jobs that wait for this one, by id."""
    words = ("--me", "--noheader", "--format=%A %E")
    listing = slurm.check_output("squeue", *words, patience=slurm.IN_A_JOB)
    waiting = dict(line.split(maxsplit=1) for line in listing.splitlines())
    # Slurm prints `afterok:8(unfulfilled),afterok:10_*(unfulfilled)`, and accepts
    # `afterok:8,afterok:10`.
    accepted = {own: re.sub(r"(_\*)?\(\w+\)", "", shown) for own, shown in waiting.items()}
    return {own: text for own, text in accepted.items() if re.search(rf":{job}\b", text)}


# Longer than all checks of a node take together.
_HEALTH_SECONDS = 240


class NoCheckError(DiffembedError):
    """The nodes could not be checked, for a reason that may not be theirs."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """The state of a job: still run by Slurm, and about to lose its nodes."""

    running: bool
    preempted: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """Faults of single nodes of a job, by node, and a fault that all nodes share."""

    nodes: Mapping[str, str]
    shared: str


def own_id() -> str:
    """Return the id by which this job alone can be requeued."""
    # The plain id of an array's last element means the whole array.
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def node_names() -> list[str]:
    """Return the names of this job's nodes."""
    return _expand(os.environ["SLURM_JOB_NODELIST"])


def first_address() -> str:
    """Return the address of the first node."""
    return address(node_names()[0])


def address(node: str) -> str:
    """Return the address by which Slurm reaches a node, whose name need not resolve."""
    shown = slurm.check_output("scontrol", "show", "node", node, "--oneliner", patience=IN_A_JOB)
    found = re.search(r"NodeAddr=(\S+)", shown)
    return found[1] if found else node


def read_state(job: str) -> JobState:
    """Read the state of a job from Slurm.

    Raises:
        NoAnswerError: Slurm did not answer for an hour; the state is unknown.
    """
    fields = _fields(job)
    return JobState(
        running=fields.get("JobState") == "RUNNING",
        preempted=fields.get("PreemptTime", "None") != "None",
    )


def seconds_left(job: str) -> float:
    """Return the time until Slurm ends a job.

    Raises:
        DiffembedError: Slurm shows no time limit.
    """
    shown = _fields(job).get("EndTime", "")
    try:
        return datetime.datetime.fromisoformat(shown).timestamp() - time.time()
    except ValueError as error:
        raise DiffembedError(f"job {job}: Slurm shows no time limit (EndTime={shown})") from error


def excluded_nodes(job: str) -> tuple[str, ...]:
    """Return the nodes that a job already excludes, in Slurm's notation."""
    names = _fields(job).get("ExcNodeList", "(null)")
    return () if names == "(null)" else (names,)


def are_enough_left(job: str, without: tuple[str, ...]) -> bool:
    """Return True if a job's partitions have enough nodes without some."""
    # A job may name several partitions and starts in any of them.
    partitions = _fields(job).get("Partition", "")
    total = 0
    for name in filter(None, partitions.split(",")):
        shown = slurm.check_output("scontrol", "show", "partition", name, patience=IN_A_JOB)
        found = re.search(r"TotalNodes=(\d+)", shown)
        total += int(found[1]) if found else 0
    lost = len(_expand(",".join(without)))
    # A size that Slurm does not show is no reason to give up.
    return not total or total - lost >= int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def requeue(job: str, *, without: tuple[str, ...] = ()) -> str:
    """Requeue this job, which ends it soon after.

    Args:
        job: its id.
        without: nodes that it must not get again.

    Returns:
        Slurm's reason for a refusal; empty if it accepts.
    """
    done = _scontrol("requeue", job)
    # A command whose answer was lost may be refused the second time.
    if done.returncode and read_state(job).running:
        return slurm.complaint(done)
    if without:
        # Only now: the nodes of a running job cannot be changed.
        _scontrol("update", f"JobId={job}", f"ExcNodeList={','.join(without)}")
    return ""


def check_nodes(run_folder: Path) -> Faults:
    """Check all nodes of this job; return the faults of the unfit ones.

    Raises:
        NoCheckError: the check could not be started at all.
    """
    nodes = node_names()
    answers = slurm.retry_unanswered(lambda: _run_checks(nodes, run_folder), IN_A_JOB)
    return attribute_faults({node: answers.get(node) for node in nodes})


def attribute_faults(answers: Mapping[str, Health | None]) -> Faults:
    """Decide if faults belong to single nodes or to all; None is a node that did not answer.

    A fault of the run's folder, or of the clock, that all of several nodes report belongs to the
    file server.
    """
    several = len(answers) > 1
    if several and all(health is None for health in answers.values()):
        return Faults(nodes={}, shared=f"none of {len(answers)} nodes answers")
    given = {node: health for node, health in answers.items() if health}
    shared = [fault for health in given.values() for fault in health.shared]
    if several and all(health and health.folder for health in answers.values()):
        shared += [fault for health in given.values() for fault in health.folder]
    if shared:
        return Faults(nodes={}, shared=shared[0])
    if several and all(health and health.clock for health in answers.values()):
        # No other node would be better, and training works.
        node, health = next(iter(given.items()))
        print(
            f"{node}: {health.clock[0]}, as on all nodes: the server's clock is wrong", flush=True
        )
        given = {node: dataclasses.replace(health, clock=()) for node, health in given.items()}
    # A check that hangs is as bad as a fault: training would hang on that node too.
    silent = {node: "its check did not answer" for node in answers if node not in given}
    unfit = {node: health.message for node, health in given.items() if health.message}
    return Faults(nodes=silent | unfit, shared="")


def _run_checks(nodes: list[str], run_folder: Path) -> dict[str, Health]:
    scratch = os.environ.get("NODE_SCRATCH", "/tmp")
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    words = ["srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"]
    words += [sys.executable, "-m", "pipeline.submission.health"]
    words += [str(run_folder), scratch, gpus]
    late = False
    try:
        # As bytes: lines of a site's login scripts may be in any encoding, or cut in a character.
        done = subprocess.run(words, capture_output=True, timeout=_HEALTH_SECONDS)
        printed, complaint = done.stdout, done.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired as error:
        # Nodes that have answered by now are kept; the others hang.
        late, printed, complaint = True, error.stdout or b"", ""
    output = printed.decode(errors="replace")
    # Other lines come from the site's login scripts.
    found = dict(re.findall(rf"^{MARK} (\S+): (.*)$", output, re.MULTILINE))
    if not found and not late:
        # srun itself failed, which says nothing about the nodes.
        if slurm.is_silence(complaint):
            raise slurm.no_answer(next(filter(slurm.is_silence, complaint.splitlines())))
        raise NoCheckError(f"the nodes could not be checked: {complaint.strip()}")
    return {node: Health(**json.loads(faults)) for node, faults in found.items()}


def _expand(names: str) -> list[str]:
    """Expand Slurm's notation of nodes to a list."""
    shown = slurm.check_output("scontrol", "show", "hostnames", names, patience=IN_A_JOB)
    return shown.split()


def _fields(job: str) -> dict[str, str]:
    words = ("show", "job", job, "--oneliner")
    shown = slurm.check_output("scontrol", *words, patience=IN_A_JOB, accepted="Invalid job id")
    return dict(re.findall(r"(\w+)=(\S+)", shown))


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of scontrol, repeated while Slurm does not answer."""
    return slurm.retry_unanswered(lambda: slurm.run("scontrol", *words), IN_A_JOB)


if __name__ == "__main__":
    with errors_end_the_process():
        print(first_address())
