"""The job that this process runs in, as Slurm sees it from inside."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from pipeline.errors import DiffembedError
from pipeline.submission.health import FIT, MARK

_HEALTH_SECONDS = 120
# A controller that moves to another machine is away for a minute or two.
_WAITS = (2, 5, 10, 20, 40, 80)
_SILENT = "Unable to contact|timed out|Zero Bytes"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Whether Slurm still runs a job, and whether it takes its nodes away."""

    running: bool
    preempted: bool


def own_id() -> str:
    """The id by which this job alone can be queued again."""
    # The plain id of an array's last element means the whole array.
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def read_state(job: str) -> State:
    """Ask Slurm for the state of a job."""
    fields = _fields(job)
    return State(
        running=fields.get("JobState") == "RUNNING",
        preempted=fields.get("PreemptTime", "None") != "None",
    )


def excluded_nodes(job: str) -> tuple[str, ...]:
    """Nodes that a job must not get already, in Slurm's notation."""
    names = _fields(job).get("ExcNodeList", "(null)")
    return () if names == "(null)" else (names,)


def requeue(job: str, *, without: tuple[str, ...] = ()) -> str:
    """Queue this job again; it ends soon after.

    Args:
        job: its id.
        without: all nodes that it must not get any more.

    Returns:
        Why Slurm refuses; empty when it does not.
    """
    done = scontrol("requeue", job)
    if done.returncode:
        return done.stderr.strip()
    if without:
        # Only now: the nodes of a job that runs cannot be changed.
        scontrol("update", f"JobId={job}", f"ExcNodeList={','.join(without)}")
    return ""


def find_faults(run_folder: Path) -> dict[str, str]:
    """What is wrong with which node of this job; nodes that are fit are left out.

    Raises:
        DiffembedError: the check could not be started at all.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    nodes = scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).stdout.split()
    scratch = os.environ.get("NODE_SCRATCH", "/tmp")
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    words = ["srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"]
    words += [sys.executable, "-m", "pipeline.submission.health"]
    words += [str(run_folder), scratch, gpus]
    late = False
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_HEALTH_SECONDS)
        output, complaint = done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        late, output, complaint = True, (error.stdout or b"").decode(), ""
    answers = dict(re.findall(rf"^{MARK} (\S+): (.*)$", output, re.MULTILINE))
    if not answers and not late:
        raise DiffembedError(f"the nodes could not be checked: {complaint.strip()}")
    silent = f"no answer within {_HEALTH_SECONDS} s" if late else "its check died"
    said = {node: answers.get(node, silent) for node in nodes}
    return {node: fault for node, fault in said.items() if fault != FIT}


def _fields(job: str) -> dict[str, str]:
    shown = scontrol("show", "job", job, "--oneliner").stdout
    return dict(re.findall(r"(\w+)=(\S+)", shown))


def scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `scontrol`, with patience while the controller restarts; a refusal is in the answer."""
    for wait in (*_WAITS, None):
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True)
        if wait is None or not re.search(_SILENT, done.stderr):
            break
        time.sleep(wait)
    return done
