"""Cost of the agreement of all ranks, step by step, whether one must stop or lacks memory.

python -m tests.benchmarks.bench_agreement [STEPS]

Two gloo ranks train the smallest model of the tests, in CPU seconds: the wall-clock time of a
collective call is mostly that of waiting for the slower rank, which would otherwise come later.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline import comm, train
from pipeline.training.trainer import Training
from tests.support import launch_ranks
from tests.training.tiny_recipe import make_recipe

# The first steps pay for what torch prepares.
_LEFT_OUT = 20


def worker(arguments: list[str]) -> None:
    """Train as one rank, and print what its share was on the first."""
    agree, fitting_step = comm.max_over_ranks, Training._fitting_step
    calls, began, spent = 0, 0.0, 0.0
    steps = -_LEFT_OUT

    def counted(*values: float) -> list[float]:
        nonlocal calls, spent
        before = time.process_time()
        result = agree(*values)
        if steps > 0:
            calls, spent = calls + 1, spent + time.process_time() - before
        return result

    def step(*args: object) -> dict[str, float]:
        nonlocal steps, began
        steps += 1
        if steps == 1:
            began = time.process_time()
        return fitting_step(*args)  # type: ignore[arg-type]

    comm.max_over_ranks = counted
    Training._fitting_step = step  # type: ignore[method-assign, assignment]
    train.run(arguments)
    whole = time.process_time() - began
    if comm.rank() == 0:
        each = f"{calls / steps:.1f} agreements of {1e6 * spent / calls:.0f} us"
        share = f"{spent / whole:.2%} of the CPU time"
        print(f"{steps} steps of {1e3 * whole / steps:.1f} ms, in each {each}: {share}")
    comm.leave(0, gracefully=True)


def main() -> None:
    """Start both ranks, once with few chunks per step and once with many."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with TemporaryDirectory() as folder:
        recipe = make_recipe(Path(folder))
        for schedule in ("cache", "sweep"):
            for chunks in (2, 8):
                print(f"{schedule}, {chunks} chunks or more: ", end="", flush=True)
                printed = launch_ranks(
                    *(2, Path(__file__), str(recipe), "--deepspeed", "ds_configs/zero3.json"),
                    *(f"output_dir={folder}/{schedule}-{chunks}", f"schedule={schedule}"),
                    *(f"num_steps={_LEFT_OUT + steps}", f"chunks.min_chunks={chunks}"),
                    "checkpoint.every=1000000",
                    seconds=1200,
                )
                print(printed.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].endswith(".yaml"):
        worker(sys.argv[1:])
    else:
        main()
