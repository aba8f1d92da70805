"""Decide whether a training job starts, ends, or is requeued; called by `slurm/train.sbatch`.

    python -m pipeline.submission.restart begin ARGUMENTS-OF-TRAIN.PY
    python -m pipeline.submission.restart late ARGUMENTS-OF-TRAIN.PY
    python -m pipeline.submission.restart end EXIT-CODE SIGNAL ARGUMENTS-OF-TRAIN.PY

    begin   count this start, check the nodes         -> train, requeue without unfit nodes, or fail
    late    sleep until just before the time limit    -> requeue, if a save takes too long
    end     read exit code, signal and Slurm's state  -> finished, requeue, or fail

Slurm itself requeues a job whose node dies, or whose grace time after preemption has passed; all
other ends are decided here. Each start is recorded in the run's folder, so that a job that starts
repeatedly from one step stops. Where a site forbids requeueing, a successor job continues.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.config import TrainConfig, load_config
from pipeline.errors import DiffembedError, errors_end_the_process
from pipeline.files import write_json
from pipeline.run_folder import RunDir, latest_step
from pipeline.submission import allocation
from pipeline.submission.allocation import submit_successor
from pipeline.submission.health import probe
from pipeline.submission.slurm import retry

# The end of a start that recorded none.
_UNKNOWN = "unknown: a node failed, or the job was killed"
# Also for what the file of an earlier version lacks: the code may change between two starts.
_START = {"time": "", "step": 0, "nodes": "", "end": _UNKNOWN, "unfit": False}


class History:
    """Every start of one job: its first step, its nodes, and its end.

    Each job has one file in the run's folder, so that a new job counts from zero.
    """

    def __init__(self, output_dir: Path, job: str) -> None:
        self._path = output_dir / "jobs" / f"starts-{job}.json"
        self._starts: list[dict[str, Any]] = []
        if self._path.exists():
            # With a damaged file, counting from zero is better than ending the run.
            with contextlib.suppress(ValueError, TypeError):
                self._starts = [{**_START, **start} for start in json.loads(self._path.read_text())]

    def start(self, step: int, nodes: str) -> None:
        """Record a start; it is on disk when this returns."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._starts.append({**_START, "time": now, "step": step, "nodes": nodes})
        write_json(self._path, self._starts)

    def end(self, how: str, *, unfit: bool = False) -> None:
        """Record the end of the newest start; `unfit` if it never trained."""
        for entry in self._starts[-1:]:  # none if the file was damaged
            entry |= {"end": how, "unfit": unfit}
        write_json(self._path, self._starts)

    def hand_over(self, job: str) -> None:
        """Copy the starts to the job that continues this one."""
        write_json(self._path.with_name(f"starts-{job}.json"), self._starts)

    @property
    def num_starts(self) -> int:
        """The number of all starts."""
        return len(self._starts)

    @property
    def num_unfit(self) -> int:
        """The number of starts that never trained."""
        return sum(entry["unfit"] for entry in self._starts)

    def idle_starts(self, step: int) -> int:
        """Return the number of starts that trained from `step`."""
        return len(self.endings(step))

    def endings(self, step: int) -> list[str]:
        """Return the ends of the starts that trained from `step`."""
        starts = [entry for entry in self._starts if not entry["unfit"]]
        return [entry["end"] for entry in starts if entry["step"] == step]


# The limits of requeues without a new checkpoint, and of starts on unfit nodes.
MAX_IDLE = 3
_MAX_UNFIT = 3
# How long to wait for a shared folder that is full, read-only or away.
_SHARED_SECONDS = 1800
# How long before the time limit to requeue: enough for a slow controller.
_LAST_SECONDS = 30
_SLURM_ENDS_IT = "Slurm ends this job itself: cancelled, requeued, or a node failed"
T = TypeVar("T")
Verdict = Literal["requeue", "leave", "stuck"]


