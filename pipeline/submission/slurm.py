"""Commands to Slurm: submit, list, cancel, wait for an answer; settings of the site.

A controller that does not answer has neither refused nor accepted: questions are asked again for a
while, and a submission whose answer is lost is looked for in the queue before it is sent again.

A number alone is not a job: another cluster, a Slurm that lost its state, and the copy of a folder
all have jobs of the same numbers. A job in the queue belongs to a folder when its batch script lies
there, or when it is still exactly what was noted there of a submission from this very folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential,
)

from pipeline.errors import UserError
from pipeline.files import one_at_a_time, write_json
from pipeline.launch import without_rank
from pipeline.submission.jobs import Job

T = TypeVar("T")
# Seconds between two tries at most.
LONGEST_WAIT = 30


def repeat(
    call: Callable[[], T],
    *,
    on: type[Exception],
    seconds: float,
    tell: Callable[[BaseException], None],
) -> T:
    """Repeat a call while it raises an error of one kind, at growing intervals.

    Args:
        call: what to try.
        on: the kind of error; any other one is raised at once.
        seconds: after which the last error is raised.
        tell: called once, with the first error, before the first wait.
    """

    def before_sleep(state: RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        if state.attempt_number == 1 and error:
            tell(error)

    retrying = Retrying(
        retry=retry_if_exception_type(on),
        wait=wait_exponential(max=LONGEST_WAIT),
        stop=stop_after_delay(seconds),
        before_sleep=before_sleep,
        reraise=True,
    )
    return retrying(call)


# A busy controller answers late; Slurm's own commands give up after about as long.
_COMMAND_SECONDS = 120
# For how long a question is repeated: while a person waits, and while a job does.
AT_SUBMISSION = 60
IN_A_JOB = 3600
# A job whose submission was cut off may enter the queue shortly after the controller answers again.
_SETTLING = (0, 2, 5)
_SILENT = re.compile(
    r"unable to contact|timed out|zero bytes|connection (refused|reset|fail)|connect failure"
    r"|communication (connection )?failure|standby mode|not responding|munge encode failed",
    re.IGNORECASE,
)
# What a job sets for its own node.
_OF_A_NODE = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "TMPDIR")
# Variables that win over the lines of a batch script, and would break what depends on them.
_OF_A_SUBMISSION = (
    *("SBATCH_ARRAY_INX", "SBATCH_ERROR", "SBATCH_JOB_NAME", "SBATCH_OUTPUT", "SBATCH_WAIT"),
)
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
}
# No name or path holds this character.
_SEPARATOR = "\x1f"
_FIELDS = _SEPARATOR.join(("%F", "%j", "%V", "%T", "%r", "%E", "%o"))


class NoAnswerError(UserError):
    """Slurm did not answer: nothing is known about what it was asked or told."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QueuedJob:
    """A job as `squeue` shows it; an array is one job.

    Args:
        id: by which Slurm knows it.
        name: of the job.
        command: the path of its batch script.
        submitted: when it was submitted or queued again, by the controller's clock.
        states: of its parts, such as `RUNNING`.
        reason: why it waits.
        waits_for: ids of jobs that must end first.
    """

    id: str
    name: str
    command: str
    submitted: str
    states: frozenset[str]
    reason: str
    waits_for: frozenset[str]

    @property
    def is_active(self) -> bool:
        """True while a part of it waits or runs."""
        return not self.states <= _ENDED

    @property
    def has_started(self) -> bool:
        """True when a part of it is neither waiting nor ended."""
        return bool(self.states - _ENDED - {"PENDING"})

    @property
    def words(self) -> str:
        """State and reason, for people."""
        state = min(self.states - _ENDED, default=min(self.states)).lower()
        return state if self.reason == "None" else f"{state} ({self.reason.lower()})"


