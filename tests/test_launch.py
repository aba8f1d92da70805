"""A rank finds itself from its launcher's variables, or names in one line what is missing."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pipeline import comm, launch
from pipeline.errors import DiffembedError, UserError
from pipeline.launch import (
    World,
    discover_world,
    let_gpu_memory_grow,
    local_ranks,
    rendezvous,
    requested_gpu,
    require_accelerator,
    share_cores,
    without_rank,
)
from tests.support import PATIENCE, free_port

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[7-8]",
}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}


@pytest.mark.parametrize(
    ("environment", "rank", "world_size", "local_rank"),
    [
        ({}, 0, 1, 0),
        (OPEN_MPI, 1, 2, 0),
        (SRUN, 3, 4, 1),
        # torchrun started by srun on every node: the inner launcher is the one that counts.
        ({**SRUN, **TORCHRUN}, 5, 8, 2),
        # `python` inside a batch script, without srun.
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 0, 1, 0),
    ],
)
def test_a_rank_is_what_the_innermost_launcher_says(
    environment: dict[str, str], rank: int, world_size: int, local_rank: int
) -> None:
    world = discover_world(environment)

    assert (world.rank, world.world_size, world.local_rank) == (rank, world_size, local_rank)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "set RANK and WORLD_SIZE but not LOCAL_RANK .*run `unset RANK WORLD_SIZE`",
        ),
        ({**TORCHRUN, "RANK": "8"}, r"RANK=8 \| allowed: 0 to WORLD_SIZE-1 \(7\)"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, r"WORLD_SIZE=two \| allowed: a whole number"),
    ],
)
def test_what_a_launcher_says_wrong_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        discover_world(environment)


def test_ranks_of_one_host_meet_there_without_being_told() -> None:
    address, port = rendezvous({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})

    assert address == "127.0.0.1"
    assert (address, port) == rendezvous(TORCHRUN)


def test_ranks_of_two_runs_do_not_meet() -> None:
    ports = {rendezvous({"PMIX_NAMESPACE": f"prterun-{i}@1"})[1] for i in range(20)}

    assert len(ports) == 20


def test_two_runs_in_one_slurm_job_do_not_meet_and_ranks_of_one_do() -> None:
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node1", "MASTER_ADDR": "127.0.0.1"}
    srun = [{**SRUN, **job, "SLURM_STEP_ID": str(step)} for step in range(20)]
    assert len({rendezvous(environment)[1] for environment in srun}) == 20
    assert rendezvous({**srun[3], "SLURM_PROCID": "0"}) == rendezvous(srun[3])
    # mpirun starts a step of srun for the ranks on other nodes alone.
    runs = [{**OPEN_MPI, **job, "PMIX_NAMESPACE": f"prterun-{i}@1"} for i in range(20)]
    assert len({rendezvous(environment)[1] for environment in runs}) == 20
    assert rendezvous({**runs[3], "SLURM_STEP_ID": "0"}) == rendezvous(runs[3])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (OPEN_MPI, "MASTER_ADDR is not set, and the ranks are on several hosts .* -x MASTER_ADDR"),
        (
            {**SRUN, "SLURM_STEP_NODELIST": "node[7-"},
            "MASTER_ADDR is not set, and .*scontrol.* fix: set MASTER_ADDR",
        ),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({"MASTER_ADDR": "no host.invalid"}, "MASTER_ADDR=no host.invalid: .* allowed: a name"),
    ],
)
def test_a_rendezvous_that_is_missing_or_wrong_is_named(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        rendezvous(environment)


@pytest.fixture
def rank_0_of_2(monkeypatch: pytest.MonkeyPatch) -> World:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "127.0.0.1")  # so that what `start` sets is undone
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    return World(rank=0, world_size=2)


def test_a_port_that_somebody_else_has_is_one_line(rank_0_of_2: World) -> None:
    with (
        socket.create_server(("", int(os.environ["MASTER_PORT"]))),
        pytest.raises(DiffembedError, match=r"rank 0 of 2 .*MASTER_PORT\).*in use") as caught,
    ):
        comm.start(rank_0_of_2, timeout_seconds=PATIENCE)

    assert "\n" not in str(caught.value)
    assert "| fix: another program has the port" in str(caught.value)
    assert "deepspeed --master_port N" in str(caught.value)


def test_a_rank_that_nobody_joins_ends_with_one_line(rank_0_of_2: World) -> None:
    with pytest.raises(DiffembedError, match=r"rank 0 of 2 .* 1/2 clients joined") as caught:
        comm.start(rank_0_of_2, timeout_seconds=1)

    assert "\n" not in str(caught.value)


def test_a_rank_that_waits_long_says_for_whom(
    rank_0_of_2: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where RANK and WORLD_SIZE are left in a shell: it would wait for half an hour."""
    monkeypatch.setattr(comm, "_TELL_AFTER_SECONDS", (0.1, 0.1))
    with pytest.raises(DiffembedError):
        comm.start(rank_0_of_2, timeout_seconds=1)
    where = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    found = capsys.readouterr().out
    assert f"rank 0 waits for the other ranks of 2 at {where}; " in found
    assert "unset RANK, WORLD_SIZE, LOCAL_RANK" in found