class SharedFaultError(DiffembedError):
    """Something that all nodes share is broken; no other node would be better."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """The end of a job's work.

    Args:
        code: its exit code.
        out_of_time: Slurm signalled that the job's time is nearly over.
        preempted: Slurm takes the nodes for a more urgent job.
        running: Slurm still runs the job: it is neither cancelled nor requeued.
        idle_starts: starts from the newest checkpoint, this one included.
        folder_fault: a fault of the run's folder, if it was checked.
        what: name of what has ended.
    """

    code: int
    out_of_time: bool
    preempted: bool
    running: bool
    idle_starts: int
    folder_fault: str = ""
    what: str = "the ranks"


def decide(ending: Ending) -> tuple[Verdict, str]:
    """Decide what to do with a job whose work has ended; return the decision and its reason."""
    if ending.code == 0:
        return "leave", "finished"
    if ending.code == 2 and not ending.folder_fault:
        return "leave", "exit code 2 is an error of the config or the data: it would fail again"
    if not ending.running:
        # `scontrol requeue` would bring a cancelled job back to life.
        return "leave", _SLURM_ENDS_IT
    must_leave = ending.out_of_time or ending.preempted
    if ending.code == 75 and not must_leave:
        return "leave", "stopped on request; submit again to continue"
    if ending.idle_starts > MAX_IDLE:
        return "stuck", ""
    if must_leave:
        return "requeue", "out of time" if ending.out_of_time else "preempted"
    fault = f", {ending.folder_fault}" if ending.folder_fault else ""
    return "requeue", f"{ending.what} ended with exit code {ending.code}{fault}"


def begin(config: TrainConfig, job: str) -> None:
    """Record this start and let it train, unless it is one too many or a node is unfit.

    Raises:
        DiffembedError: no progress, a run folder that stays full or away, or unfit nodes; in the
            last case the job was requeued without them, up to a limit.
    """
    # Recorded before anything can fail, so that even a start that dies at once counts.
    history, step = _wait_for_shared(lambda: _record_start(config, job))
    # One more than `end` allows: starts that ended with their node were not counted there.
    if history.idle_starts(step) > MAX_IDLE + 1:
        raise _stuck_error(config, job, history)
    try:
        faults = _wait_for_shared(lambda: _node_faults(config.output_dir))
    except allocation.NoCheckError as error:
        # This counts like the crash of a rank.
        _record_end(history, str(error))
        _require_running(job, str(error))
        raise DiffembedError(continue_job(job, history, str(error))) from error
    if not faults:
        log(f"start {history.num_starts} of job {job}, from step {step}")
        return
    words = "; ".join(f"{node}: {fault}" for node, fault in faults.items())
    _record_end(history, words, unfit=True)
    _require_running(job, words)
    if history.num_unfit > _MAX_UNFIT:
        raise DiffembedError(f"unfit nodes {history.num_unfit} times, not requeued: {words}")
    without = (*faults, *allocation.excluded_nodes(job))
    if not allocation.are_enough_left(job, without):
        raise DiffembedError(
            f"too few nodes are left without {','.join(without)}, not requeued: {words}"
        )
    raise DiffembedError(continue_job(job, history, f"unfit nodes {words}", without=without))


def late(config: TrainConfig, job: str) -> None:
    """Requeue the job shortly before its time limit, unless it ends before.

    The checkpoint that is being written is lost, earlier ones stay whole.
    """
    time.sleep(max(0, allocation.seconds_left(job) - _LAST_SECONDS))
    # 75, as if the ranks had saved and stopped in time.
    end(config, job, 75, out_of_time=True, how="the save took longer than the time limit")


def end(
    config: TrainConfig, job: str, code: int, *, out_of_time: bool, how: str | None = None
) -> None:
    """Requeue the job if that helps, and print the decision.

    Args:
        config: of the run.
        job: its id.
        code: exit code of its ranks.
        out_of_time: Slurm signalled that the job's time is nearly over.
        how: the end in words; the exit code by default.

    Raises:
        DiffembedError: the job makes no progress, or Slurm refuses both a requeue and a successor.
    """
    # First: a job that Slurm has cancelled meanwhile must not be requeued, which would revive it.
    state = allocation.read_state(job)
    history, idle_starts = None, 1
    try:
        history = History(config.output_dir, job)
        history.end(how or f"exit code {code}")
        idle_starts = history.idle_starts(latest_step(RunDir(config.output_dir).checkpoints))
    except OSError as error:
        # The next start waits until the folder can be written; this end must not end the chain.
        log(f"the end of this start could not be recorded: {error}")
    verdict, why = decide(
        Ending(
            code=code,
            out_of_time=out_of_time,
            preempted=state.preempted,
            running=state.running,
            idle_starts=idle_starts,
            # A full disk can look like a wrong config.
            folder_fault=probe(config.output_dir)[1] if code == 2 else "",
        )
    )
    if verdict == "stuck" and history:
        raise _stuck_error(config, job, history)
    if verdict == "requeue":
        log(continue_job(job, history, why))
    else:
        log(f"not requeued: {why}")


def log(line: str) -> None:
    """Print a line to the log, which may be on a full disk."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def _require_running(job: str, why: str) -> None:
    """Leave a job alone that Slurm ends itself: its checks fail because their processes are killed.

    Raises:
        DiffembedError: Slurm ends it; a requeue would revive it.
    """
    if not allocation.read_state(job).running:
        raise DiffembedError(f"not requeued: {_SLURM_ENDS_IT} ({why})")


