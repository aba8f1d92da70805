"""`python -m tests.damage --trials 5000 --seed 1`: damaged inputs at random, and a tally."""

from __future__ import annotations

import argparse
import collections
import functools
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.damage.commands import COMMANDS, preload
from tests.damage.judge import RIGHT
from tests.damage.processes import side_by_side
from tests.damage.trials import Fuzzer


def run_trials(
    numbers: list[int], *, seed: int, jobs: int, scratch: Path, show: bool = False
) -> dict[int, dict[str, Any]]:
    """Build the world, run the trials, and return what each one found, by its number."""
    fuzzer = Fuzzer(scratch, seed)
    if not fuzzer.whole.exists():
        _build(fuzzer, jobs)
    results = {}
    for number, found in side_by_side(numbers, fuzzer.trial, jobs=jobs, scratch=scratch):
        results[number] = found
        if show and found["outcome"] not in RIGHT:
            _say(number, seed, found)
    return results


def _build(fuzzer: Fuzzer, jobs: int) -> None:
    fuzzer.build()
    names = list(COMMANDS)
    work = functools.partial(_conclude, fuzzer, names)
    numbers = list(range(len(names)))
    whole = dict(side_by_side(numbers, work, jobs=jobs, scratch=fuzzer.scratch))
    if bad := [names[number] for number in numbers if whole[number]["outcome"] != "same"]:
        raise RuntimeError(f"fails on undamaged inputs: {', '.join(bad)}")


def _conclude(fuzzer: Fuzzer, names: list[str], number: int) -> dict[str, Any]:
    fuzzer.conclude(names[number])
    return {"outcome": "same"}


def _say(number: int, seed: int, found: dict[str, Any]) -> None:
    words = (found.get(key, "") for key in ("outcome", "command", "damage", "detail"))
    print(f"--seed {seed} --only {number}: " + " | ".join(words), flush=True)


def tally(results: dict[int, dict[str, Any]], *columns: str) -> str:
    """A table of counts by the given keys and the outcome."""
    outcomes = sorted({found["outcome"] for found in results.values()}, key=_order)
    counts: dict[tuple[str, ...], collections.Counter[str]] = {}
    for found in results.values():
        key = tuple(found.get(column, "?") for column in columns)
        counts.setdefault(key, collections.Counter())[found["outcome"]] += 1
    lines = [" | ".join((*columns, *outcomes))]
    for key, row in sorted(counts.items()):
        lines.append(" | ".join((*key, *(str(row[outcome] or "") for outcome in outcomes))))
    return "\n".join(lines)


def _order(outcome: str) -> tuple[int, str]:
    return (RIGHT.index(outcome) if outcome in RIGHT else len(RIGHT), outcome)


def main() -> int:
    """Run trials by number and print their tally; exit with 1 where one found a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.damage", description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, action="append", help="a trial's number; shows all")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--keep", type=Path, help="build in this folder, and leave it")
    options = parser.parse_args()
    began = time.monotonic()
    preload()
    scratch = options.keep or Path(tempfile.mkdtemp(prefix="damage-"))
    try:
        if options.only:
            fuzzer = Fuzzer(scratch, options.seed)
            run_trials([], seed=options.seed, jobs=options.jobs, scratch=scratch)
            results = {number: fuzzer.trial(number, keep=True) for number in options.only}
            for number, found in results.items():
                _say(number, options.seed, found)
        else:
            numbers = list(range(options.trials))
            results = run_trials(
                numbers, seed=options.seed, jobs=options.jobs, scratch=scratch, show=True
            )
    finally:
        if not options.keep:
            shutil.rmtree(scratch, ignore_errors=True)
    print(tally(results, "command"), tally(results, "command", "target"), sep="\n\n")
    right = sum(found["outcome"] in RIGHT for found in results.values())
    seconds = time.monotonic() - began
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in used)
    print(
        f"\n{right} of {len(results)} right, seed {options.seed}, "
        f"{seconds:.0f} s, {cpu:.0f} s of CPU"
    )
    return int(right < len(results))


if __name__ == "__main__":
    sys.exit(main())
