"""Whether a training job starts, ends, or is queued again; called by `slurm/train.sbatch`.

    python -m pipeline.submission.restart begin ARGUMENTS-OF-TRAIN.PY
    python -m pipeline.submission.restart end EXIT-CODE SIGNAL ARGUMENTS-OF-TRAIN.PY

Slurm itself queues a job again whose node dies or that is preempted to the end of its grace; all
other ends are decided here. Each start is noted in the run's folder: a job that starts again and
again from one step stops.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

from pipeline.config import TrainConfig, load_config
from pipeline.errors import DiffembedError, errors_end_the_process
from pipeline.submission import allocation
from pipeline.submission.progress import History, last_step
from pipeline.submission.successor import submit_successor

# Requeues without a new checkpoint, and starts on nodes that turn out to be unfit.
_MAX_IDLE = 3
_MAX_UNFIT = 3

Verdict = Literal["requeue", "leave", "stuck"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How the ranks of a job ended.

    Args:
        code: their exit code.
        out_of_time: whether Slurm told the job that its time is nearly over.
        preempted: whether Slurm takes the nodes for a more urgent job.
        running: whether the job is still Slurm's to run: not cancelled, not queued again.
        idle_starts: starts from the newest checkpoint, this one included.
    """

    code: int
    out_of_time: bool
    preempted: bool
    running: bool
    idle_starts: int


def decide(ending: Ending) -> tuple[Verdict, str]:
    """What to do with a job whose ranks have ended, and why."""
    if ending.code == 0:
        return "leave", "training is finished"
    if ending.code == 2:
        return "leave", "exit code 2 is a fault of the config or the data: it would fail again"
    if not ending.running:
        # `scontrol requeue` would bring a cancelled job back to life.
        return "leave", "Slurm ends this job itself: cancelled, queued again, or a node failed"
    asked = ending.out_of_time or ending.preempted
    if ending.code == 75 and not asked:
        return "leave", "stopped on request; submit again to go on"
    if ending.idle_starts > _MAX_IDLE:
        return "stuck", ""
    reason = "out of time" if ending.out_of_time else "preempted"
    return "requeue", reason if asked else f"the ranks ended with exit code {ending.code}"


def begin(config: TrainConfig, job: str) -> None:
    """Note this start and let it go on, unless it is one too many or a node is unfit.

    Raises:
        DiffembedError: no progress, or unfit nodes; in the latter case the job was queued again
            without them, as often as that may help.
    """
    history = History(config.output_dir, job)
    step = last_step(config.output_dir)
    history.start(step, os.environ.get("SLURM_JOB_NODELIST", ""))
    # Nodes that died took the end of their start with them: it has not been counted.
    if history.idle_starts(step) > _MAX_IDLE + 1:
        raise _stuck(config, job, history)
    faults = allocation.find_faults(config.output_dir)
    if not faults:
        print(f"start {history.num_starts} of job {job}, from step {step}", flush=True)
        return
    words = "; ".join(f"{node}: {fault}" for node, fault in faults.items())
    history.end(words, unfit=True)
    if history.num_unfit > _MAX_UNFIT:
        raise DiffembedError(f"unfit nodes {history.num_unfit} times, not queued again: {words}")
    raise DiffembedError(_again(job, history, f"unfit nodes {words}", without=tuple(faults)))


def end(config: TrainConfig, job: str, code: int, *, out_of_time: bool) -> None:
    """Queue the job again if that helps, and say what was decided.

    Raises:
        DiffembedError: the job makes no progress, or Slurm takes it neither as this job nor as
            another one.
    """
    history = History(config.output_dir, job)
    state = allocation.read_state(job)
    history.end(f"exit code {code}")
    verdict, why = decide(
        Ending(
            code=code,
            out_of_time=out_of_time,
            preempted=state.preempted,
            running=state.running,
            idle_starts=history.idle_starts(last_step(config.output_dir)),
        )
    )
    if verdict == "stuck":
        raise _stuck(config, job, history)
    if verdict == "requeue":
        print(_again(job, history, why), flush=True)
    else:
        print(f"not queued again: {why}", flush=True)


def _again(job: str, history: History, why: str, *, without: tuple[str, ...] = ()) -> str:
    """Queue the job again, or another one that does the same; says which, and why."""
    if without:
        without += allocation.excluded_nodes(job)
    refusal = allocation.requeue(job, without=without)
    if not refusal:
        return f"queued again: {why}"
    successor = submit_successor(job, without=without)
    history.hand_over(successor)
    return f"goes on as job {successor}: {why} ({refusal})"


def _stuck(config: TrainConfig, job: str, history: History) -> DiffembedError:
    step = last_step(config.output_dir)
    endings = Counter(history.endings(step))
    words = "; ".join(f"{count} x {ending}" for ending, count in endings.items())
    return DiffembedError(
        f"job {job} made no progress across {_MAX_IDLE} requeues: each start began at step {step} "
        f"of {config.output_dir} and ended before the next checkpoint ({words}) | fix: read the "
        f"log above, then submit again; a shorter checkpoint.every ({config.checkpoint.every}) may "
        f"do"
    )


def main() -> None:
    """Run `begin` or `end` for the job of this batch script."""
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
        else:
            end(config, allocation.own_id(), int(code), out_of_time=signalled == "USR1")


if __name__ == "__main__":
    main()
