"""A training job survives when its controller, disk or nodes are away for a while."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.test_batch_scripts import TrainJob

pytestmark = pytest.mark.slurm

# A slow `module load` that waits for the test.
SLOW = "activate() {{ until [[ -e {} ]]; do sleep 0.1; done; }}"


def test_training_waits_for_a_controller_that_is_away_as_it_starts(
    cluster: Cluster, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    job = TrainJob(cluster, tmp_path / "x", "finish", "--nodes=2", site=SLOW.format(go))
    cluster.wait(job.id, {"RUNNING"}.issuperset)

    with cluster.without_controller():
        go.touch()
        cluster.poll(lambda: job.find("Unable to contact .*; waiting for it") != [])

    assert job.end() == "COMPLETED"
    assert sorted(job.find(r"rank (\d) .* restart 0$")) == ["0", "1"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """A small file system at `disk`, and how to change its options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=3g", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root mounts file systems")

    def change(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    yield change
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_training_waits_for_a_disk_that_is_read_only_or_full_for_a_while(
    cluster: Cluster, tmp_path: Path, disk: Callable[[str], None]
) -> None:
    job = TrainJob(cluster, tmp_path / "x", "wait", "--nodes=2", run=tmp_path / "disk/run")
    cluster.poll(lambda: job.find(r"Read-only file system\); waiting, up to 30 minutes") != [])
    disk("rw")
    cluster.poll(lambda: len(job.find("ready")) == 2)

    disk("size=64k")
    (tmp_path / "disk/junk").write_bytes(b"x" * 2**15)
    with contextlib.suppress(OSError), (tmp_path / "disk/more").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    os.kill(cluster.find_rank("pipeline/train.py", 1), signal.SIGKILL)
    cluster.poll(lambda: job.find(r"(No space left|GiB free).*; waiting, up to 30 minutes") != [])
    disk("size=3g")

    assert job.end() == "COMPLETED"
    assert job.find("the end of this start could not be recorded: .* No space left on device")
    # It is no node's fault.
    assert "ExcNodeList=(null)" in cluster.command("scontrol", "show", "job", job.id)
