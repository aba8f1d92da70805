"""Each figure of the README has a benchmark, and RESULTS.md names its command."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "benchmarks"
README = (ROOT / "README.md").read_text()
RESULTS = (FOLDER / "RESULTS.md").read_text()
# A measured number, as opposed to versions, ids of papers and sizes of examples.
FIGURE = re.compile(r"\d\.\d|\d to \d+ times|fits? on \d|\d million")
NO_FIGURE = re.compile(r"Python 3\.\d+|arXiv \d+\.\d+|Apache-2\.0")


def figure_lines() -> list[str]:
    """Return the README's lines with figures, outside of code."""
    text = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.M)
    return [line for line in text.splitlines() if FIGURE.search(NO_FIGURE.sub("", line))]


@pytest.fixture(scope="module")
def benchmarks() -> dict[str, Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("tests.benchmarks.run").BENCHMARKS  # type: ignore[no-any-return]
    finally:
        sys.path.remove(str(FOLDER))


def test_each_figure_of_the_readme_has_a_benchmark(benchmarks: dict[str, Any]) -> None:
    measured = [part for benchmark in benchmarks.values() for part in benchmark.readme]
    assert [part for part in measured if part not in README] == []
    assert [line for line in figure_lines() if not any(part in line for part in measured)] == []
    assert len(figure_lines()) > 12


def test_each_benchmark_of_the_readme_is_in_the_table_of_commands(
    benchmarks: dict[str, Any],
) -> None:
    named = set(re.findall(r"`python tests/benchmarks/run\.py (\w+)`", RESULTS))
    assert named == {name for name, benchmark in benchmarks.items() if benchmark.readme}
