"""A rank sees that its launcher has ended, and the variables that it has set for the ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import launch, run_folder
from pipeline.errors import DiffembedError
from tests.support import free_port
from tests.training.launches import ROOT, TRAIN, Launch, launcher_words

TORCHRUN = {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        ({}, None),
        ({**TORCHRUN, "MASTER_PORT": "29500"}, ("127.0.0.1", 29500)),
        # The first rank keeps the store itself.
        ({**TORCHRUN, "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "False"}, None),
        ({"RANK": "0", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}, None),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "PMIX_SERVER_URI4": "prterun-host-12@0.0;tcp4://10.0.0.7:5167",
            },
            ("10.0.0.7", 5167),
        ),
        ({"OMPI_COMM_WORLD_RANK": "1", "PMIX_SERVER_URI4": "x;usock:/run/pmix"}, None),
        # torchrun inside a job of mpirun.
        (
            {
                **TORCHRUN,
                "MASTER_PORT": "29500",
                "OMPI_COMM_WORLD_RANK": "1",
                "PMIX_SERVER_URI4": "prterun-host-12@0.0;tcp4://10.0.0.7:5167",
            },
            ("127.0.0.1", 29500),
        ),
    ],
)
def test_where_the_launcher_answers(
    environment: dict[str, str], address: tuple[str, int] | None
) -> None:
    assert launch.launcher_address(environment) == address


def test_a_launcher_that_answers_is_no_fault_and_one_that_has_gone_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "_TIMEOUT_SECONDS", 0.1)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        launch.require_launcher()
    with pytest.raises(DiffembedError, match=rf"launcher .* 127.0.0.1:{port} has ended"):
        launch.require_launcher()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchrun", ["--no-python"], "the launcher that answered at"),
        ("deepspeed", ["--no_python", "--no_local_rank"], "the command deepspeed has ended"),
        # After its end, mpirun forwards no output of ranks.
        ("mpirun", [], ""),
    ],
)
def test_ranks_of_a_launcher_that_is_killed_as_they_start_do_not_wait(
    recipe: Path, tmp_path: Path, name: str, options: list[str], message: str
) -> None:
    # A rank that takes long to become Python.
    slow, go = tmp_path / "slow.sh", tmp_path / "go"
    slow.write_text(f'until [[ -e {go} ]]; do sleep 0.1; done\nexec {sys.executable} "$@"\n')
    words = [word for word in launcher_words(name, free_port()) if word != sys.executable]
    words += [*options, "bash", str(slow)]
    arguments = (recipe, "--deepspeed", "ds_configs/zero3.json", f"output_dir={tmp_path / 'run'}")

    with Launch(words, TRAIN, *arguments) as launch:
        while len(launch.ranks()) < 2:
            assert launch.process.poll() is None, launch.output()
        launch.process.kill()
        launch.process.wait()
        go.touch()
        launch.require_nothing_left()

        assert message in launch.output()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_rank_alone_saves_and_stops_when_the_command_that_started_it_is_killed(
    recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [str(Path(sys.executable).with_name("diffembed")), "train", "--ranks", "1"]
    endless = ("num_steps=1000000", "checkpoint.every=1000000", "schedule=cache")

    with Launch(words, recipe, *endless, f"output_dir={run}") as launch:
        while not (run / "metrics.jsonl").exists():
            assert launch.process.poll() is None, launch.output()
            time.sleep(0.1)
        launch.process.kill()  # as the end of its terminal does
        launch.process.wait()
        launch.require_nothing_left()

        assert "the launcher's end after step" in launch.output()
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert run_folder.latest_step(run / "checkpoints") == steps > 0


@pytest.mark.parametrize(
    ("given", "exported", "chosen"),
    [
        # A shell that exports what torchrun would, as the parent of a rank.
        ({}, "OMP_NUM_THREADS=1 TORCHELASTIC_RUN_ID=none", False),
        ({"OMP_NUM_THREADS": "1"}, "TORCHELASTIC_RUN_ID=none", True),
        ({"OMP_NUM_THREADS": "3"}, "TORCHELASTIC_RUN_ID=none", True),
        ({}, "OMP_NUM_THREADS=1", True),  # torchrun has not started this rank
        ({}, "TORCHELASTIC_RUN_ID=none", False),
    ],
)
def test_the_one_thread_of_torchrun_is_not_the_users_choice(
    given: dict[str, str], exported: str, chosen: bool
) -> None:
    code = "from pipeline.launch import threads_are_chosen as chosen; print(chosen())"
    script = f"export {exported}; {sys.executable} -c '{code}'; true"
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], **given}
    done = subprocess.run(
        ["sh", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(chosen), done.stderr
