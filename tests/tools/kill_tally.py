"""Kills a run over and over, at moments and victims drawn by lot, and counts the right resumes.

    python -m tests.tools.kill_tally --rounds 50 --seed 0

A round starts or resumes the run of two ranks under one of three launchers, waits for its moment,
and sends SIGKILL. It counts once a later start has resumed from the checkpoint that `latest` named,
lost no more than two intervals, and every line of the loss curve equals the undisturbed run's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.support import PATIENCE
from tests.training.launches import LAUNCHERS, TRAIN, Launch, send
from tests.training.tiny_recipe import make_recipe
from tests.training.trainer_command import run_trainer

NUM_STEPS = 60
INTERVAL = 2
VICTIMS = ("one rank", "all ranks", "launcher")


def save_is_in_files(folder: Path) -> bool:
    """Files of a checkpoint are being written."""
    return any(folder.glob(".step-*.partial/*.safetensors"))


def save_is_described(folder: Path) -> bool:
    """All files are there, the folder has not got its name yet."""
    return any(folder.glob(".step-*.partial/*state.json*"))


def save_is_renamed(folder: Path) -> bool:
    """The folder has its name, `latest` still names the one before."""
    names = sorted(path.name for path in folder.glob("step-*"))
    return bool(names) and names[-1] != latest_name(folder)


def deletion_is_going_on(folder: Path) -> bool:
    """An old checkpoint is half deleted."""
    return any(folder.glob(".step-*.deleted"))


SAVE_MOMENTS: dict[str, Callable[[Path], bool]] = {
    "files of a save": save_is_in_files,
    "before rename": save_is_described,
    "rename to latest": save_is_renamed,
    "deleting old": deletion_is_going_on,
}
MOMENTS = ("start-up", "steps", "gather of a save", *SAVE_MOMENTS)


@dataclasses.dataclass
class Round:
    """One kill, and what became of it."""

    launcher: str
    victim: str
    moment: str
    inside: bool = False  # seen on disk right after the kill (save moments only)
    verdict: str = "open"
    output: str = dataclasses.field(default="", repr=False)  # of the launcher and its ranks


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run, from its files."""

    step: int  # that the next start continues from
    lines: int  # whole ones of metrics.jsonl
    inode: int  # of metrics.jsonl

    @classmethod
    def of(cls, run: Path) -> Progress:
        """Look at a run's folder, which may not be there yet."""
        name, metrics = latest_name(run / "checkpoints"), run / "metrics.jsonl"
        return cls(
            step=int(name.removeprefix("step-")) if name else 0,
            lines=metrics.read_bytes().count(b"\n") if metrics.exists() else 0,
            inode=metrics.stat().st_ino if metrics.exists() else 0,
        )


