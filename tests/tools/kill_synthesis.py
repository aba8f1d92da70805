"""Kill a synthesis at random moments, and compare it with an undisturbed one.

    python -m tests.tools.kill_synthesis --kills 30 --seed 1

The rows must be the same, byte for byte, and each kill may cost at most the requests in flight.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.reasonaug.language_server import Behaviour, serving
from tests.reasonaug.small_synthesis import tree_of

CONCURRENCY = 4
# A timeout that no request reaches, however busy the machine: it would be a request asked twice.
LIMITS = {"concurrency": CONCURRENCY, "timeout": 120, "patience": 600}


def start(config: Path) -> int:
    """Start `synthesize` in a forked process; return its id."""
    child = os.fork()
    if child:
        return child
    from ReasonAug.__main__ import main

    with (config.parent / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = ["ReasonAug", "synthesize", str(config)]
    try:
        main()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


def wait(child: int) -> int:
    """Return the exit code of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_repeatedly(config: Path, kills: int, rng: Random, answered: Callable[[], int]) -> int:
    """Kill `synthesize` so many times, each a few answers after it was started; then let it end.

    Returns:
        Number of kills that hit a running process.
    """
    hits = 0
    for _ in range(kills):
        child = start(config)
        before, most = answered(), rng.randrange(25)
        until = time.monotonic() + 20
        while answered() - before < most and time.monotonic() < until:
            if os.waitpid(child, os.WNOHANG)[0]:
                return hits  # it has finished
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        hits += wait(child) == -signal.SIGKILL
    code = wait(start(config))
    assert code == 0, (config.parent / "log").read_text()[-2000:]
    return hits


def trial(folder: Path, *, kills: int, seed: int, **sections: Any) -> tuple[int, int]:
    """Compare a disturbed run with an undisturbed one.

    Returns:
        Kills that hit, and answers that were asked for twice.
    """
    rows = []
    asked = []
    hits = 0
    for name, count in (("undisturbed", 0), ("disturbed", kills)):
        (folder / name).mkdir()
        with serving(Behaviour(delay=0.01)) as (url, server):
            tree = tree_of(folder / name / "out", url, limits=LIMITS, **sections)
            config = folder / name / "config.yaml"
            config.write_text(json.dumps(tree))
            hits = kill_repeatedly(config, count, Random(seed), server.answered.total)
            asked.append(server.answered.total())
            distinct = len(server.answered)
        rows.append((folder / name / "out" / "rows.jsonl").read_bytes())
    assert rows[0] == rows[1], "the rows differ"
    left = [path for path in folder.rglob("*") if path.suffix == ".tmp" or "plan" in path.name]
    assert not left, f"left behind: {left}"
    assert distinct == asked[0], f"{distinct} questions instead of {asked[0]}"
    repeated = asked[1] - asked[0]
    assert repeated <= hits * CONCURRENCY, f"{repeated} answers asked twice after {hits} kills"
    return hits, repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hits, repeated = trial(
            Path(folder),
            kills=arguments.kills,
            seed=arguments.seed,
            problems={"per_concept": 12},
            rewrites={"forum": 0.5, "exam": 0.5, "long": 0.5},
        )
    print(f"{hits} kills: rows as undisturbed, {repeated} requests in flight were asked again")


if __name__ == "__main__":
    main()
