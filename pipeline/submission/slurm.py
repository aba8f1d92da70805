"""Run Slurm's commands, and record the jobs submitted from a folder.

A controller that does not answer has neither refused nor accepted. Commands without side effects
are repeated for a while; a submission whose answer is lost is first searched for in the queue.

An id alone does not identify a job: another cluster, a Slurm that lost its state, and a copy of
the folder all have jobs with the same ids. A job in the queue belongs to a folder if its batch
script is in it, or if the job still matches the record of a submission from this very folder.
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
# Set by every batch script of `diffembed submit`: the path of that script.
SCRIPT_VARIABLE = "DIFFEMBED_BATCH_SCRIPT"
# The longest pause between two attempts, in seconds.
LONGEST_WAIT = 30


def retry(
    call: Callable[[], T],
    *,
    on: type[Exception],
    seconds: float,
    tell: Callable[[BaseException], None],
) -> T:
    """Repeat a call while it raises an error of one kind, at growing intervals.

    Args:
        call: the function to try.
        on: the kind of error; any other error is raised at once.
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


# A busy controller answers late; Slurm's own commands time out after about as long.
_COMMAND_SECONDS = 120
# How long to repeat a command without an answer: while a person waits, and while a job waits.
AT_SUBMISSION = 60
IN_A_JOB = 3600
# A job whose submission lost its answer may enter the queue shortly after the controller is back.
_SETTLING = (0, 2, 5)
_SILENT = re.compile(
    r"unable to contact|timed out|zero bytes|connection (refused|reset|fail)|connect failure"
    r"|communication (connection )?failure|standby mode|not responding|munge encode failed",
    re.IGNORECASE,
)
# Variables that a job sets for its own node.
_OF_A_NODE = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "TMPDIR")
# Variables that override lines of a batch script on which the submission depends.
_OF_A_SUBMISSION = (
    *("SBATCH_ARRAY_INX", "SBATCH_ERROR", "SBATCH_JOB_NAME", "SBATCH_OUTPUT", "SBATCH_WAIT"),
)
# A user's own settings of the other commands: they hide jobs, change formats, ask before they act.
_OF_A_USER = re.compile(r"(SQUEUE|SCANCEL|SCONTROL)_.*|SLURM_TIME_FORMAT")
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
}
# No name or path contains this character.
_SEPARATOR = "\x1f"
_FIELDS = _SEPARATOR.join(("%F", "%j", "%V", "%T", "%r", "%E", "%o"))


class NoAnswerError(UserError):
    """Slurm did not answer: the command may or may not have had its effect."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QueuedJob:
    """A job as `squeue` shows it; an array is one job.

    Args:
        id: by which Slurm knows it.
        name: of the job.
        command: the path of its batch script.
        submitted: when it was submitted or queued again, by the controller's clock.
        states: of its elements, such as `RUNNING`.
        reason: for waiting.
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
        """True while any element of it waits or runs."""
        return not self.states <= _ENDED

    @property
    def has_started(self) -> bool:
        """True if any element of it is neither waiting nor ended."""
        return bool(self.states - _ENDED - {"PENDING"})

    @property
    def description(self) -> str:
        """Its state and reason, for messages."""
        state = min(self.states - _ENDED, default=min(self.states)).lower()
        return state if self.reason == "None" else f"{state} ({self.reason.lower()})"


def submission_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a new job, without variables of the current job or rank."""
    own = {key: value for key, value in environ.items() if key not in _OF_A_SUBMISSION}
    # Neither in a job nor a rank: a login node, whose environment belongs to the user.
    if not {"SLURM_JOB_ID", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"} & environ.keys():
        return own
    return {key: value for key, value in without_rank(own).items() if key not in _OF_A_NODE}


def query_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for commands whose output is read here."""
    own = submission_environment(environ)
    return {key: value for key, value in own.items() if not _OF_A_USER.fullmatch(key)}