def submission_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment to hand on to a new job: from a job or a rank, without what is its own."""
    own = {key: value for key, value in environ.items() if key not in _OF_A_SUBMISSION}
    if not {"SLURM_JOB_ID", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"} & environ.keys():
        return own
    return {key: value for key, value in without_rank(own).items() if key not in _OF_A_NODE}


def submit_text(path: Path, *flags: str, patience: float = AT_SUBMISSION) -> str:
    """Submit a batch script once, with flags that win over its own; returns the job's id.

    Raises:
        UserError: Slurm refuses it, cannot be asked, or says nothing that holds an id.
    """
    path = path.absolute()
    known = {job.id for job in list_jobs(patience=patience) if job.command == str(path)}

    def attempt() -> str:
        try:
            done = run("sbatch", "--parsable", *flags, str(path))
        except NoAnswerError:
            # The controller may have taken it all the same.
            if found := _find_new(path, known):
                return found
            raise
        _accept(done, path.name)
        if done.stderr.strip():
            print(done.stderr.strip(), file=sys.stderr, flush=True)
        job = job_id(done.stdout) or _find_new(path, known)
        if not job:
            said = _joined(done.stdout) or "nothing"
            raise UserError(
                f"{path.name}: sbatch prints no job id: {said}",
                fix="look at squeue; the sbatch that comes first on PATH must print the id",
            )
        return job

    return patiently(attempt, patience)


def job_id(answer: str) -> str:
    """The id in the output of `sbatch --parsable`, which a site may surround by other lines.

    Empty where no line, or more than one, could be it.
    """
    # The id may be followed by the name of its cluster.
    found = re.findall(r"^\s*(\d+)(?:;[^;\n]*)?\s*$", answer, re.MULTILINE)
    found = re.findall(r"^Submitted batch job (\d+)", answer, re.MULTILINE) or found
    return found[0] if len(found) == 1 else ""


def _find_new(path: Path, known: Collection[str]) -> str:
    """The id of a job of this batch script that was not there before."""
    for seconds in _SETTLING:
        time.sleep(seconds)
        jobs = list_jobs(patience=IN_A_JOB)
        new = {job.id for job in jobs if job.command == str(path)} - set(known)
        if new:
            return max(new, key=int)
    return ""


def check_text(name: str, text: str) -> None:
    """Ask Slurm whether it could ever run a batch script.

    Raises:
        UserError: it could not, or cannot be asked.
    """
    _accept(patiently(lambda: run("sbatch", "--test-only", stdin=text), AT_SUBMISSION), name)


def list_jobs(ids: Iterable[str] = (), *, patience: float = AT_SUBMISSION) -> list[QueuedJob]:
    """This user's jobs, and others by their ids, as far as Slurm still knows them.

    Raises:
        UserError: Slurm cannot be asked.
    """
    show = ("--noheader", "--states=all", f"--format={_FIELDS}")
    shown = ask("squeue", "--me", *show, patience=patience)
    jobs = _parse_queue(shown)
    if missing := sorted(set(ids) - jobs.keys()):
        # Slurm forgets ended jobs; a single id that it does not know is an error to it.
        words = ("squeue", f"--jobs={','.join(missing)}", *show)
        jobs |= _parse_queue(ask(*words, patience=patience, accepted="Invalid job id"))
    return list(jobs.values())


def _parse_queue(shown: str) -> dict[str, QueuedJob]:
    jobs: dict[str, QueuedJob] = {}
    for line in shown.splitlines():
        # With several clusters, their names stand between the lines.
        if line.count(_SEPARATOR) != _FIELDS.count(_SEPARATOR):
            continue
        job, name, submitted, state, reason, dependency, command = line.split(_SEPARATOR)
        waits_for = frozenset(re.findall(r":(\d+)", dependency))
        states = frozenset((state,))
        if earlier := jobs.get(job):
            states, waits_for = states | earlier.states, waits_for | earlier.waits_for
        jobs[job] = QueuedJob(
            id=job,
            name=name,
            command=command,
            submitted=submitted,
            states=states,
            reason=reason,
            waits_for=waits_for,
        )
    return jobs


def cancel(job: str) -> None:
    """End a job that waits."""
    ask("scancel", job, accepted="Invalid job id|already completing or completed")


def read_settings() -> dict[str, str]:
    """The settings of this Slurm, such as `ClusterName`."""
    shown = ask("scontrol", "show", "config")
    return dict(re.findall(r"^(\w+)\s*=[ \t]*(.*?)\s*$", shown, re.MULTILINE))


def ask(command: str, *words: str, patience: float = AT_SUBMISSION, accepted: str = "") -> str:
    """Return the output of a command of Slurm.

    Args:
        command: its name.
        words: its arguments.
        patience: for how many seconds it is repeated while Slurm does not answer.
        accepted: a pattern of complaints that are answers.

    Raises:
        UserError: it refuses, or cannot be asked.
    """
    done = patiently(lambda: run(command, *words), patience)
    if done.returncode and not (accepted and re.search(accepted, done.stderr)):
        raise UserError(
            f"{command}: {complaint(done) or f'exit code {done.returncode}'}",
            fix="try again when Slurm answers",
        )
    return done.stdout


def patiently(call: Callable[[], T], seconds: float) -> T:
    """Repeat a call while Slurm does not answer, with a line on stderr; give up after a while.

    Raises:
        NoAnswerError: Slurm never answered.
    """

    def tell(error: BaseException) -> None:
        assert isinstance(error, NoAnswerError)
        print(f"{error.found}; waiting for it, up to {seconds:.0f} s", file=sys.stderr)

    return repeat(call, on=NoAnswerError, seconds=seconds, tell=tell)


def run(command: str, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm once; a refusal is in the answer.

    Raises:
        NoAnswerError: the controller cannot be reached.
        UserError: there is no such command.
    """
    if shutil.which(command) is None:
        raise UserError(
            f"{command}: not found", fix="submit on a node that has Slurm; --dry-run works anywhere"
        )
    try:
        done = subprocess.run(
            [command, *words],
            input=stdin,
            env=submission_environment(os.environ),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise no_answer(f"{command} did not answer within {_COMMAND_SECONDS} s") from error
    if done.returncode and _SILENT.search(done.stderr):
        raise no_answer(f"{command}: {complaint(done)}")
    return done


def no_answer(what: str) -> NoAnswerError:
    """The error for a controller that says nothing."""
    return NoAnswerError(
        what, fix="try again when Slurm answers; a job that it has taken is found then"
    )


def is_silence(complaint: str) -> bool:
    """True when a command of Slurm failed because the controller could not be reached."""
    return bool(_SILENT.search(complaint))


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """Everything a command complains about, in one line: the reason may stand anywhere in it."""
    return _joined(done.stderr) or _joined(done.stdout)


def _joined(text: str) -> str:
    """Lines as one, without ornaments and without the name of the command before each."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if re.search(r"\w", line)))


def _accept(done: subprocess.CompletedProcess[str], name: str) -> None:
    if done.returncode:
        raise UserError(
            f"{name}: sbatch says {complaint(done) or f'nothing (exit code {done.returncode})'}",
            fix="correct the flags in slurm/cluster.env, or --sbatch; if they were accepted "
            "before, ask the site",
        )


_SUFFIX = ".sbatch"


class Record:
    """The jobs of one folder, by key; as many keys as configs were submitted.

    Args:
        folder: holds the batch scripts and `jobs.json`.
        cluster: name of the Slurm that is asked.
    """

    def __init__(self, folder: Path, cluster: str) -> None:
        self.path = folder / "jobs.json"
        self._folder, self._cluster = folder.resolve(), cluster
        self._jobs, self.is_damaged = _read(self.path)

    def ids(self) -> list[str]:
        """Ids that this cluster may know, ended jobs included."""
        return [entry["id"] for entry in self._jobs.values() if not self._is_elsewhere(entry)]

    def elsewhere(self, job: Job) -> str:
        """The other cluster that has got this job, and its id there; empty when none has."""
        entry = self._jobs.get(job.key, {})
        return f"{entry['cluster']} (job {entry['id']})" if self._is_elsewhere(entry) else ""

    def find(self, queue: Iterable[QueuedJob]) -> dict[str, QueuedJob]:
        """Those of some jobs that belong to this folder and wait or run, by key."""
        found: dict[str, QueuedJob] = {}
        # Of two with one script, the later one continues the earlier one.
        for job in sorted(queue, key=lambda job: int(job.id)):
            if job.is_active and (key := self._key_of(job)):
                found[key] = job
        return found

    def _key_of(self, job: QueuedJob) -> str:
        script = Path(job.command)
        if script.suffix == _SUFFIX and script.parent.resolve() == self._folder:
            return script.stem
        # A site's own sbatch may submit a copy of the script.
        for key, entry in self._jobs.items():
            if (
                entry["id"] == job.id
                and not self._is_elsewhere(entry)
                and entry.get("folder") == str(self._folder)
                and entry.get("seen") == [job.name, job.command]
                # A job that is queued again counts as submitted later.
                and entry["submitted"] <= job.submitted
            ):
                return key
        return ""

    def add(self, key: str, job_id: str) -> None:
        """Note a submitted job; it is on disk when this returns."""
        now = datetime.datetime.now().isoformat(timespec="seconds")
        self._jobs[key] = {
            "name": name_of(key),
            "id": job_id,
            "submitted": now,
            "cluster": self._cluster,
            "folder": str(self._folder),
        }
        write_json(self.path, self._jobs)

    def confirm(self, queue: Iterable[QueuedJob]) -> None:
        """Note how Slurm shows the jobs that were added, by its own clock."""
        shown = {job.id: job for job in queue}
        for entry in self._jobs.values():
            job = shown.get(entry["id"])
            if job and entry.get("folder") == str(self._folder) and "seen" not in entry:
                entry |= {"submitted": job.submitted, "seen": [job.name, job.command]}
        write_json(self.path, self._jobs)

    def _is_elsewhere(self, entry: dict[str, Any]) -> bool:
        return bool(entry.get("cluster", self._cluster) != self._cluster)


def name_of(key: str) -> str:
    """The name of the job with this key (see `Job.key`)."""
    return key.rpartition("-")[0]


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], bool]:
    """The entries of `jobs.json`, and True if it was damaged; Slurm's queue knows the rest."""
    if not path.exists():
        return {}, False
    try:
        tree = json.loads(path.read_text())
    except ValueError:
        return {}, True
    whole = {
        key: entry
        for key, entry in (tree.items() if isinstance(tree, dict) else ())
        if isinstance(entry, dict)
        and str(entry.get("id", "")).isdecimal()
        and isinstance(entry["id"], str)
        and isinstance(entry.get("submitted"), str)
    }
    return whole, not isinstance(tree, dict) or len(whole) < len(tree)


@contextlib.contextmanager
def locked_records(folders: set[Path], cluster: str) -> Iterator[dict[Path, Record]]:
    """The records of some folders while no other process submits to them; waits for one that does.

    Raises:
        UserError: a folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        # Sorted: two who lock the same folders in another order would wait for each other.
        for folder in sorted(folders):
            try:
                stack.enter_context(one_at_a_time(folder / ".lock"))
            except OSError as error:
                raise UserError(
                    f"{folder}: cannot be written ({error.strerror})",
                    fix="choose an output_dir of your own",
                ) from error
        yield {folder: Record(folder, cluster) for folder in folders}
