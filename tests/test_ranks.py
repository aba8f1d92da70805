"""Ranks that this package starts itself: their environment, their signals, their exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline import launch
from pipeline.cli import app
from pipeline.launch import count_gpus, run_ranks


def program(text: str) -> list[str]:
    """A rank that takes no time to start: it sees `rank` and `folder`."""
    head = "import os, signal, sys, time; rank = int(os.environ.get('RANK', 0))\n"
    return [sys.executable, "-S", "-c", head + text]


def test_ranks_get_what_the_trainer_reads(tmp_path: Path) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    text = f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert run_ranks(program(text), 3) == 0

    found = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [world[:4] for world in found] == [[str(r), "3", str(r), "3"] for r in range(3)]
    assert len({tuple(world[4:]) for world in found}) == 1


def test_one_rank_needs_no_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")  # left from another job
    assert run_ranks(program("sys.exit('RANK' in os.environ)"), 1) == 0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("sys.exit(75)", 75),
        # The others would wait in a collective call: they are ended, and do not hide the reason.
        ("sys.exit(2) if rank == 1 else time.sleep(600)", 2),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(600)", 137),
    ],
)
def test_the_first_failure_is_the_exit_code(text: str, code: int) -> None:
    assert run_ranks(program(text), 2, grace_seconds=0.1) == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_reaches_every_rank(tmp_path: Path, number: signal.Signals) -> None:
    text = f"""
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(f'{tmp_path}/{{rank}}', 'w').close()
time.sleep(600)
"""

    def send_when_ready() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=send_when_ready)
    thread.start()
    assert run_ranks(program(text), 2) == 75
    thread.join()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("tasks", "starts"), [("1", True), ("2", False)])
def test_the_command_starts_ranks_in_a_shell_of_srun_and_not_as_one_rank_of_several(
    tasks: str, starts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    srun = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": tasks}
    for name, value in srun.items():
        monkeypatch.setenv(name, value)
    started: list[int] = []

    def run(words: list[str], number: int) -> int:
        started.append(number)
        return 0

    monkeypatch.setattr(launch, "run_ranks", run)
    config = tmp_path / "train.yaml"
    config.write_text("{output_dir: run, num_steps: 1, model: {path: m}, data: {path: s}}")
    result = CliRunner().invoke(app, ["train", str(config), "--ranks", "3"])
    assert started == ([3] if starts else [])
    if not starts:
        assert "is a rank of a launcher, 0 of 2" in str(result.exception)


@pytest.mark.parametrize(("visible", "number"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2)])
def test_gpus_are_counted_as_the_ranks_will_see_them(
    visible: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == number


def test_a_machine_without_a_driver_has_no_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_gpus() == 0

    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: H200 (UUID: a)'\necho 'GPU 1: H200 (UUID: b)'\n")
    driver.chmod(0o755)
    assert count_gpus() == 2
