"""The short form of `python -m tests.tools.kill_tally`."""

from __future__ import annotations

from pathlib import Path

from tests.tools.kill_tally import VICTIMS, Tally


def test_a_run_killed_at_random_moments_goes_on_bit_equal(recipe: Path, tmp_path: Path) -> None:
    # With this seed: the launcher, all ranks and one rank, of which two while a checkpoint changes.
    tally = Tally(recipe, tmp_path, seed=5, launchers=("torchrun", "mpirun"), num_steps=30)
    tally.run(3)
    assert {round_.victim for round_ in tally.rounds} == set(VICTIMS)
    assert [round_.verdict for round_ in tally.rounds] == ["right"] * 3
