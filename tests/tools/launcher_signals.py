"""Send signals to a launcher, or to one rank, and report what becomes of the run.

    python -m tests.tools.launcher_signals [LAUNCHER ...]

prints a table launcher x signal x outcome: the exit code that a shell sees, and whether the
checkpoint of the step at which the run stopped is there. The second signal goes to a rank of a run
that has been asked to stop before and cannot save.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline import run_folder
from tests.slurm.cluster import Cluster, why_unavailable
from tests.support import PATIENCE, free_port
from tests.training.launches import LAUNCHERS, ROOT, TRAIN, Launch, launcher_words, send
from tests.training.tiny_recipe import make_recipe

_BIN = Path(sys.executable).parent
_WORKER = ROOT / "tests" / "training" / "failure_worker.py"
SCRIPT = "train_mpirun.sh"
COMMAND = "diffembed train"
ON_SLURM = ("srun", "deepspeed slurm")
ALL_LAUNCHERS = (COMMAND, *LAUNCHERS, SCRIPT, "deepspeed openmpi", *ON_SLURM)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Whatever has not ended by then continues: the runs do not end by themselves.
_STILL_LIVE_AFTER_SECONDS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The effect of a signal."""

    code: int
    reason: str  # that the run gave for its end
    steps: int  # lines of metrics.jsonl
    saved: int  # step of the newest checkpoint, 0 for none; it is whole
    seconds: float  # from the last signal until nothing was left of the run
    ranks_live: bool = False  # the launcher has ended, the ranks have not

    @property
    def nothing_lost(self) -> bool:
        """Return True if the next start continues exactly where this one ended."""
        return self.saved == self.steps > 0

    def __str__(self) -> str:
        if self.ranks_live:
            return f"exit {self.code}, but the ranks continue"
        kept = f"saved step {self.saved}" if self.nothing_lost else f"saved {self.saved}"
        return (
            f"exit {self.code}, {kept} of {self.steps} ({self.reason or 'no reason given'}), "
            f"gone after {self.seconds:.1f} s"
        )


