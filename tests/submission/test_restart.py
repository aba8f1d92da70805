"""Decisions about a training job that starts or ends, and faults that make a node unfit."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import TrainConfig, load_config
from pipeline.errors import DiffembedError
from pipeline.run_folder import latest_step
from pipeline.submission.allocation import JobState, attribute_faults, read_state, requeue
from pipeline.submission.health import Health, check_node
from pipeline.submission.restart import Ending, History, begin, decide, end
from pipeline.submission.slurm import NoAnswerError
from tests.fake_slurm import FakeSlurm, put_command, put_first_on_path


def ending(code: int, **changes: object) -> Ending:
    values = {"out_of_time": False, "preempted": False, "running": True, "idle_starts": 1}
    return Ending(code=code, **{**values, **changes})


@pytest.mark.parametrize(
    ("end", "verdict"),
    [
        (ending(0), "leave"),
        (ending(0, out_of_time=True), "leave"),
        (ending(2, preempted=True), "leave"),
        (ending(2, folder_fault="read-only"), "requeue"),
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
        History(tmp_path, "7").start(latest_step(checkpoints), "node1")
        assert History(tmp_path, "7").idle_starts(latest_step(checkpoints)) == expected
    (checkpoints / "latest").write_text("step-000020\n")
    history = History(tmp_path, "7")

    assert history.idle_starts(latest_step(checkpoints)) == 0
    assert history.endings(0) == ["unknown: a node failed, or the job was killed"] * 2
    # Another job counts from zero.
    assert History(tmp_path, "8").idle_starts(0) == 0


def test_a_node_with_room_and_the_right_time_is_fit(tmp_path: Path) -> None:
    assert check_node(tmp_path, tmp_path, 0) == Health()


def put_nvidia_smi(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_command(folder / "nvidia-smi", body)
    put_first_on_path(folder, monkeypatch)


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

    assert check_node(tmp_path, tmp_path, 2) == Health(own=(fault,))


@pytest.mark.parametrize(
    ("line", "wanted"), [("0, [N/A], [N/A]", 1), ("0, Enabled, 0", 7)], ids=["no counters", "MIG"]
)
def test_gpus_without_error_counters_or_cut_into_instances_are_fit(
    line: str, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(tmp_path, f"echo '{line}'", monkeypatch)

    assert check_node(tmp_path, tmp_path, wanted) == Health()


def test_a_node_without_its_scratch_folder_is_unfit(tmp_path: Path) -> None:
    missing = tmp_path / "missing"

    fault = f"{missing} cannot be written (No such file or directory)"
    assert check_node(tmp_path, missing, 0) == Health(own=(fault,))
    # Of the run's folder it may be the node's mount, or the folder itself.
    assert check_node(missing, tmp_path, 0) == Health(folder=(fault,))


def test_a_node_with_a_wrong_clock_is_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr("pipeline.submission.health.time.time", lambda: now + 500)

    (fault,) = check_node(tmp_path, tmp_path, 0).clock
    assert fault.startswith("its clock is ")


def test_a_full_run_folder_is_a_fault_that_all_nodes_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.submission.health._FREE_BYTES", 2**62)

    health = check_node(tmp_path, tmp_path, 0)
    assert "GiB free, less than" in health.shared[0]
    # The same of the node's own disk is the node's.
    assert "GiB free, less than" in health.own[0]


@pytest.fixture
def hung_mount(tmp_path: Path) -> Iterator[Path]:
    """A file system in user space whose server never answers."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = tmp_path / "hung"
    folder.mkdir()
    place = str(folder).encode()
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"no file systems in user space: {error}")
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"fuse", place, b"fuse", 0, options):
        pytest.skip("only root mounts file systems")
    yield folder
    os.close(server)  # ends all that wait for it
    libc.umount2(place, 2)


def test_a_folder_that_hangs_is_named_instead_of_waited_for(
    hung_mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Enough for the check of the other folder, which starts a Python.
    monkeypatch.setattr("pipeline.submission.health._FOLDER_SECONDS", 15)

    fault = f"{hung_mount} did not answer within 15 s"
    assert check_node(hung_mount, hung_mount.parent, 0) == Health(folder=(fault,))


FULL = Health(shared=("run is full",))
AWAY = Health(folder=("run cannot be written (Stale file handle)",))
LATE = Health(clock=("its clock is 600 s away",))


@pytest.mark.parametrize(
    ("answers", "nodes", "shared"),
    [
        ([Health(), Health()], {}, False),
        ([Health(own=("GPU",)), Health()], {"node0": "GPU"}, False),
        ([Health(), None], {"node1": "its check did not answer"}, False),
        ([None], {"node0": "its check did not answer"}, False),
        # A fault that all nodes report belongs to none of them.
        ([None, None], {}, True),
        ([FULL], {}, True),
        ([FULL, Health()], {}, True),
        ([FULL, None], {}, True),
        ([AWAY, AWAY], {}, True),
        ([AWAY, Health()], {"node0": AWAY.folder[0]}, False),
        ([AWAY], {"node0": AWAY.folder[0]}, False),
        ([LATE, Health()], {"node0": LATE.clock[0]}, False),
        ([LATE, LATE], {}, False),
    ],
)
def test_what_all_nodes_share_is_held_against_none_of_them(
    answers: list[Health | None], nodes: dict[str, str], shared: bool
) -> None:
    faults = attribute_faults({f"node{i}": health for i, health in enumerate(answers)})

    assert (faults.nodes, bool(faults.shared)) == (nodes, shared)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A Slurm of two nodes; the health check of the second does not answer."""
    slurm = FakeSlurm(tmp_path, monkeypatch)
    slurm.put("srun", "echo 'health: node1: {}'")
    slurm.put(
        "scontrol",
        """\
case "$1 $2" in
  "show hostnames") echo "$3" | tr , "\\n" ;;
  "show job") echo "Partition=test JobState=${STATE:-RUNNING}" ;;
  "show partition") echo "TotalNodes=${NODES:-9}" ;;
  *) record "$@" ;;
