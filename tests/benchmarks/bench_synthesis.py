"""Measure a large synthesis against a local server: memory, requests a second, resume.

    python -m tests.benchmarks.bench_synthesis --concepts 10000 --problems 8

The server writes sums (`Behaviour.cheap`) in a process of its own, on the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path


def run(config: Path) -> tuple[float, float]:
    """Return seconds and peak memory in MB of one `synthesize`."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "ReasonAug", "synthesize", str(config)])
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, status
    return time.monotonic() - began, used.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=10_000)
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = [f"Rule {number:05d} of shelves" for number in range(arguments.concepts)]
        listed = {"math theorem": names[::2], "physics theorem": names[1::2]}
        (folder / "concepts.yaml").write_text(json.dumps(listed))
        command = [sys.executable, "-m", "tests.reasonaug.language_server"]
        behaviour = json.dumps({"cheap": True})
        with subprocess.Popen(
            [*command, "--announce", str(folder / "url"), "--behaviour", behaviour],
            stdout=subprocess.DEVNULL,
        ) as server:
            try:
                while not (folder / "url").exists():
                    time.sleep(0.1)
                url = (folder / "url").read_text()
                config = folder / "config.yaml"
                tree = {
                    "output_dir": str(folder / "out"),
                    "model": {"name": "sums", "servers": [{"url": url}]},
                    "concepts": {"files": [str(folder / "concepts.yaml")], "max_similarity": 1.0},
                    "problems": {"per_concept": arguments.problems},
                    "checks": {"problem": False},
                    "negatives": {"written": False},
                    "limits": {"concurrency": arguments.concurrency},
                }
                config.write_text(json.dumps(tree))
                seconds, memory = run(config)
                with urllib.request.urlopen(url.replace("/v1", "/stats")) as answer:
                    answers = json.load(answer)["answers"]
                resumed, _ = run(config)
            finally:
                server.kill()
        size = sum(path.stat().st_size for path in (folder / "out" / "ledger").iterdir())
        print(
            f"{arguments.concepts:,} concepts x {arguments.problems}: {answers:,} requests in "
            f"{seconds:.0f} s with rows, peak {memory:.0f} MB, ledger {size / 2**20:.0f} MiB; "
            f"resume of the finished run {resumed:.1f} s"
        )


if __name__ == "__main__":
    main()