def words_of(launcher: str, folder: Path) -> list[str]:
    """A launcher's command line up to the script, or up to the config where it knows the script."""
    if launcher in LAUNCHERS:
        return launcher_words(launcher, free_port())
    if launcher == SCRIPT:
        return [str(ROOT / "launch" / SCRIPT)]
    if launcher == COMMAND:
        return [str(_BIN / "diffembed"), "train", "--ranks", "2"]
    if launcher == "srun":
        # Ranks that leave with 75 are no reason to end the others.
        steps = ("--nodes=2", "--ntasks=2", "--kill-on-bad-exit=0", "--wait=30")
        return ["srun", *steps, sys.executable]
    hosts = folder / f"hosts-{launcher.split()[1]}"
    command = [
        *(str(_BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh_check", "--force_multi"),
        *("--launcher", launcher.split()[1], "--master_addr", "127.0.0.1"),
    ]
    if launcher == "deepspeed slurm":
        hosts.write_text("node1 slots=1\nnode2 slots=1\n")
        return [*command, "--launcher_args=--kill-on-bad-exit=0 --wait=30"]
    hosts.write_text("localhost slots=2\n")
    # It would otherwise ask for an interface named eth0.
    return [*command, "--launcher_args=--bind-to none --mca btl_tcp_if_include lo"]


class Trial:
    """A run without end, in its own folder, and the signals that it gets.

    Args:
        launcher: one of `ALL_LAUNCHERS`.
        recipe: the training config.
        folder: where its files go.
        environment: as `environment_of` the launcher gives it.
        saves: whether the run can save when it is asked to stop; it has a checkpoint if not.
    """

    def __init__(
        self,
        launcher: str,
        recipe: Path,
        folder: Path,
        environment: Mapping[str, str],
        *,
        saves: bool = True,
    ) -> None:
        self.run = folder / "run"
        self._environment = environment
        words = words_of(launcher, folder)
        script, fault = (TRAIN, {}) if saves else (_WORKER, {"FAULT": "cannot save"})
        self._launch = Launch(
            *(words, recipe) if launcher in (SCRIPT, COMMAND) else (words, script, recipe),
            *("--deepspeed", "ds_configs/zero3.json", f"output_dir={self.run}"),
            *("num_steps=1000000", f"checkpoint.every={1000000 if saves else 2}", "schedule=cache"),
            # Two nodes of one machine have names that need not resolve.
            environment={**environment, **fault, "MASTER_ADDR": "127.0.0.1"},
        )

    def outcome(self, number: signal.Signals, target: str) -> Outcome:
        """Send a signal once some steps are done, and see how the run ends.

        Args:
            number: the signal.
            target: "launcher", "one rank", or "job" for `scancel`.
        """
        with self._launch:
            self._wait_until(lambda: self._steps() >= 3)
            self._send(number, target)
            return self._end()

    def outcome_of_second(self, number: signal.Signals) -> Outcome:
        """Send a signal to one rank, and again once all ranks try to save."""
        with self._launch:
            self._wait_until((self.run / "checkpoints" / "latest").exists)
            self._send(number, "one rank")
            self._wait_until(lambda: len(list(self.run.glob("saving-*"))) == 2)
            time.sleep(1.1)  # sooner it would be taken for an echo of the first
            self._send(number, "one rank")
            return self._end()

    def _send(self, number: signal.Signals, target: str) -> None:
        if target == "job":
            # SIGTERM and, after KillWait, SIGKILL are what it sends when it is not told.
            words = () if number == signal.SIGTERM else (f"--signal={number.name}",)
            command = ("scancel", *words, f"--user={os.getuid()}")
            subprocess.run(command, env=dict(self._environment), check=True)
        else:
            launch = self._launch
            send(launch.process.pid if target == "launcher" else min(launch.ranks()), number)

    def _end(self) -> Outcome:
        began = time.monotonic()
        code = self._launch.wait()
        ranks_live = False
        try:
            self._launch.require_nothing_left(_STILL_LIVE_AFTER_SECONDS)
        except AssertionError:
            ranks_live = True
        seconds = time.monotonic() - began
        lines = [line for line in self._launch.output().splitlines() if "Stopped: " in line]
        newest = run_folder.latest_checkpoint(self.run / "checkpoints")
        return Outcome(
            code=code,
            reason=lines[0].partition("Stopped: ")[2].partition(" after")[0] if lines else "",
            steps=self._steps(),
            saved=run_folder.verify_checkpoint(newest)["step"] if newest else 0,
            seconds=seconds,
            ranks_live=ranks_live,
        )

    def _steps(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            assert self._launch.process.poll() is None, self._launch.output()
            assert time.monotonic() < deadline, self._launch.output()
            time.sleep(0.05)


@contextlib.contextmanager
def environment_of(launcher: str) -> Iterator[dict[str, str]]:
    """Yield the environment that a launcher needs, if need be with a Slurm of two nodes."""
    if launcher in ON_SLURM:
        with Cluster().running() as cluster:
            yield cluster.environment
    else:
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        yield {**os.environ, **root, "RANKS": "2"}


def trials(
    launcher: str, recipe: Path, environment: Mapping[str, str]
) -> Iterator[tuple[str, Outcome]]:
    """Every signal to everything that can get one under a launcher, and what it came to."""
    job = ("job",) if launcher in ON_SLURM else ()
    for number in SIGNALS:
        for target in ("launcher", "one rank", *job):
            with TemporaryDirectory() as folder:
                trial = Trial(launcher, recipe, Path(folder), environment)
                yield f"{number.name} to {target}", trial.outcome(number, target)
    if launcher not in (SCRIPT, COMMAND):  # they start no other program than the trainer
        with TemporaryDirectory() as folder:
            trial = Trial(launcher, recipe, Path(folder), environment, saves=False)
            yield "second SIGTERM to one rank", trial.outcome_of_second(signal.SIGTERM)


def main() -> None:
    """Print the table, line by line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("launchers", nargs="*", metavar="LAUNCHER", default=ALL_LAUNCHERS)
    with TemporaryDirectory() as folder:
        recipe = make_recipe(Path(folder))
        for launcher in parser.parse_args().launchers:
            if launcher in ON_SLURM and (reason := why_unavailable()):
                print(f"{launcher:18} {reason}")
                continue
            with environment_of(launcher) as environment:
                for what, end in trials(launcher, recipe, environment):
                    print(f"{launcher:18} {what:27} {end}", flush=True)


if __name__ == "__main__":
    main()
