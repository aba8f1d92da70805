"""The shipped batch scripts, unmodified, on a real Slurm, with a fake trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.fake_slurm import put_command
from tests.slurm.cluster import BatchJob, Cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
# Prints its rank and environment, then ends in the way that $ENDING names, once all ranks have
# started: Slurm counts its patience with the other ranks from the end of the first.
TRAINER = """\
import os, pathlib, signal, sys, time
env = os.environ
rank, restarts = int(env["SLURM_PROCID"]), int(env.get("SLURM_RESTART_COUNT", "0"))
print("rank", rank, "of", env["SLURM_STEP_NUM_TASKS"], "local", env["SLURM_LOCALID"],
      "on", env["SLURMD_NODENAME"], "threads", env["OMP_NUM_THREADS"],
      "master", env["MASTER_ADDR"], "restart", restarts, flush=True)
started = pathlib.Path("started-" + env["SLURM_JOB_ID"] + "-" + str(restarts))
started.mkdir(exist_ok=True)
(started / str(rank)).touch()
while len(os.listdir(started)) < int(env["SLURM_STEP_NUM_TASKS"]):
    time.sleep(0.05)
ending = env["ENDING"]
if ending == "fault":
    sys.exit(2)
if ending == "stop":
    sys.exit(75)
if rank == 1 and (ending == "crash-always" or ending == "crash" and restarts == 0):
    sys.exit(1)
if ending == "slow save" and restarts == 0:
    signal.signal(signal.SIGUSR1, lambda *_: print("saving", flush=True))
    while True:
        time.sleep(1)
if ending in ("crash", "crash-always", "wait") and restarts == 0 or ending == "crash-always":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("ready", flush=True)
    time.sleep(3600)
"""
# Eight GPUs that answer, on a machine with or without any.
NVIDIA_SMI = """\
#!/bin/sh
if [ "$ENDING" = unfit ] && [ -z "$SLURM_RESTART_COUNT" ]; then
  echo "Unable to determine the device handle for GPU 0000:3B:00.0: Unknown Error" >&2
  exit 255
fi
for i in 0 1 2 3 4 5 6 7; do echo "$i, Disabled, 0"; done
"""


class TrainJob(BatchJob):
    """`slurm/train.sbatch`, submitted from a folder with a fake trainer.

    Args:
        cluster: runs it.
        folder: where it is submitted.
        ending: the way in which the trainer ends.
        flags: of sbatch.
        run: the run's folder.
        site: more lines of the site's file.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        ending: str,
        *flags: str,
        run: Path = Path("run"),
        site: str = "",
    ) -> None:
        (folder / "pipeline").mkdir(parents=True)
        (folder / "pipeline/train.py").write_text(TRAINER)
        put_command(folder / "bin/nvidia-smi", NVIDIA_SMI)
        config = yaml.safe_load((ROOT / "launch/recipes/quickstart/train.yaml").read_text())
        (folder / "train.yaml").write_text(yaml.safe_dump({**config, "output_dir": str(run)}))
        # Slurm's patience with the other ranks, shortened only where they would sleep on:
        # a busy machine may run one rank seconds after the other.
        patience = "--wait=2" if ending in ("crash", "crash-always", "wait") else ""
        own = f"source {ROOT}/slurm/cluster.env; SRUN_FLAGS=({patience})\n{site}\n"
        (folder / "cluster.env").write_text(own)
        super().__init__(cluster, folder / "log")
        self.id = cluster.attempt(
            *("sbatch", "--parsable", f"--output={self.log}", *flags),
            *(ROOT / "slurm/train.sbatch", "train.yaml"),
            check=True,
            cwd=folder,
            environment={
                "DIFFEMBED_CLUSTER_ENV": str(folder / "cluster.env"),
                "ENDING": ending,
                "PATH": f"{folder}/bin:{cluster.environment['PATH']}",
                "PYTHONPATH": str(ROOT),
                # The threads of a rank are for the script to choose.
                "OMP_NUM_THREADS": "",
            },
        ).stdout.strip()


@pytest.fixture(scope="module")
def jobs(
    session_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, TrainJob]]:
    """All jobs at once: most of their time they wait for Slurm to start them again."""
    two = "--nodes=2"
    wanted = {
        "gpus": ("finish", two, "--gpus-per-node=2", "--cpus-per-task=4"),
        "no CPU per GPU": ("finish", "--gpus-per-node=2", "--cpus-per-task=1"),
        "out of time": ("wait", two),
        # Slurm signals two minutes before the limit, when all ranks listen, and a busy machine has
        # another minute to start the program that requeues 30 seconds before the limit.
        "slow save": ("slow save", two, "--time=3"),
        "array": ("wait", "--array=0-1"),
        "cancelled": ("wait", two),
        "crash": ("crash", two),
        "crash-always": ("crash-always", two),
        "fault": ("fault", two),
        "stop": ("stop", two),
        "unfit": ("unfit", "--gpus-per-node=1"),
    }
    folder = tmp_path_factory.mktemp("jobs")
    started = {
        name: TrainJob(session_cluster, folder / name.replace(" ", "-"), *words)
        for name, words in wanted.items()
    }
    yield started
    session_cluster.cancel_all()


