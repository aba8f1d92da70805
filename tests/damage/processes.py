"""Forked children of a process that has imported everything, with their output and a time limit."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.forks import Child

# Address space that a command may ask for, in addition to what the imports take.
_BYTES = 3 * 2**30


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """The end of a child: exit code (negative: a signal; None: out of time) and what it printed."""

    code: int | None
    stdout: str
    stderr: str


def run_child(folder: Path, output: Path, work: Callable[[], int], seconds: float) -> Ended:
    """Call `work` in a separate child, in `folder`; its output goes below `output`."""

    def confined() -> None:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})  # commands take one process
        _limit_memory()
        _own_caches(output)
        sys.exit(work())

    child = Child(confined, folder=folder, stdout=output / "stdout", stderr=output / "stderr")
    code = child.wait(seconds)
    child.kill()  # what it has started
    return Ended(code, *child.read())


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _own_caches(output: Path) -> None:
    """`datasets` knows a local folder by its name only: a shared cache would mix up trials."""
    import datasets

    os.environ["HF_DATASETS_CACHE"] = str(output / "datasets")
    datasets.config.HF_DATASETS_CACHE = output / "datasets"
    os.environ["TMPDIR"] = str(output)


def side_by_side(
    numbers: list[int], work: Callable[[int], dict[str, Any]], *, jobs: int, scratch: Path
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Call `work` for each number in a child, a few at a time; yield what it returned.

    This process stays as it was: a later child inherits nothing of an earlier one.
    """
    waiting, running = list(reversed(numbers)), dict[int, int]()
    while waiting or running:
        while waiting and len(running) < jobs:
            number = waiting.pop()
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                try:
                    (scratch / f"{number}.json").write_text(json.dumps(work(number)))
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            running[child] = number
        child, status = os.wait()
        number = running.pop(child)
        path = scratch / f"{number}.json"
        if status:
            yield number, {"outcome": "fuzzer failed", "detail": str(status)}
        else:
            yield number, json.loads(path.read_text())
            path.unlink()