def _record_start(config: TrainConfig, job: str) -> tuple[History, int]:
    """Record that this job starts; return its history and the step that it starts from.

    Raises:
        SharedFaultError: the run's folder cannot be read or written.
    """
    folder = config.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fault = probe(folder)[1]
        if not fault:
            history, step = History(folder, job), latest_step(RunDir(folder).checkpoints)
            history.start(step, os.environ.get("SLURM_JOB_NODELIST", ""))
            return history, step
    except OSError as error:
        fault = f"{folder} cannot be used ({error.strerror})"
    raise SharedFaultError(fault)


def _node_faults(run_folder: Path) -> Mapping[str, str]:
    """Check the nodes; return the faults of single nodes.

    Raises:
        SharedFaultError: a fault of something that all nodes share.
    """
    faults = allocation.check_nodes(run_folder)
    if faults.shared:
        raise SharedFaultError(faults.shared)
    return faults.nodes


def _wait_for_shared(call: Callable[[], T]) -> T:
    """Repeat a call while something that all nodes share is broken.

    Raises:
        DiffembedError: it stayed broken until the limit.
    """
    limit = f"{_SHARED_SECONDS / 60:.0f} minutes"
    try:
        return retry(
            call,
            on=SharedFaultError,
            seconds=_SHARED_SECONDS,
            tell=lambda error: log(f"{error}; waiting, up to {limit}"),
        )
    except SharedFaultError as error:
        raise DiffembedError(
            f"{error}, for {limit}, not requeued | fix: free some "
            f"space or bring the disk back, then submit again"
        ) from error


def _record_end(history: History, how: str, *, unfit: bool = False) -> None:
    with contextlib.suppress(OSError):  # then it counts as a start without an end
        history.end(how, unfit=unfit)


def continue_job(
    job: str, history: History | None, why: str, *, without: tuple[str, ...] = ()
) -> str:
    """Requeue the job, or submit a successor; return a line with the outcome and the reason."""
    refusal = allocation.requeue(job, without=without)
    if not refusal:
        return f"requeued: {why}"
    successor = submit_successor(job, without=without)
    # Otherwise a chain of successors would never reach the limit of idle starts.
    if history:
        with contextlib.suppress(OSError):
            history.hand_over(successor)
    return f"continues as job {successor}: {why} ({refusal})"


def _stuck_error(config: TrainConfig, job: str, history: History) -> DiffembedError:
    step = latest_step(RunDir(config.output_dir).checkpoints)
    endings = Counter(history.endings(step))
    words = "; ".join(f"{count} x {ending}" for ending, count in endings.items())
    return DiffembedError(
        f"job {job} made no progress across {endings.total() - 1} requeues: each start began at "
        f"step {step} of {config.output_dir} and ended before the next checkpoint ({words}) | fix: "
        f"read the log above, then submit again; a shorter checkpoint.every "
        f"({config.checkpoint.every}) may do"
    )


def main() -> None:
    """Run `begin`, `late` or `end` for the job of this batch script."""
    # A requeue ends the job, which must not interrupt the requeue itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    moment, *words = sys.argv[1:]
    code, signalled = (words.pop(0), words.pop(0)) if moment == "end" else ("0", "")
    # The arguments of train.py that matter here.
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--deepspeed")
    options = parser.parse_intermixed_args(words)
    with errors_end_the_process():
        config = load_config(TrainConfig, options.config, tuple(options.overrides))
        if moment == "begin":
            begin(config, allocation.own_id())
        elif moment == "late":
            late(config, allocation.own_id())
        else:
            end(config, allocation.own_id(), int(code), out_of_time=signalled == "USR1")


if __name__ == "__main__":
    main()
