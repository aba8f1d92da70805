"""A synthesis that is killed loses nothing, and asks again for requests in flight only."""

from __future__ import annotations

from pathlib import Path

from tests.tools.kill_synthesis import trial


def test_a_killed_synthesis_gives_the_same_rows_and_asks_nothing_twice(tmp_path: Path) -> None:
    """`python -m tests.tools.kill_synthesis` kills 30 times."""
    hits, _ = trial(tmp_path, kills=3, seed=1, problems={"per_concept": 2})
    assert hits == 3
