"""Training over a network: two hosts with one rank each, under launchers that reach both."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import free_port
from tests.tools.kill_tally import curve
from tests.training.launches import ROOT, TRAIN, Launch, send
from tests.training.trainer_command import run_trainer
from tests.training.two_hosts import (
    ADDRESSES,
    INTERFACE,
    remote_shell,
    two_hosts,
    why_unavailable,
)

BIN = Path(sys.executable).parent


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    if reason := why_unavailable():
        pytest.skip(reason)
    with two_hosts() as names:
        yield names


def under_torchrun(hosts: tuple[str, str], number: int, port: int) -> list[str]:
    """The command that each host starts for itself."""
    return [
        *("ip", "netns", "exec", hosts[number], str(BIN / "torchrun"), "--nnodes=2"),
        *(f"--node-rank={number}", f"--master-addr={ADDRESSES[0]}", f"--master-port={port}"),
        "--nproc-per-node=1",
    ]


def by_script(hosts: tuple[str, str], name: str) -> list[str]:
    """The command on the first host, which starts the other's rank by ssh."""
    return ["ip", "netns", "exec", hosts[0], str(ROOT / "launch" / name)]


def reach_both(folder: Path, hosts: tuple[str, str]) -> dict[str, str]:
    """The environment in which launchers find both hosts, and the wire between them."""
    hostfile, settings = folder / "hostfile", folder / "deepspeed_env"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    settings.write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    return {
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "HOSTFILE": str(hostfile),
        "DS_ENV_FILE": str(settings),
        "PATH": f"{remote_shell(folder, hosts)}:{BIN}:{os.environ['PATH']}",
        "PRTE_MCA_prte_if_include": INTERFACE,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def test_a_run_over_two_hosts_stops_and_continues_as_on_one(
    recipe: Path, tmp_path: Path, hosts: tuple[str, str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = (recipe, "--deepspeed", "ds_configs/zero3.json", "num_steps=60")
    done = run_trainer(*arguments, f"output_dir={one}", num_ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    arguments = (*arguments, f"output_dir={two}")
    environment = reach_both(tmp_path, hosts)

    # The script hands SIGTERM on as SIGUSR1, because mpirun itself would kill the ranks.
    for script, number in (
        ("train_mpirun.sh", signal.SIGTERM),
        ("train_deepspeed.sh", signal.SIGUSR1),
    ):
        with Launch(by_script(hosts, script), *arguments, environment=environment) as launch:
            # Each start rewrites the file of the curve.
            while "step " not in launch.output():
                assert launch.process.poll() is None, launch.output()
                time.sleep(0.01)
            to_script = number == signal.SIGTERM
            send(launch.process.pid if to_script else min(launch.ranks()), number)
            assert launch.wait() == 75, launch.output()
            assert "SIGUSR1 after step" in launch.output()
            launch.require_nothing_left()

    port = free_port()
    with (
        Launch(under_torchrun(hosts, 0, port), TRAIN, *arguments, environment=environment) as first,
        Launch(
            under_torchrun(hosts, 1, port), TRAIN, *arguments, environment=environment
        ) as second,
    ):
        assert first.wait() == 0, first.output()
        assert second.wait() == 0, second.output()
        assert "resuming" in first.output()
    assert curve(two) == curve(one)