esac""",
    )
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node1,node2")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setattr("pipeline.submission.slurm.LONGEST_WAIT", 0)
    return slurm


@pytest.fixture
def config(slurm: FakeSlurm) -> TrainConfig:
    recipe = Path(__file__).resolve().parents[2] / "launch/recipes/quickstart/train.yaml"
    return load_config(TrainConfig, recipe, (f"output_dir={slurm.folder}/run",))


def test_a_job_avoids_a_node_that_does_not_answer_and_gives_up_after_three_such_starts(
    slurm: FakeSlurm, config: TrainConfig
) -> None:
    for _ in range(3):
        with pytest.raises(DiffembedError, match="requeued: unfit nodes node2: its check did"):
            begin(config, "7")
    with pytest.raises(DiffembedError, match="unfit nodes 4 times, not requeued: node2"):
        begin(config, "7")

    assert slurm.orders == ["requeue 7", "update JobId=7 ExcNodeList=node2"] * 3
    # None of these starts came to training.
    assert History(config.output_dir, "7").idle_starts(0) == 0


def test_a_job_does_not_wait_for_nodes_that_its_partition_does_not_have(
    slurm: FakeSlurm, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODES", "2")

    with pytest.raises(DiffembedError, match="too few nodes are left without node2, not requeued"):
        begin(config, "7")
    assert slurm.orders == []


def test_a_check_is_read_between_lines_of_any_encoding(
    slurm: FakeSlurm, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    greeting = r"printf 'caf\351 of node1\n' | tee /dev/stderr"
    slurm.put("srun", greeting + r"; printf 'health: node%s: {}\n' 1 2")

    begin(config, "7")

    assert "start 1 of job 7" in capsys.readouterr().out
    assert slurm.orders == []


def test_a_check_that_cannot_start_counts_like_a_crash(
    slurm: FakeSlurm, config: TrainConfig
) -> None:
    slurm.put("srun", "echo 'srun: error: Unable to create step' >&2; exit 1")

    with pytest.raises(DiffembedError, match=r"^requeued: the nodes could not be checked"):
        begin(config, "7")
    assert History(config.output_dir, "7").idle_starts(0) == 1


@pytest.mark.parametrize("answer", ["exit 1", "echo 'health: node1: {}'"], ids=["none", "one"])
def test_a_job_that_is_cancelled_during_its_check_stays_cancelled(
    answer: str, slurm: FakeSlurm, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.put("srun", answer)
    monkeypatch.setenv("STATE", "CANCELLED")

    with pytest.raises(DiffembedError, match=r"^not requeued: Slurm ends this job itself"):
        begin(config, "7")
    assert slurm.orders == []


def test_a_full_run_folder_is_waited_for_and_then_ends_the_job_in_one_line(
    slurm: FakeSlurm,
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slurm.put("srun", 'printf "health: node%s: {}\\n" 1 2')
    # Full on the first look, not on the second.
    looks = iter([(28, "run has 0.60 GiB free"), (0, "")])
    monkeypatch.setattr("pipeline.submission.restart.probe", lambda _: next(looks))
    begin(config, "7")
    assert "run has 0.60 GiB free; waiting, up to 30 minutes\nstart 1" in capsys.readouterr().out

    monkeypatch.setattr("pipeline.submission.restart.probe", lambda _: (28, "run is full"))
    monkeypatch.setattr("pipeline.submission.restart._SHARED_SECONDS", 0)
    with pytest.raises(DiffembedError, match=r"run is full, for 0 minutes, not requeued \| fix:"):
        begin(config, "7")
    assert slurm.orders == []


def test_a_job_is_queued_again_also_when_its_end_cannot_be_noted(
    slurm: FakeSlurm, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pipeline.submission.restart.write_json", fail)
    end(config, "7", 1, out_of_time=False)

    assert slurm.orders == ["requeue 7"]


def test_no_answer_is_not_an_answer(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    # Answers the third time.
    no_contact = "slurm_load_jobs error: Unable to contact slurm controller"
    slurm.put(
        "scontrol",
        "record\n[ $(count) -lt 3 ] || exec echo JobState=RUNNING\n"
        f"echo '{no_contact}' >&2; exit 1",
    )
    assert read_state("7") == JobState(running=True, preempted=False)

    monkeypatch.setattr("pipeline.submission.allocation.IN_A_JOB", 0)
    (slurm.folder / "orders").unlink()
    with pytest.raises(NoAnswerError, match="Unable to contact slurm controller"):
        read_state("7")


def test_a_requeue_whose_answer_is_lost_is_not_followed_by_another_job(slurm: FakeSlurm) -> None:
    # The first requeue is accepted without an answer, the second is refused.
    slurm.put(
        "scontrol",
        "[ $1 = requeue ] || exec echo JobState=PENDING\nrecord\n"
        "[ $(count) = 1 ] && echo 'Socket timed out on send/recv' >&2 ||"
        " echo 'Job is pending execution' >&2\nexit 1",
    )

    assert requeue("7") == ""
