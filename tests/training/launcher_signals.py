"""What becomes of a run under each launcher when the launcher, or one rank, gets a signal.

    python -m tests.training.launcher_signals [LAUNCHER ...]

prints a table launcher x signal x outcome: the exit code that a shell sees, and whether the
checkpoint of the step at which the run stopped is there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.slurm.cluster import Cluster, why_unavailable
from tests.support import free_port
from tests.training.launches import LAUNCHERS, TRAIN, Launch, launcher_words, send
from tests.training.tiny_recipe import make_recipe

_BIN = Path(sys.executable).parent
ON_SLURM = ("srun", "deepspeed slurm")
ALL_LAUNCHERS = (*LAUNCHERS, "deepspeed openmpi", *ON_SLURM)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TARGETS = ("launcher", "one rank")
# A loaded machine starts a run slowly.
_MOST_SECONDS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a signal came to."""

    code: int
    reason: str  # that the run gave for its end
    steps: int  # lines of metrics.jsonl
    saved: int  # step of the newest checkpoint, 0 for none
    goes_on: bool = False  # the launcher has ended, the ranks have not

    @property
    def nothing_lost(self) -> bool:
        """Whether the next start goes on exactly where this one ended."""
        return self.saved == self.steps > 0

    def __str__(self) -> str:
        if self.goes_on:
            return f"exit {self.code}, but the ranks go on"
        kept = f"saved step {self.saved}" if self.nothing_lost else f"saved {self.saved}"
        return f"exit {self.code}, {kept} of {self.steps} ({self.reason or 'no reason given'})"


def words_of(launcher: str, folder: Path) -> list[str]:
    """A launcher's command line up to the script."""
    if launcher in LAUNCHERS:
        return launcher_words(launcher, free_port())
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


def outcome(
    launcher: str, number: signal.Signals, target: str, recipe: Path, environment: dict[str, str]
) -> Outcome:
    """Start a run without end, send it a signal, and see how it ends."""
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        with Launch(
            *(words_of(launcher, Path(folder)), TRAIN, recipe),
            *("--deepspeed", "ds_configs/zero3.json", f"output_dir={run}", "num_steps=1000000"),
            *("checkpoint.every=1000000", "schedule=cache"),
            # Two nodes of one machine have names that need not resolve.
            environment={**environment, "MASTER_ADDR": "127.0.0.1"},
        ) as launch:
            deadline = time.monotonic() + _MOST_SECONDS
            while _count(run) < 3:
                assert launch.process.poll() is None, launch.output()
                assert time.monotonic() < deadline, launch.output()
                time.sleep(0.05)
            send(launch.process.pid if target == "launcher" else min(launch.ranks()), number)
            code = launch.wait(_MOST_SECONDS)
            try:
                launch.require_nothing_left(60)
            except AssertionError:
                return Outcome(code=code, reason="", steps=_count(run), saved=0, goes_on=True)
            output = launch.output()
        reasons = [line for line in output.splitlines() if "Stopped: " in line]
        reason = reasons[0].partition("Stopped: ")[2].partition(" after")[0] if reasons else ""
        latest = run / "checkpoints" / "latest"
        saved = int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0
        return Outcome(code=code, reason=reason, steps=_count(run), saved=saved)


def _count(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@contextlib.contextmanager
def slurm_environment(launcher: str) -> Iterator[dict[str, str]]:
    """What a launcher needs in its environment, with a Slurm of two nodes behind it if need be."""
    if launcher in ON_SLURM:
        with Cluster().running() as cluster:
            yield cluster.environment
    else:
        yield dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")


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
            with slurm_environment(launcher) as environment:
                for number in SIGNALS:
                    for target in TARGETS:
                        end = outcome(launcher, number, target, recipe, environment)
                        print(f"{launcher:18} {number.name} to {target:9} {end}", flush=True)


if __name__ == "__main__":
    main()
