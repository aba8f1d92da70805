"""Decide whether a training job starts, ends, or is requeued; called by `slurm/train.sbatch`.

    python -m pipeline.submission.restart begin ARGUMENTS-OF-TRAIN.PY
    python -m pipeline.submission.restart late ARGUMENTS-OF-TRAIN.PY
    python -m pipeline.submission.restart end EXIT-CODE SIGNAL ARGUMENTS-OF-TRAIN.PY

Slurm itself queues a job again whose node dies or that is preempted to the end of its grace; all
other ends are decided here. Each start is noted in the run's folder: a job that starts again and
again from one step stops.
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

from pipeline.checkpoint_folder import latest_step
from pipeline.config import TrainConfig, load_config
from pipeline.errors import DiffembedError, errors_end_the_process
from pipeline.files import write_json
from pipeline.run_folder import RunDir
from pipeline.submission import allocation
from pipeline.submission.allocation import submit_successor
from pipeline.submission.health import probe
from pipeline.submission.slurm import repeat

_UNKNOWN = "no word: a node failed, or the job was killed"
_START = {"time": "", "step": 0, "nodes": "", "end": _UNKNOWN, "unfit": False}


class History:
    """Every start of one job: where it began, on which nodes, and how it ended.

    One file for each job in the run's folder, so that a new job counts from zero.
    """

    def __init__(self, output_dir: Path, job: str) -> None:
        self._path = output_dir / "jobs" / f"starts-{job}.json"
        self._starts: list[dict[str, Any]] = []
        if self._path.exists():
            # Counting from zero after damage is better than ending the run.
            with contextlib.suppress(ValueError, TypeError):
                self._starts = [{**_START, **start} for start in json.loads(self._path.read_text())]

    def start(self, step: int, nodes: str) -> None:
        """Note a start; it is on disk when this returns."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._starts.append({**_START, "time": now, "step": step, "nodes": nodes})
        write_json(self._path, self._starts)

    def end(self, how: str, *, unfit: bool = False) -> None:
        """Note how the newest start ended; `unfit` when it never came to training."""
        for entry in self._starts[-1:]:
            entry |= {"end": how, "unfit": unfit}
        write_json(self._path, self._starts)

    def hand_over(self, job: str) -> None:
        """Let another job that continues this one keep counting."""
        write_json(self._path.with_name(f"starts-{job}.json"), self._starts)

    @property
    def num_starts(self) -> int:
        """All of them."""
        return len(self._starts)

    @property
    def num_unfit(self) -> int:
        """Starts that never came to training."""
        return sum(entry["unfit"] for entry in self._starts)

    def idle_starts(self, step: int) -> int:
        """Starts to train that began at `step`."""
        return len(self.endings(step))

    def endings(self, step: int) -> list[str]:
        """How the starts that began at `step` ended."""
        starts = [entry for entry in self._starts if not entry["unfit"]]
        return [entry["end"] for entry in starts if entry["step"] == step]


# Requeues without a new checkpoint, and starts on nodes that turn out to be unfit.
_MAX_IDLE = 3
_MAX_UNFIT = 3
# For how long nodes wait for a shared folder that is full, read-only or away.
_SHARED_SECONDS = 1800
# Before the time limit: enough for a controller that answers slowly.
_LAST_SECONDS = 30
_SLURM_ENDS_IT = "Slurm ends this job itself: cancelled, queued again, or a node failed"
T = TypeVar("T")
Verdict = Literal["requeue", "leave", "stuck"]


class SharedFaultError(DiffembedError):
    """Something that all nodes share does not work; no other node would be better."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How the ranks of a job ended.

    Args:
        code: their exit code.
        out_of_time: whether Slurm told the job that its time is nearly over.
        preempted: whether Slurm takes the nodes for a more urgent job.
        running: whether the job is still Slurm's to run: not cancelled, not queued again.
        idle_starts: starts from the newest checkpoint, this one included.
        folder_fault: what is wrong with the run's folder now, if it was looked at.
    """

    code: int
    out_of_time: bool
    preempted: bool
    running: bool
    idle_starts: int
    folder_fault: str = ""


def decide(ending: Ending) -> tuple[Verdict, str]:
    """Decide what to do with a job whose ranks have ended; returns the reason as well."""
    if ending.code == 0:
        return "leave", "training is finished"
    if ending.code == 2 and not ending.folder_fault:
        return "leave", "exit code 2 is a fault of the config or the data: it would fail again"
    if not ending.running:
        # `scontrol requeue` would bring a cancelled job back to life.
        return "leave", _SLURM_ENDS_IT
    asked = ending.out_of_time or ending.preempted
    if ending.code == 75 and not asked:
        return "leave", "stopped on request; submit again to continue"
    if ending.idle_starts > _MAX_IDLE:
        return "stuck", ""
    if asked:
        return "requeue", "out of time" if ending.out_of_time else "preempted"
    fault = f", {ending.folder_fault}" if ending.folder_fault else ""
    return "requeue", f"the ranks ended with exit code {ending.code}{fault}"