@pytest.mark.parametrize(
    ("environ", "asked"),
    [
        ({}, "there is "),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, "there is "),
        ({"CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ""),
        ({"DS_ACCELERATOR": "cpu"}, ""),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2"),
        ({"SLURM_JOB_ID": "7"}, ""),  # a job without GPUs on a node that has some
    ],
)
def test_a_machine_with_a_gpu_asks_for_it_unless_it_is_hidden(
    tmp_path: Path, environ: dict[str, str], asked: str
) -> None:
    device = tmp_path / "nvidia0"
    assert requested_gpu(environ, (str(device),)) == ""
    device.touch()
    found = requested_gpu(environ, (str(device),))
    assert found.startswith(asked)
    assert bool(found) == bool(asked)


def test_a_rank_is_refused_where_torch_does_not_see_the_gpu(
    rank_0_of_2: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "requested_gpu", lambda: "there is /dev/nvidia0")
    with pytest.raises(UserError, match=r"there is /dev/nvidia0, but torch .* sees no GPU"):
        comm.start(rank_0_of_2)


@pytest.mark.parametrize(
    ("chosen", "visible", "fix"),
    [
        ("cuda", False, "unset DS_ACCELERATOR"),
        ("xpu", False, "unset DS_ACCELERATOR"),
        ("", True, "unset DS_ACCELERATOR"),
        ("cpu", True, "unset DS_ACCELERATOR, or export CUDA_VISIBLE_DEVICES= too, to compute"),
    ],
)
def test_deepspeed_computes_where_torch_does(
    chosen: str, visible: bool, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (None, "cuda" if visible else "cpu"):
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        if name:
            monkeypatch.setenv("DS_ACCELERATOR", name)
        require_accelerator(visible=visible)
    monkeypatch.setenv("DS_ACCELERATOR", chosen)
    with pytest.raises(UserError, match=f"DS_ACCELERATOR={chosen}, but torch sees .*fix: {fix}"):
        require_accelerator(visible=visible)


@pytest.mark.parametrize(
    ("environ", "added"),
    [
        ({}, {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, set()),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, set()),
        ({"PYTORCH_HIP_ALLOC_CONF": ""}, set()),
    ],
)
def test_gpu_memory_grows_in_place_unless_the_user_has_chosen(
    environ: dict[str, str], added: set[str]
) -> None:
    before = dict(environ)
    let_gpu_memory_grow(environ)
    assert environ == {**before, **dict.fromkeys(added, "expandable_segments:True")}


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),  # torchrun
        ({"LOCAL_SIZE": "2"}, 2),  # deepspeed
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, 8),
        # srun; on 2 hosts of 8, on 3 of 8 and one of 2, on 1 host.
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "26", "SLURM_STEP_TASKS_PER_NODE": "2,8(x3)"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 1),
        # One torchrun a host, started by srun.
        (
            {
                **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
                **{"SLURM_CPUS_PER_TASK": "64", "LOCAL_WORLD_SIZE": "8"},
            },
            8,
        ),
        # A job, not a step.
        ({"SLURM_TASKS_PER_NODE": "8", "SLURM_NTASKS": "8"}, 1),
    ],
)
def test_ranks_of_a_host_are_counted_as_the_launcher_says(
    environ: dict[str, str], ranks: int
) -> None:
    assert local_ranks(environ) == ranks


@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        ({"LOCAL_WORLD_SIZE": "8"}, "8"),
        # One torchrun a host, which srun gave all cores.
        (
            {"LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2", "SLURM_CPUS_PER_TASK": "64"},
            "8",
        ),
        # A rank that srun started sees its own cores alone.
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "8"}, "64"),
    ],
)
def test_ranks_share_the_cores_that_they_see(
    environ: dict[str, str], threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(os, "environ", environ)
    share_cores(World())
    assert environ["OMP_NUM_THREADS"] == threads


def test_a_process_without_these_variables_is_no_rank_under_any_launcher() -> None:
    launchers = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        "mpirun": tuple(f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK")),
        "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    }
    for launcher, names in launchers.items():
        environ = {**dict.fromkeys(names, "1"), names[1]: "2", "HF_HOME": "1", "SLURM_CONF": "c"}
        assert discover_world(environ).world_size == 2, launcher
        found = without_rank(environ)
        assert found == {"HF_HOME": "1", "SLURM_CONF": "c"}
        assert not discover_world(found).launched
