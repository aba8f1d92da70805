"""The cells of `python -m tests.tools.launcher_signals` in which launchers differ most."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.slurm.cluster import why_unavailable
from tests.tools.launcher_signals import COMMAND, ON_SLURM, Trial, environment_of


@pytest.mark.parametrize(
    ("launcher", "number", "target", "code"),
    [
        (COMMAND, signal.SIGINT, "launcher", 75),
        # The script for mpirun is stopped over two hosts, in test_two_hosts.py.
        # Hands nothing on: the ranks notice that it has gone.
        ("deepspeed", signal.SIGTERM, "launcher", 128 + signal.SIGTERM),
        # srun would kill the ranks; Slurm gives them time.
        ("srun", signal.SIGTERM, "job", 75),
    ],
)
def test_a_run_that_is_asked_to_stop_loses_nothing(
    recipe: Path, tmp_path: Path, launcher: str, number: signal.Signals, target: str, code: int
) -> None:
    if launcher in ON_SLURM and (reason := why_unavailable()):
        pytest.skip(reason)
    with environment_of(launcher) as environment:
        end = Trial(launcher, recipe, tmp_path, environment).outcome(number, target)

    assert end.nothing_lost, end
    assert end.code == code
    assert not end.ranks_live


def test_a_run_that_is_asked_again_ends_without_a_checkpoint_of_that_moment(
    recipe: Path, tmp_path: Path
) -> None:
    with environment_of("mpirun") as environment:
        trial = Trial("mpirun", recipe, tmp_path, environment, saves=False)
        end = trial.outcome_of_second(signal.SIGUSR1)

    assert not end.ranks_live
    assert not end.reason
    assert end.code == 128 + signal.SIGUSR1
    # The checkpoint before is whole and `latest` names it: every file has been read.
    assert 0 < end.saved <= end.steps
    assert not end.saved % 2