def test_training_starts_one_rank_per_gpu_of_every_node(jobs: dict[str, TrainJob]) -> None:
    job = jobs["gpus"]

    assert job.end() == "COMPLETED"
    for rank in range(4):
        local, node = rank % 2, 1 + rank // 2
        line = f"rank {rank} of 4 local {local} on node{node} threads 2 master 127.0.0.1 restart 0"
        assert len(job.find(line)) == 1


def test_training_without_a_processor_per_gpu_says_what_to_change(
    jobs: dict[str, TrainJob],
) -> None:
    job = jobs["no CPU per GPU"]

    assert job.end() == "FAILED"
    assert job.find("1 CPUs for 2 GPUs .* fix: --exclusive")


def test_training_out_of_time_is_requeued_and_continues(
    jobs: dict[str, TrainJob], session_cluster: Cluster
) -> None:
    job = jobs["out of time"]
    session_cluster.poll(lambda: len(job.find("ready")) == 2)

    # As `--signal=B:USR1@120` two minutes before the time limit.
    session_cluster.command("scancel", "--batch", "--signal=USR1", job.id)

    assert job.end() == "COMPLETED"
    assert job.find(r"rank (\d) .* restart 0$") != []
    assert sorted(job.find(r"rank (\d) .* restart 1$")) == ["0", "1"]


def test_training_whose_save_outlasts_the_time_limit_is_requeued_before_it(
    jobs: dict[str, TrainJob],
) -> None:
    job = jobs["slow save"]

    assert job.end() == "COMPLETED"
    assert set(job.find(r"^(\d): saving$")) == {"0", "1"}
    assert job.find("^requeued: out of time")
    assert sorted(job.find(r"rank (\d) .* restart 1$")) == ["0", "1"]


def test_the_last_element_of_an_array_is_requeued_without_the_others(
    jobs: dict[str, TrainJob], session_cluster: Cluster
) -> None:
    job = jobs["array"]
    session_cluster.poll(lambda: len(job.find("ready")) == 2)
    first, last = f"{job.id}_0", f"{job.id}_1"

    # Its plain job id is the array's id.
    session_cluster.command("scancel", "--batch", "--signal=USR1", last)
    session_cluster.poll(lambda: session_cluster.states(job.id)[last] == "COMPLETED")

    assert session_cluster.states(job.id)[first] == "RUNNING"


def test_training_that_somebody_cancels_stays_cancelled(
    jobs: dict[str, TrainJob], session_cluster: Cluster
) -> None:
    job = jobs["cancelled"]
    session_cluster.poll(lambda: len(job.find("ready")) == 2)

    session_cluster.command("scancel", job.id)
    # Its ranks saved and left with 75; asking for a requeue now would bring the job back.
    session_cluster.poll(lambda: job.find("not requeued: Slurm ends this job itself") != [])

    assert job.end() == "CANCELLED"


def test_training_with_a_faulty_config_fails_with_its_code_and_stays_down(
    jobs: dict[str, TrainJob], session_cluster: Cluster
) -> None:
    job = jobs["fault"]

    assert job.end() == "FAILED"
    assert "ExitCode=2:0" in session_cluster.command("scontrol", "show", "job", job.id)
    assert job.find("not requeued: exit code 2")


def test_training_that_is_asked_to_stop_stays_down(jobs: dict[str, TrainJob]) -> None:
    job = jobs["stop"]

    assert job.end() == "FAILED"
    assert job.find("not requeued: stopped on request; submit again to continue")


def test_training_continues_after_the_crash_of_a_rank(jobs: dict[str, TrainJob]) -> None:
    job = jobs["crash"]

    # Its peer would sleep for minutes.
    assert job.end() == "COMPLETED"
    # 1 of the crashed rank, 137 of the peer that Slurm killed; srun hands on the higher one.
    assert job.find("^requeued: the ranks ended with exit code 137")


def test_training_without_progress_across_three_requeues_stops_and_says_why(
    jobs: dict[str, TrainJob],
) -> None:
    job = jobs["crash-always"]

    assert job.end() == "FAILED"
    assert job.find(r"rank 0 .* restart (\d)$") == ["0", "1", "2", "3"]
    assert job.find(
        r"made no progress across 3 requeues: each start began at step 0 of run and ended before "
        r"the next checkpoint \(4 x exit code 137\) \| fix: read the log above"
    )


def test_an_unfit_node_is_named_and_the_job_continues_without_it(jobs: dict[str, TrainJob]) -> None:
    job = jobs["unfit"]

    assert job.end() == "COMPLETED"
    (unfit,) = job.find(
        r"requeued: unfit nodes (node\d): nvidia-smi: Unable to determine the device"
    )
    assert job.find(r"rank 0 of 1 .* on (node\d) .* restart 1") == [
        {"node1": "node2", "node2": "node1"}[unfit]
    ]
    # No rank ever started on it.
    assert not job.find("rank .* restart 0$")


def test_evaluation_outside_an_array_says_how_to_submit_it(
    cluster: Cluster, checkout: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    job = cluster.attempt(
        *("sbatch", "--parsable", f"--output={log}", "slurm/evaluate.sbatch", "run", "CONFIG"),
        cwd=checkout,
        check=True,
    ).stdout.strip()

    assert cluster.wait(job) == {job: "FAILED"}
    assert "fix: diffembed submit evaluate CONFIG" in log.read_text()