def submit_text(path: Path, *flags: str, patience: float = AT_SUBMISSION) -> str:
    """Submit a batch script once, with flags that override its own; return the job's id.

    Raises:
        UserError: Slurm refuses it, does not answer, or prints no id.
    """
    path = path.absolute()
    # Ids before the submission: if its answer is lost, a job with another id is the new one.
    known = {job.id for job in list_jobs(patience=patience) if job.command == str(path)}

    def attempt() -> str:
        try:
            done = run("sbatch", "--parsable", *flags, str(path))
        except NoAnswerError:
            # The controller may have accepted it all the same.
            if found := _find_new(path, known):
                return found
            raise
        _accept(done, path.name)
        # Warnings of the site, such as about a deprecated partition.
        if done.stderr.strip():
            print(done.stderr.strip(), file=sys.stderr, flush=True)
        job = job_id(done.stdout) or _find_new(path, known)
        if not job:
            printed = _joined(done.stdout) or "nothing"
            raise UserError(
                f"{path.name}: sbatch prints no job id: {printed}",
                fix="look at squeue; the first sbatch on PATH must print the id",
            )
        return job

    return retry_unanswered(attempt, patience)


def job_id(answer: str) -> str:
    """Return the id in the output of `sbatch --parsable`, which a site may surround by other lines.

    Empty if no line, or more than one, looks like an id.
    """
    # The id may be followed by the name of its cluster.
    found = re.findall(r"^\s*(\d+)(?:;[^;\n]*)?\s*$", answer, re.MULTILINE)
    found = re.findall(r"^Submitted batch job (\d+)", answer, re.MULTILINE) or found
    return found[0] if len(found) == 1 else ""


def _find_new(path: Path, known: Collection[str]) -> str:
    """Return the id of a new job with this batch script, or nothing."""
    for seconds in _SETTLING:
        time.sleep(seconds)
        jobs = list_jobs(patience=IN_A_JOB)
        new = {job.id for job in jobs if job.command == str(path)} - set(known)
        if new:
            return max(new, key=int)
    return ""


# Slurm's answer to a test where no node could ever run the job, and also where the nodes that could
# are down or drained now. Submitted, the second job waits for them.
NO_NODES = "Requested node configuration is not available"


def check_text(name: str, text: str, *, by_submission: bool = False) -> None:
    """Check that Slurm could run a batch script at some time.

    Args:
        name: of the job, for messages.
        text: of the script.
        by_submission: in doubt, submit it for a day far away, and cancel it.

    Raises:
        UserError: it could not, or does not answer.
    """
    done = retry_unanswered(lambda: run("sbatch", "--test-only", stdin=text), AT_SUBMISSION)
    in_doubt = done.returncode and NO_NODES in complaint(done)
    if not (by_submission and in_doubt and _may_wait_for_nodes(text)):
        _accept(done, name)


# Reasons for which a job waits forever.
_IMPOSSIBLE = re.compile(r"Partition(Config|NodeLimit|TimeLimit)|BadConstraints")


def _may_wait_for_nodes(text: str) -> bool:
    """Submit a job that cannot start soon, and cancel it; return True if Slurm lets it wait."""
    # By name, because the answer may be lost or hold no id.
    name = f"diffembed-check-{os.getpid()}"
    flags = ("--begin=now+30days", f"--job-name={name}", "--mail-type=NONE")
    # Of a held job, Slurm does not say whether it could run.
    text = re.sub("^#SBATCH (--hold|-H)$", "", text, flags=re.MULTILINE)
    try:
        done = retry_unanswered(lambda: run("sbatch", *flags, stdin=text), AT_SUBMISSION)
        shown = check_output("squeue", "--me", f"--name={name}", "--noheader", "--format=%r")
    finally:
        check_output("scancel", f"--user={os.getuid()}", f"--name={name}")
    return not done.returncode and not _IMPOSSIBLE.search(shown)


def list_jobs(ids: Iterable[str] = (), *, patience: float = AT_SUBMISSION) -> list[QueuedJob]:
    """Return this user's jobs, and the jobs with these ids, if Slurm still knows them.

    Raises:
        UserError: Slurm does not answer.
    """
    # All states: a job that was submitted a moment ago may have ended already.
    show = ("--noheader", "--states=all", f"--format={_FIELDS}")
    shown = check_output("squeue", "--me", *show, patience=patience)
    jobs = _parse_queue(shown)
    if missing := sorted(set(ids) - jobs.keys()):
        # Slurm forgets ended jobs, and fails for a single id that it does not know.
        words = ("squeue", f"--jobs={','.join(missing)}", *show)
        jobs |= _parse_queue(check_output(*words, patience=patience, accepted="Invalid job id"))
    return list(jobs.values())


