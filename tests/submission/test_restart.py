"""What becomes of a training job that ended, and what makes a node unfit."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.config import TrainConfig, load_config
from pipeline.errors import DiffembedError
from pipeline.submission.allocation import State, read_state
from pipeline.submission.health import find_faults
from pipeline.submission.progress import History, last_step
from pipeline.submission.restart import Ending, begin, decide


def ending(code: int, **changes: object) -> Ending:
    values = {"out_of_time": False, "preempted": False, "running": True, "idle_starts": 1}
    return Ending(code=code, **{**values, **changes})


@pytest.mark.parametrize(
    ("end", "verdict"),
    [
        (ending(0), "leave"),
        (ending(0, out_of_time=True), "leave"),
        (ending(2, preempted=True), "leave"),
        (ending(75), "leave"),
        (ending(75, out_of_time=True), "requeue"),
        (ending(75, preempted=True), "requeue"),
        (ending(75, out_of_time=True, running=False), "leave"),
        (ending(1), "requeue"),
        (ending(1, running=False), "leave"),
        (ending(137, idle_starts=3), "requeue"),
        (ending(137, idle_starts=4), "stuck"),
        (ending(75, out_of_time=True, idle_starts=4), "stuck"),
    ],
    ids=str,
)
def test_a_job_is_queued_again_only_where_that_helps_and_nobody_minds(
    end: Ending, verdict: str
) -> None:
    assert decide(end)[0] == verdict


def test_a_start_counts_as_idle_until_a_checkpoint_is_newer_than_it(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for expected in (1, 2):
        History(tmp_path, "7").start(last_step(tmp_path), "node1")
        assert History(tmp_path, "7").idle_starts(last_step(tmp_path)) == expected
    (checkpoints / "latest").write_text("step-000020\n")
    history = History(tmp_path, "7")

    assert history.idle_starts(last_step(tmp_path)) == 0
    assert history.endings(0) == ["no word: a node failed, or the job was killed"] * 2
    # Another job begins to count anew.
    assert History(tmp_path, "8").idle_starts(0) == 0


def test_a_node_with_room_and_the_right_time_is_fit(tmp_path: Path) -> None:
    assert find_faults(tmp_path, tmp_path, 0) == []


def put_nvidia_smi(folder: Path, commands: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: no test can make a real GPU fall off the bus."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{commands}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("commands", "fault"),
    [
        ("echo '0, Disabled, 0'", "1 of 2 GPUs answer"),
        ("echo '0, [N/A], 0'; echo '1, [N/A], 3'", "GPU 1 has 3 uncorrected memory errors"),
        ("echo '0, Disabled, 0'; echo lost >&2; exit 15", "nvidia-smi: lost"),
        ("exit 9", "nvidia-smi: exit code 9"),
    ],
)
def test_a_node_whose_gpus_do_not_all_answer_is_unfit(
    commands: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(tmp_path, commands, monkeypatch)

    assert find_faults(tmp_path, tmp_path, 2) == [fault]


@pytest.mark.parametrize(
    ("line", "wanted"), [("0, [N/A], [N/A]", 1), ("0, Enabled, 0", 7)], ids=["no counters", "MIG"]
)
def test_gpus_without_error_counters_or_cut_into_instances_are_fit(
    line: str, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(tmp_path, f"echo '{line}'", monkeypatch)

    assert find_faults(tmp_path, tmp_path, wanted) == []


def test_a_node_without_its_scratch_folder_is_unfit(tmp_path: Path) -> None:
    missing = tmp_path / "missing"

    assert find_faults(tmp_path, missing, 0) == [
        f"{missing} cannot be written (No such file or directory)"
    ]


def test_a_node_with_a_wrong_clock_is_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr("pipeline.submission.health.time.time", lambda: now + 500)

    (fault,) = find_faults(tmp_path, tmp_path, 0)
    assert fault.startswith("its clock is ")


def test_a_node_without_free_space_is_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.submission.health._FREE_BYTES", 2**62)

    assert "GiB free, less than" in find_faults(tmp_path, tmp_path, 0)[0]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for `srun` and `scontrol`: two nodes, the second of which says nothing."""
    note = f'echo "$*" >>{tmp_path}/orders'
    bodies = {
        "srun": "echo 'health: node1: fit'",
        "scontrol": f'[ "$2" = hostnames ] && printf "node1\\nnode2\\n" || {note}',
    }
    for name, body in bodies.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    return tmp_path


def test_a_job_avoids_a_node_that_does_not_answer_and_gives_up_after_three_such_starts(
    slurm: Path,
) -> None:
    recipe = Path(__file__).resolve().parents[2] / "launch/recipes/quickstart/train.yaml"
    config = load_config(TrainConfig, recipe, (f"output_dir={slurm}/run",))

    for _ in range(3):
        with pytest.raises(DiffembedError, match="queued again: unfit nodes node2: its check died"):
            begin(config, "7")
    with pytest.raises(DiffembedError, match="unfit nodes 4 times, not queued again: node2"):
        begin(config, "7")

    orders = [line for line in (slurm / "orders").read_text().splitlines() if "show" not in line]
    assert orders == ["requeue 7", "update JobId=7 ExcNodeList=node2"] * 3
    # None of these starts came to training.
    assert History(config.output_dir, "7").idle_starts(0) == 0


def test_an_order_to_slurm_outlives_a_restart_of_its_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in: answers the third time.
    (tmp_path / "scontrol").write_text(
        f"#!/bin/sh\necho >>{tmp_path}/calls\n"
        f"if [ $(wc -l <{tmp_path}/calls) -lt 3 ]; then\n"
        "  echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n"
        "fi\necho JobState=RUNNING PreemptTime=None\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("pipeline.submission.allocation._WAITS", (0, 0, 0))

    assert read_state("7") == State(running=True, preempted=False)
