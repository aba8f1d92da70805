"""Every figure of the README as one table: python tests/benchmarks/run.py [ID ...] [--quick].

Times are ratios within one process, interleaved with the installed peers, the least of several. A
slow machine does not fail; a difference between results that should be equal exits with 1. After
each benchmark, runs/benchmarks/ gets all figures so far as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch starts its threads: CPU seconds then count work, not waiting.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))  # for tests.support

from pipeline.files import write_json

if TYPE_CHECKING:
    from bench_support import Figure

OUTPUT = Path(__file__).parents[2] / "runs" / "benchmarks"
PACKAGES = ("torch", "transformers", "sentence-transformers", "deepspeed", "mteb")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A group of figures.

    Attributes:
        work: `module.function`, from whether sizes are small to figures; imported when it runs.
        readme: parts of the README's lines whose figures it measures.
    """

    title: str
    work: str
    readme: tuple[str, ...] = ()

    def run(self, quick: bool) -> list[Figure]:
        """Measure the figures."""
        module, _, function = self.work.partition(".")
        figures: list[Figure] = getattr(importlib.import_module(module), function)(quick)
        return figures


BENCHMARKS = {
    "P1": Benchmark(
        title="cached step against plain forward and backward",
        work="bench_step.overhead",
        readme=("cached step / plain forward and backward",),
    ),
    "P2": Benchmark(
        title="our step against its peers",
        work="bench_step.against_peers",
        readme=("3 to 5 times as fast", "cached loss, its three modes", "GradCache as published"),
    ),
    "P3": Benchmark(
        title="ZeRO-3 traffic of a step",
        work="bench_traffic.traffic",
        readme=("ZeRO-3, parameters gathered",),
    ),
    "P5": Benchmark(
        title="packing against padding",
        work="bench_packing.throughput",
        readme=("packed / randomly padded",),
    ),
    "P6": Benchmark(title="host time of a layer under DeepSpeed", work="bench_host.host_time"),
    "growth": Benchmark(title="cost against the size of the batch", work="bench_growth.growth"),
    "plan": Benchmark(
        title="memory by plan", work="bench_memory.memory", readme=("weights of a 70B fit",)
    ),
    "evaluation": Benchmark(
        title="embedding all benchmarks, against mteb with sentence-transformers",
        work="bench_job.quick_or_full",
        readme=("embedding all benchmarks at equal scores",),
    ),
    "quickstart": Benchmark(
        title="launch/quickstart.sh",
        work="bench_scripts.quickstart",
        readme=(
            "BRIGHT, unseen problems",
            "BRIGHT, unseen concepts",
            "FollowIR, Core17",
            "LongEmbed, needle",
            "LongEmbed, passkey",
        ),
    ),
    "finetune": Benchmark(
        title="launch/finetune_minilm.sh",
        work="bench_scripts.finetune",
        readme=("`launch/finetune_minilm.sh GENERATIONS`",),
    ),
    "long": Benchmark(
        title="launch/long_documents.sh",
        work="bench_scripts.long_documents",
        readme=("`launch/long_documents.sh`", "the same | passkeys"),
    ),
    "miniature": Benchmark(
        title="launch/miniature.sh",
        work="bench_scripts.miniature",
        readme=("of 1.8 million parameters",),
    ),
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
    OUTPUT.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    print("| benchmark | figure | asked | measured | ok |\n|---|---|---|---|---|", flush=True)
    for name in arguments.ids or BENCHMARKS:
        results.append(_run(name, arguments.quick))
        write_json(
            OUTPUT / ("quick.json" if arguments.quick else "full.json"),
            {**_environment(), "benchmarks": results},
        )
    minutes = sum(result["seconds"] for result in results) / 60
    cpu = sum(result["cpu_seconds"] for result in results) / 60
    print(f"\n{minutes:.1f} minutes, {cpu:.1f} minutes of CPU; written: {OUTPUT}")
    failed = [
        figure["name"]
        for result in results
        for figure in result["figures"]
        if figure["gate"] and not figure["ok"]
    ]
    if failed:
        sys.exit(f"results differ that should be equal: {'; '.join(failed)}")


def _run(name: str, quick: bool) -> dict[str, Any]:
    """Run a benchmark and print its lines of the table."""
    started, cpu = time.perf_counter(), sum(os.times()[:4])
    figures = BENCHMARKS[name].run(quick)
    for figure in figures:
        ok = {True: "yes", False: "no", None: ""}[figure.ok]
        print(f"| {name} | {figure.name} | {figure.asked} | {figure.measured} | {ok} |", flush=True)
    return {
        "id": name,
        "title": BENCHMARKS[name].title,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(sum(os.times()[:4]) - cpu, 1),
        "figures": [dataclasses.asdict(figure) for figure in figures],
    }


def _environment() -> dict[str, Any]:
    """Return what the times depend on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    main()