def _parse_queue(shown: str) -> dict[str, QueuedJob]:
    jobs: dict[str, QueuedJob] = {}
    for line in shown.splitlines():
        # With several clusters, lines with their names come in between.
        if line.count(_SEPARATOR) != _FIELDS.count(_SEPARATOR):
            continue
        job, name, submitted, state, reason, dependency, command = line.split(_SEPARATOR)
        waits_for = frozenset(re.findall(r":(\d+)", dependency))
        # One line per element of an array, or per group of equal ones.
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
    """Cancel a job that waits."""
    # It may have ended since the queue was read.
    check_output("scancel", job, accepted="Invalid job id|already completing or completed")


def read_settings() -> dict[str, str]:
    """Return the settings of this Slurm, such as `ClusterName`."""
    return parse_settings(check_output("scontrol", "show", "config"))


def parse_settings(shown: str) -> dict[str, str]:
    """Return the settings in what `scontrol show config` prints."""
    return dict(re.findall(r"^(\w+)\s*=[ \t]*(.*?)\s*$", shown, re.MULTILINE))


def check_output(
    command: str, *words: str, patience: float = AT_SUBMISSION, accepted: str = ""
) -> str:
    """Return the output of one of Slurm's commands, repeated while Slurm does not answer.

    Args:
        command: its name.
        words: its arguments.
        patience: for how many seconds it is repeated.
        accepted: a pattern of error messages that count as an answer.

    Raises:
        UserError: the command fails, or Slurm does not answer.
    """
    done = retry_unanswered(lambda: run(command, *words), patience)
    if done.returncode and not (accepted and re.search(accepted, done.stderr)):
        raise UserError(
            f"{command}: {complaint(done) or f'exit code {done.returncode}'}",
            fix="try again when Slurm answers",
        )
    return done.stdout


def retry_unanswered(call: Callable[[], T], seconds: float) -> T:
    """Repeat a call while Slurm does not answer, with one line on stderr.

    Raises:
        NoAnswerError: Slurm did not answer for this many seconds.
    """

    def tell(error: BaseException) -> None:
        assert isinstance(error, NoAnswerError)
        print(f"{error.found}; waiting for it, up to {seconds:.0f} s", file=sys.stderr)

    return retry(call, on=NoAnswerError, seconds=seconds, tell=tell)


