"""The few questions and orders to Slurm, with its refusals in one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.errors import UserError
from pipeline.rank_variables import without_rank

# A busy controller answers late; Slurm's own commands give up after about as long.
_SECONDS = 120
# What a job sets for its own node.
_OF_A_NODE = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "TMPDIR")


def submission_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment to hand on to a new job: from a job or a rank, without what is its own."""
    if not {"SLURM_JOB_ID", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"} & environ.keys():
        return dict(environ)
    return {key: value for key, value in without_rank(environ).items() if key not in _OF_A_NODE}


def submit_text(path: Path, *flags: str) -> str:
    """Submit a batch script, with flags that win over its own; returns the job's id.

    Raises:
        UserError: Slurm refuses it, or cannot be asked.
    """
    done = _run("sbatch", "--parsable", *flags, str(path))
    _accept(done, path.name)
    # The id may be followed by the name of its cluster.
    return done.stdout.strip().split(";")[0]


def check_text(name: str, text: str) -> None:
    """Ask Slurm whether it could ever run a batch script.

    Raises:
        UserError: it could not, or cannot be asked.
    """
    _accept(_run("sbatch", "--test-only", stdin=text), name)


def active_jobs(ids: Iterable[str]) -> dict[str, str]:
    """Of some ids, the jobs that wait or run, with state and reason; an array is one job."""
    wanted = sorted(set(ids))
    if not wanted:
        return {}
    done = _run("squeue", "--noheader", "--format=%F %T (%r)", f"--jobs={','.join(wanted)}")
    # Slurm forgets ended jobs; a single id that it does not know is an error to it.
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"squeue: {_first_line(done.stderr)}", fix="try again when Slurm answers")
    shown = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    return {job: state.replace(" (None)", "").lower() for job, state in shown}


def max_array_size() -> int:
    """The smallest number that an element of an array may not have."""
    shown = ask("scontrol", "show", "config")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return int(found.group(1)) if found else 1001  # Slurm's default


def ask(command: str, *words: str) -> str:
    """What a command of Slurm prints.

    Raises:
        UserError: it refuses, or cannot be asked.
    """
    done = _run(command, *words)
    if done.returncode:
        raise UserError(
            f"{command}: {_first_line(done.stderr)}", fix="try again when Slurm answers"
        )
    return done.stdout


def _run(command: str, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    if shutil.which(command) is None:
        raise UserError(
            f"{command}: not found", fix="submit on a node that has Slurm; --dry-run works anywhere"
        )
    try:
        return subprocess.run(
            [command, *words],
            input=stdin,
            env=submission_environment(os.environ),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{command} did not answer within {_SECONDS} s", fix="look at squeue, then try again"
        ) from error


def _accept(done: subprocess.CompletedProcess[str], name: str) -> None:
    if done.returncode:
        raise UserError(
            f"{name}: sbatch says {_first_line(done.stderr)}",
            fix="correct the flags in slurm/cluster.env, or --sbatch",
        )


def _first_line(text: str) -> str:
    """The first line that says something, without the name of the command."""
    lines = [line for line in text.splitlines() if line.strip()]
    line = next((x for x in lines if "error" in x.lower() or "failure" in x), "nothing")
    return re.sub(r"^\w+: (error: )?", "", line)
