"""The short form of `python -m tests.tools.kill_tally`."""

from __future__ import annotations

from pathlib import Path

from tests.tools.kill_tally import VICTIMS, Tally


def test_a_run_killed_at_random_moments_continues_bit_equal(recipe: Path, tmp_path: Path) -> None:
    # With this seed: one rank, the launcher and all ranks, each while a checkpoint is made. Moments
    # of a millisecond are left to the tool: a start that misses its moment is repeated.
    tally = Tally(recipe, tmp_path, seed=312, launchers=("torchrun", "mpirun"), num_steps=30)
    tally.run(3)
    assert {round_.victim for round_ in tally.rounds} == set(VICTIMS)
    assert [round_.verdict for round_ in tally.rounds] == ["right"] * 3
    # The launcher ends the other rank, and prints why.
    assert (tally.rounds[0].launcher, tally.rounds[0].victim) == ("torchrun", "one rank")
    assert "SIGKILL" in tally.rounds[0].output
