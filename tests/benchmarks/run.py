"""Every figure of the cached step, one table each: python tests/benchmarks/run.py [P1 P2 ...].

Times are ratios within one process, interleaved, the least of several. A slow machine does not
fail; a difference between gradients that should be equal exits with 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Before torch starts its threads: CPU seconds then count work, not waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))  # for tests.support

import bench_growth
import bench_host
import bench_packing
import bench_step
import bench_traffic
import torch
from bench_support import Figure, print_table

BENCHMARKS: dict[str, tuple[str, Callable[[bool], list[Figure]]]] = {
    "P1": ("cached step against plain forward and backward", bench_step.overhead),
    "P2": ("our step against its peers", bench_step.against_peers),
    "P3": ("ZeRO-3 traffic of a step", bench_traffic.traffic),
    "P5": ("packing against padding", bench_packing.throughput),
    "P6": ("host time of a layer under DeepSpeed", bench_host.host_time),
    "growth": ("cost against the size of the batch", bench_growth.growth),
}


def main() -> None:
    """Run the benchmarks named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.ids if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    torch.set_num_threads(1)
    failed = []
    for name in arguments.ids or BENCHMARKS:
        title, benchmark = BENCHMARKS[name]
        figures = benchmark(arguments.quick)
        print_table(f"{name}: {title}", figures)
        sys.stdout.flush()
        failed += [figure.name for figure in figures if figure.gate and not figure.ok]
    if failed:
        sys.exit(f"\nresults differ that should be equal: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