def run(command: str, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands once; the caller checks its exit code.

    Raises:
        NoAnswerError: the controller cannot be reached.
        UserError: there is no such command.
    """
    if shutil.which(command) is None:
        raise UserError(
            f"{command}: not found",
            fix="submit on a node that has Slurm; --dry-run works anywhere",
            docs="trouble.md#no-slurm",
        )
    # sbatch hands its environment to the job.
    environment = submission_environment if command == "sbatch" else query_environment
    try:
        done = subprocess.run(
            [command, *words],
            input=stdin,
            env=environment(os.environ),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise no_answer(f"{command} did not answer within {_COMMAND_SECONDS} s") from error
    # Slurm has no exit code for this; only the message differs from a refusal.
    if done.returncode and _SILENT.search(done.stderr):
        raise no_answer(f"{command}: {complaint(done)}")
    return done


def no_answer(what: str) -> NoAnswerError:
    """Return the error for a controller that does not answer."""
    return NoAnswerError(
        what, fix="try again when Slurm answers; a job that it has accepted will be found"
    )


def is_silence(complaint: str) -> bool:
    """Return True for an error message about a controller that cannot be reached."""
    return bool(_SILENT.search(complaint))


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """Return everything that a failed command printed, in one line: the reason may be anywhere."""
    return _joined(done.stderr) or _joined(done.stdout)


def _joined(text: str) -> str:
    """Join lines, without decoration and without the name of the command before each."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if re.search(r"\w", line)))


def _accept(done: subprocess.CompletedProcess[str], name: str) -> None:
    if done.returncode:
        reason = complaint(done)
        fix = "correct the flags in slurm/cluster.env, or --sbatch; if they were accepted before, "
        fix += "ask the site's support"
        # Limits of a QOS, an account or the whole cluster, which no flag changes.
        if re.search(r"MaxSubmitJob|MaxJobs?Count|[Tt]emporarily un", reason):
            fix = "submit again when some of your jobs have ended; jobs that wait or run are kept"
        raise UserError(
            f"{name}: sbatch: {reason or f'no message, exit code {done.returncode}'}", fix=fix
        )


_SUFFIX = ".sbatch"


class JobRecord:
    """The jobs that were submitted from one folder, by key, kept in its `jobs.json`.

    Args:
        folder: holds the batch scripts and `jobs.json`.
        cluster: name of the current Slurm cluster.
    """

    def __init__(self, folder: Path, cluster: str) -> None:
        self.path = folder / "jobs.json"
        self._folder, self._cluster = folder.resolve(), cluster
        self._jobs, self.is_damaged = _read(self.path)

    def ids(self) -> list[str]:
        """Return the ids that this cluster may know, including ended jobs."""
        return [entry["id"] for entry in self._jobs.values() if not self._is_elsewhere(entry)]

    def elsewhere(self, job: Job) -> str:
        """Return the other cluster that has this job, and its id there; empty if none has."""
        entry = self._jobs.get(job.key, {})
        return f"{entry['cluster']} (job {entry['id']})" if self._is_elsewhere(entry) else ""

    def find(self, queue: Iterable[QueuedJob]) -> dict[str, QueuedJob]:
        """Select the jobs that belong to this folder and wait or run, by key."""
        found: dict[str, QueuedJob] = {}
        # Of two jobs with one script, the later continues the earlier.
        for job in sorted(queue, key=lambda job: int(job.id)):
            if job.is_active and (key := self._key_of(job)):
                found[key] = job
        return found

    def _key_of(self, job: QueuedJob) -> str:
        script = Path(job.command)
        if script.suffix == _SUFFIX and script.parent.resolve() == self._folder:
            return script.stem
        # A site's own `sbatch` may submit a copy of the script.
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
        """Record a submitted job; it is on disk when this returns."""
        # This clock until `confirm` replaces it: the controller's may differ.
        now = datetime.datetime.now().isoformat(timespec="seconds")
        self._jobs[key] = {
            "name": job_name(key),
            "id": job_id,
            "submitted": now,
            "cluster": self._cluster,
            "folder": str(self._folder),
        }
        write_json(self.path, self._jobs)

    def confirm(self, queue: Iterable[QueuedJob]) -> None:
        """Record how Slurm shows the added jobs, with the times of its clock."""
        shown = {job.id: job for job in queue}
        for entry in self._jobs.values():
            job = shown.get(entry["id"])
            if job and entry.get("folder") == str(self._folder) and "seen" not in entry:
                entry |= {"submitted": job.submitted, "seen": [job.name, job.command]}
        write_json(self.path, self._jobs)

    def _is_elsewhere(self, entry: dict[str, Any]) -> bool:
        return bool(entry.get("cluster", self._cluster) != self._cluster)


def job_name(key: str) -> str:
    """Return the name of the job with this key (see `Job.key`)."""
    return key.rpartition("-")[0]


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], bool]:
    """Return the entries of `jobs.json`, and True if it was damaged: the queue has the rest."""
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
def locked_records(folders: set[Path], cluster: str) -> Iterator[dict[Path, JobRecord]]:
    """Yield the records of folders, locked; wait while another process submits from them.

    Raises:
        UserError: a folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        # Sorted: two processes that lock folders in different orders would wait for each other.
        for folder in sorted(folders):
            try:
                stack.enter_context(one_at_a_time(folder / ".lock"))
            except OSError as error:
                raise UserError(
                    f"{folder}: cannot be written ({error.strerror})",
                    fix="choose another output_dir",
                ) from error
        yield {folder: JobRecord(folder, cluster) for folder in folders}
