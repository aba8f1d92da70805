"""The shipped batch scripts, unmodified, on a real Slurm, with a stand-in for the trainer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cluster import Cluster

pytestmark = pytest.mark.slurm

# Says who it is; then ends as its last argument asks.
STAND_IN = """\
import os, signal, sys, time
env = os.environ
rank, restarts = int(env["SLURM_PROCID"]), int(env.get("SLURM_RESTART_COUNT", "0"))
print("rank", rank, "of", env["SLURM_STEP_NUM_TASKS"], "local", env["SLURM_LOCALID"],
      "on", env["SLURMD_NODENAME"], "threads", env["OMP_NUM_THREADS"],
      "master", env["MASTER_ADDR"], "restart", restarts, flush=True)
ending = sys.argv[-1]
if ending == "fault":
    sys.exit(2)
if ending == "crash" and rank == 1:
    sys.exit(1)
if ending in ("crash", "out-of-time") and restarts == 0:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    print("ready", flush=True)
    time.sleep(300)
"""


class TrainJob:
    """`slurm/train.sbatch`, submitted from a folder whose trainer is the stand-in."""

    def __init__(self, cluster: Cluster, checkout: Path, folder: Path, *words: str) -> None:
        (folder / "pipeline").mkdir()
        (folder / "pipeline/train.py").write_text(STAND_IN)
        # Slurm's patience with the peers of a crashed rank, shortened.
        site = folder / "cluster.env"
        site.write_text(f"source {checkout}/slurm/cluster.env; SRUN_FLAGS=(--wait=2)\n")
        self._cluster, self._log = cluster, folder / "log"
        *flags, ending = words
        self.id = cluster.attempt(
            *("sbatch", "--parsable", f"--output={self._log}", *flags),
            *(checkout / "slurm/train.sbatch", ending),
            check=True,
            cwd=folder,
            # The threads of a rank are for the script to choose.
            environment={"DIFFEMBED_CLUSTER_ENV": str(site), "OMP_NUM_THREADS": ""},
        ).stdout.strip()

    def count(self, pattern: str) -> int:
        """How many lines of the log hold the pattern."""
        return (
            len(re.findall(pattern, self._log.read_text(), re.MULTILINE))
            if self._log.exists()
            else 0
        )

    def end(self) -> str:
        """Wait until the job has ended and return its state."""
        return self._cluster.wait(self.id)[self.id]


def test_training_starts_one_rank_per_gpu_of_every_node(
    cluster: Cluster, checkout: Path, tmp_path: Path
) -> None:
    flags = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=4")
    job = TrainJob(cluster, checkout, tmp_path, *flags, "finish")

    assert job.end() == "COMPLETED"
    for rank in range(4):
        local, node = rank % 2, 1 + rank // 2
        line = f"rank {rank} of 4 local {local} on node{node} threads 2 master 127.0.0.1 restart 0"
        assert job.count(line) == 1


def test_training_out_of_time_is_requeued_and_goes_on(
    cluster: Cluster, checkout: Path, tmp_path: Path
) -> None:
    job = TrainJob(cluster, checkout, tmp_path, "--nodes=2", "out-of-time")
    cluster.poll(lambda: job.count("ready") == 2)

    # What `--signal=B:USR1@120` does two minutes before the time limit.
    cluster.command("scancel", "--batch", "--signal=USR1", job.id)

    assert job.end() == "COMPLETED"
    assert (job.count("rank .* restart 0$"), job.count("rank .* restart 1$")) == (2, 2)


def test_the_last_element_of_an_array_is_requeued_without_the_others(
    cluster: Cluster, checkout: Path, tmp_path: Path
) -> None:
    job = TrainJob(cluster, checkout, tmp_path, "--array=0-1", "out-of-time")
    cluster.poll(lambda: job.count("ready") == 2)
    first, last = f"{job.id}_0", f"{job.id}_1"

    # Its plain job id is that of the array.
    cluster.command("scancel", "--batch", "--signal=USR1", last)
    cluster.poll(lambda: cluster.states(job.id)[last] == "COMPLETED")

    assert cluster.states(job.id)[first] == "RUNNING"


def test_training_with_a_faulty_config_fails_with_its_code_and_stays_down(
    cluster: Cluster, checkout: Path, tmp_path: Path
) -> None:
    job = TrainJob(cluster, checkout, tmp_path, "--nodes=2", "fault")

    assert job.end() == "FAILED"
    assert "ExitCode=2:0" in cluster.command("scontrol", "show", "job", job.id)


def test_training_ends_when_one_rank_dies(cluster: Cluster, checkout: Path, tmp_path: Path) -> None:
    job = TrainJob(cluster, checkout, tmp_path, "--nodes=2", "crash")

    # Its peer would sleep for minutes.
    assert job.end() == "FAILED"


def test_training_without_a_processor_per_gpu_says_what_to_change(
    cluster: Cluster, checkout: Path, tmp_path: Path
) -> None:
    flags = ("--gpus-per-node=2", "--cpus-per-task=1")
    job = TrainJob(cluster, checkout, tmp_path, *flags, "finish")

    assert job.end() == "FAILED"
    assert job.count("1 CPUs for 2 GPUs .* fix: --exclusive") == 1


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