class Tally:
    """A chain of launches in one run folder after another, each killed but the last.

    Args:
        recipe: the training config.
        folder: where the runs go.
        seed: of the lots.
        launchers: taken in turn.
        num_steps: of a run.
    """

    def __init__(
        self,
        recipe: Path,
        folder: Path,
        seed: int,
        launchers: tuple[str, ...],
        num_steps: int = NUM_STEPS,
    ) -> None:
        self._num_steps = num_steps
        self._recipe, self._folder, self._launchers = recipe, folder, launchers
        self._random = random.Random(seed)
        self._number = 0  # of the present run folder
        self.rounds: list[Round] = []
        self._open: list[Round] = []  # without a verdict
        self._run_to_the_end(folder / "undisturbed")
        self.wanted = curve(folder / "undisturbed")
        assert len(self.wanted) == num_steps

    def run(self, count: int) -> None:
        """Kill so often, then let the last run end."""
        plan = [(victim, moment) for moment in MOMENTS for victim in VICTIMS]
        for number in range(count):
            if number % len(plan) == 0:
                self._random.shuffle(plan)
            victim, moment = plan[number % len(plan)]
            round_ = Round(self._launchers[number % len(self._launchers)], victim, moment)
            while not self._start_and_kill(round_):
                self._number += 1  # it came to its end before the moment: again, in a new folder
            self.rounds.append(round_)
            self._open.append(round_)
            inside = ", seen inside" if round_.inside else ""
            print(f"{number + 1:3} {round_.launcher}, {victim}, {moment}{inside}", flush=True)
        self._finish()

    @property
    def _run(self) -> Path:
        return self._folder / f"run-{self._number}"

    def _arguments(self, run: Path) -> list[str | Path]:
        return [
            *(self._recipe, "--deepspeed", "ds_configs/zero3.json"),
            *(f"output_dir={run}", f"num_steps={self._num_steps}", "schedule=cache"),
            *(f"checkpoint.every={INTERVAL}", f"checkpoint.keep_last={2}"),
        ]

    def _launch(self, launcher: str, run: Path) -> Launch:
        return Launch(launcher, TRAIN, *self._arguments(run))

    def _run_to_the_end(self, run: Path) -> str:
        """Return the output of a start that nothing disturbs; no launcher is needed for it."""
        done = run_trainer(*self._arguments(run), num_ranks=2)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def _start_and_kill(self, round_: Round) -> bool:
        """One launch and its kill; false when the run ended first."""
        before = Progress.of(self._run)
        with self._launch(round_.launcher, self._run) as launch:
            moment = self._wait_for(round_.moment, launch, before)
            if moment:
                kill(launch, round_.victim, self._random)
                check = SAVE_MOMENTS.get(round_.moment)
                round_.inside = bool(check and check(self._run / "checkpoints"))
            launch.process.wait(PATIENCE)
            launch.require_nothing_left()
            round_.output = launch.output()
            self._judge(before, round_.output)
        return moment

    def _wait_for(self, moment: str, launch: Launch, before: Progress) -> bool:
        """Poll until the moment has come; false when the run has ended before."""
        begin, new_lines = time.monotonic(), self._random.randint(1, 3 * INTERVAL)
        delay = self._random.uniform(0, 8 if moment == "start-up" else 0.2)
        while launch.process.poll() is None:
            assert time.monotonic() < begin + PATIENCE, launch.output()
            now = Progress.of(self._run)
            # A start rewrites the file, with the lines that it takes over.
            trained = now.inode != before.inode and now.lines - before.step >= new_lines
            if moment == "start-up":
                ready = time.monotonic() - begin > delay
            elif moment == "steps":
                ready = trained
            elif moment == "gather of a save":
                ready = trained and now.lines % INTERVAL == 0
            else:
                ready = trained and SAVE_MOMENTS[moment](self._run / "checkpoints")
            if ready:
                time.sleep(delay if moment == "steps" else 0)
                return launch.process.poll() is None
            time.sleep(0.002)
        return False

    def _judge(self, before: Progress, output: str) -> None:
        """Settle the kills before this launch, unless it came to nothing itself."""
        now, faults = curve(self._run), []
        if before.step:
            if "resuming" not in output:
                return
            if f"resuming {self._run} at step {before.step} of" not in output:
                faults.append(f"it did not resume at step {before.step}")
        elif not now:
            return
        if before.lines - before.step > 2 * INTERVAL:
            faults.append(f"of {before.lines} steps {before.step} were saved")
        if now != self.wanted[: len(now)]:
            faults.append("the loss differs from the undisturbed run's")
        for round_ in self._open:
            round_.verdict = "; ".join(faults) or "right"
        self._open.clear()

    def _finish(self) -> None:
        """Let the present run end; its curve must be the undisturbed one's."""
        before = Progress.of(self._run)
        self._judge(before, self._run_to_the_end(self._run))
        assert curve(self._run) == self.wanted
        left = sorted(path.name for path in (self._run / "checkpoints").iterdir())
        last = self._num_steps
        assert left == ["latest", f"step-{last - INTERVAL:06d}", f"step-{last:06d}"], left


def kill(launch: Launch, victim: str, lots: random.Random) -> None:
    """SIGKILL; where no rank has started yet, to the launcher."""
    ranks = launch.ranks()
    if victim == "launcher" or not ranks:
        send(launch.process.pid, signal.SIGKILL)
        return
    for pid in [lots.choice(sorted(ranks))] if victim == "one rank" else ranks:
        send(pid, signal.SIGKILL)


def latest_name(folder: Path) -> str:
    """Return the checkpoint that `latest` names, if any."""
    pointer = folder / "latest"
    return pointer.read_text().strip() if pointer.exists() else ""


def curve(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run without what a clock measured."""
    metrics = run / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    for line in lines:
        del line["seconds"], line["tokens_per_second"], line["peak_memory_gib"]
    return lines


def table(rounds: list[Round]) -> str:
    """Victim by moment: right of all, and how many kills were seen to hit inside."""
    lines = [f"{'':18}" + "".join(f"{victim:>14}" for victim in VICTIMS)]
    for moment in MOMENTS:
        cells = []
        for victim in VICTIMS:
            here = [r for r in rounds if (r.victim, r.moment) == (victim, moment)]
            right = sum(r.verdict == "right" for r in here)
            cells.append(f"{f'{right} of {len(here)}' if here else '-':>14}")
        inside = sum(r.inside for r in rounds if r.moment == moment)
        note = f"   {inside} seen inside" if moment in SAVE_MOMENTS else ""
        lines.append(f"{moment:18}" + "".join(cells) + note)
    for launcher, count in Counter(r.launcher for r in rounds).items():
        right = sum(r.verdict == "right" for r in rounds if r.launcher == launcher)
        lines.append(f"{launcher:18}{f'{right} of {count}':>14}")
    lines += [
        f"{r.launcher}, {r.victim}, {r.moment}: {r.verdict}" for r in rounds if r.verdict != "right"
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the tally; fails unless every resume was right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        # Launchers that are killed leave folders behind.
        os.environ["TMPDIR"] = folder
        tally = Tally(make_recipe(Path(folder)), Path(folder), options.seed, LAUNCHERS)
        tally.run(options.rounds)
    print(table(tally.rounds))
    right = sum(round_.verdict == "right" for round_ in tally.rounds)
    print(f"{right} of {options.rounds} resumes continue correctly (seed {options.seed})")
    sys.exit(right != options.rounds)


if __name__ == "__main__":
    main()