def begin(config: TrainConfig, job: str) -> None:
    """Note this start and let it train, unless it is one too many or a node is unfit.

    Raises:
        DiffembedError: no progress, a run folder that stays full or away, or unfit nodes; in the
            last case the job was queued again without them, as often as that may help.
    """
    history, step = _wait_for_shared(lambda: _note_start(config, job))
    # Nodes that died took the end of their start with them: it has not been counted.
    if history.idle_starts(step) > _MAX_IDLE + 1:
        raise _stuck(config, job, history)
    try:
        faults = _wait_for_shared(lambda: _find_faults(config.output_dir))
    except allocation.NoCheckError as error:
        # Counted like the crash of a rank.
        _note_end(history, str(error))
        _require_running(job, str(error))
        raise DiffembedError(_again(job, history, str(error))) from error
    if not faults:
        say(f"start {history.num_starts} of job {job}, from step {step}")
        return
    words = "; ".join(f"{node}: {fault}" for node, fault in faults.items())
    _note_end(history, words, unfit=True)
    _require_running(job, words)
    if history.num_unfit > _MAX_UNFIT:
        raise DiffembedError(f"unfit nodes {history.num_unfit} times, not queued again: {words}")
    without = (*faults, *allocation.excluded_nodes(job))
    if not allocation.are_enough_left(job, without):
        raise DiffembedError(
            f"too few nodes are left without {','.join(without)}, not queued again: {words}"
        )
    raise DiffembedError(_again(job, history, f"unfit nodes {words}", without=without))


def late(config: TrainConfig, job: str) -> None:
    """Queue the job again shortly before its time limit, unless it ends before.

    The checkpoint that is being written is lost, the ones before stay whole.
    """
    time.sleep(max(0, allocation.seconds_left(job) - _LAST_SECONDS))
    end(config, job, 75, out_of_time=True, how="the save outlasted the time limit")


def end(
    config: TrainConfig, job: str, code: int, *, out_of_time: bool, how: str | None = None
) -> None:
    """Queue the job again if that helps, and say what was decided.

    Args:
        config: of the run.
        job: its id.
        code: exit code of its ranks.
        out_of_time: whether Slurm told the job that its time is nearly over.
        how: the end in words, if not by the exit code.

    Raises:
        DiffembedError: the job makes no progress, or Slurm takes it neither as this job nor as
            another one.
    """
    state = allocation.read_state(job)
    history, idle_starts = None, 1
    try:
        history = History(config.output_dir, job)
        history.end(how or f"exit code {code}")
        idle_starts = history.idle_starts(latest_step(RunDir(config.output_dir).checkpoints))
    except OSError as error:
        # The next start waits until the folder can be written; this end must not end the chain.
        say(f"how this start ended could not be noted: {error}")
    verdict, why = decide(
        Ending(
            code=code,
            out_of_time=out_of_time,
            preempted=state.preempted,
            running=state.running,
            idle_starts=idle_starts,
            folder_fault=probe(config.output_dir)[1] if code == 2 else "",
        )
    )
    if verdict == "stuck" and history:
        raise _stuck(config, job, history)
    if verdict == "requeue":
        say(_again(job, history, why))
    else:
        say(f"not queued again: {why}")


def say(line: str) -> None:
    """Print a line to the log, which may be on the disk that is full."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def _require_running(job: str, why: str) -> None:
    """Leave a job alone that Slurm ends itself: what it started dies with it.

    Raises:
        DiffembedError: Slurm ends it; queued again, it would come back to life.
    """
    if not allocation.read_state(job).running:
        raise DiffembedError(f"not queued again: {_SLURM_ENDS_IT} ({why})")


def _note_start(config: TrainConfig, job: str) -> tuple[History, int]:
    """Note that this job starts, and from which step.

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


def _find_faults(run_folder: Path) -> Mapping[str, str]:
    """Check the nodes; returns their own faults.

    Raises:
        SharedFaultError: a fault of what all of them share.
    """
    faults = allocation.find_faults(run_folder)
    if faults.shared:
        raise SharedFaultError(faults.shared)
    return faults.nodes


def _wait_for_shared(call: Callable[[], T]) -> T:
    """Repeat a call while something that all nodes share is at fault; give up after a while.

    Raises:
        DiffembedError: it stayed at fault.
    """

    limit = f"{_SHARED_SECONDS / 60:.0f} minutes"
    try:
        return repeat(
            call,
            on=SharedFaultError,
            seconds=_SHARED_SECONDS,
            tell=lambda error: say(f"{error}; waiting, up to {limit}"),
        )
    except SharedFaultError as error:
        raise DiffembedError(
            f"{error}, for {limit}, not queued again | fix: free some "
            f"space or bring the disk back, then submit again"
        ) from error


def _note_end(history: History, how: str, *, unfit: bool = False) -> None:
    with contextlib.suppress(OSError):  # it counts as a start without an end
        history.end(how, unfit=unfit)


def _again(job: str, history: History | None, why: str, *, without: tuple[str, ...] = ()) -> str:
    """Queue the job again, or another one that does the same; says which, and why."""
    refusal = allocation.requeue(job, without=without)
    if not refusal:
        return f"queued again: {why}"
    successor = submit_successor(job, without=without)
    if history:
        with contextlib.suppress(OSError):
            history.hand_over(successor)
    return f"continues as job {successor}: {why} ({refusal})"


def _stuck(config: TrainConfig, job: str, history: History) -> DiffembedError:
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
    # Queueing a job again ends it, which must not end the order half-way.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    moment, *words = sys.argv[1:]
    code, signalled = (words.pop(0), words.pop(0)) if moment == "end" else ("0", "")
    # The arguments of train.py, as far as they matter here.
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
