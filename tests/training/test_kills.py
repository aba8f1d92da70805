"""The short form of `python -m tests.tools.kill_tally`."""

from __future__ import annotations

from pathlib import Path

from tests.tools.kill_tally import Tally


def test_a_run_killed_at_random_moments_goes_on_bit_equal(recipe: Path, tmp_path: Path) -> None:
    tally = Tally(recipe, tmp_path, seed=3, launchers=("torchrun", "mpirun"))
    tally.run(4)
    assert [round_.verdict for round_ in tally.rounds] == ["right"] * 4
