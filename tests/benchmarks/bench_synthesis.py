"""Measure a large synthesis against a local server: memory, requests a second, resume.

    python -m tests.benchmarks.bench_synthesis --concepts 10000 --problems 8

The server writes sums (`Behaviour.cheap`) in a separate process, on the same cores. With
`--kills 3` the run is killed three times on its way, and answers that were asked for twice are
counted: each kill may cost the requests in flight. With `--without-http` the same answers come from
inside the process: memory, rows and resume at full size without the time of a real transport.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any
from unittest import mock

from pipeline.config.loading import load_config
from ReasonAug.synthesis.calls import Call
from ReasonAug.synthesis.completions import body_of, read_reply
from ReasonAug.synthesis.config import SynthesisConfig
from ReasonAug.synthesis.ledger import Record
from ReasonAug.synthesis.run import synthesize
from tests.reasonaug.language_server import Behaviour, LanguageServer


def start(config: Path, *, without_http: bool = False) -> subprocess.Popen[bytes]:
    """Start one `synthesize`."""
    command = [sys.executable, "-m", "ReasonAug", "synthesize", str(config)]
    if without_http:
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.bench_synthesis",
            "--inside",
            str(config),
        ]
    return subprocess.Popen(command)


def run(config: Path, *, without_http: bool = False) -> tuple[float, float, float]:
    """Return seconds, CPU seconds and peak memory in MB of one `synthesize`."""
    began = time.monotonic()
    process = start(config, without_http=without_http)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, status
    cpu = used.ru_utime + used.ru_stime
    return time.monotonic() - began, cpu, used.ru_maxrss / 1024


def num_answers(url: str) -> int:
    """Return the number of answers that the server has given."""
    with urllib.request.urlopen(url.replace("/v1", "/stats")) as answer:
        found: int = json.load(answer)["answers"]
    return found


def kill_at(config: Path, url: str, answers: int) -> None:
    """Start a `synthesize`, and kill it once the server has given so many answers."""
    process = start(config)
    while num_answers(url) < answers and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()


class Inside:
    """A transport that asks the server's writer directly."""

    def __init__(self, *_: Any) -> None:
        self._server = LanguageServer(Behaviour(cheap=True))

    async def send(self, call: Call[Any]) -> Record:
        await asyncio.sleep(0)
        reply = read_reply(self._server._completion(body_of(call, "schema")))
        return call.record(
            status="ok",
            answer=reply.text,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
        )

    async def close(self) -> None:
        pass


def run_inside(config: Path) -> None:
    """Be a `synthesize` without HTTP."""
    with mock.patch("ReasonAug.synthesis.servers.LiveTransport", Inside):
        synthesize(load_config(SynthesisConfig, config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=10_000)
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--without-http", action="store_true")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        run_inside(arguments.inside)
        return
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
                # A definition for each concept, a problem and a second solution for each problem.
                expected = arguments.concepts * (1 + 2 * arguments.problems)
                for kill in range(1, arguments.kills + 1):
                    kill_at(config, url, expected * kill // (arguments.kills + 1))
                seconds, cpu, memory = run(config, without_http=arguments.without_http)
                answers = num_answers(url)
                rows = sum(1 for _ in (folder / "out" / "rows.jsonl").open())
                resumed, resumed_cpu, _ = run(config)
            finally:
                server.kill()
        size = sum(path.stat().st_size for path in (folder / "out" / "ledger").iterdir())
        print(
            f"{arguments.concepts:,} concepts x {arguments.problems}: {answers:,} answers, the "
            f"last run in {seconds:.0f} s ({cpu:.0f} s of CPU), {rows:,} rows, peak {memory:.0f} "
            f"MB, ledger {size / 2**20:.0f} MiB; {max(0, answers - expected)} asked twice after "
            f"{arguments.kills} kills; resume of the finished run {resumed:.1f} s "
            f"({resumed_cpu:.1f} s of CPU)"
        )


if __name__ == "__main__":
    main()
