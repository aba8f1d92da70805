"""Damaged inputs, drawn at random, are refused in one line or change nothing."""

from __future__ import annotations

from tests import forks


def test_a_hundred_damaged_inputs_end_in_one_line_or_change_nothing() -> None:
    # A separate process, because it forks: none of pytest's threads may hold a lock then.
    words = ["-m", "tests.damage", "--trials", "100", "--seed", "1"]
    done = forks.run(words, folder=forks.ROOT, timeout=1700)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
