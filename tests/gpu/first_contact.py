"""Run the parts of a first contact with a GPU, each in a process with its own limit.

See `tests/gpu/first_contact.sh` for how to start it. Parts are in the order of their worth, because
a machine may be reclaimed before the last.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from tests import forks
from tests.benchmarks.bench_support import Figure
from tests.gpu.contact import Kind, Place, Report, line_of

# Part -> seconds it may take, and its title. An H200 whose Python needs 14 s to import torch and
# DeepSpeed took half of them; their sum stays within ten minutes.
PARTS = {
    "kernels": (30, "attention kernels against attention row by row"),
    "gradients": (45, "gradients at ZeRO-1, 2 and 3 against the CPU in fp32, dropout replayed"),
    "resume": (70, "save and resume; a real lack of memory"),
    "speed": (110, "a 7B model: speed, memory, and memory as planned"),
    "update": (30, "deterministic steps; the fused update"),
    "calibrate": (90, "a calibration, and the step of a 7B model as it predicts it"),
    "loss": (40, "the loss of a large batch against its peers"),
    "encode": (25, "encoding with a 7B model"),
    "nccl": (45, "two ranks over NCCL on one GPU"),
    "compile": (95, "compiled layers: speed, start, gradients"),
}
assert sum(seconds for seconds, _ in PARTS.values()) <= 10 * 60 - 20
# The others need DeepSpeed or processes, which know only devices of torch.
PRETENDED = ("kernels", "speed", "loss", "encode")
HEAD = "| figure | asked | measured | ok |\n|---|---|---|---|"
_FACTOR = 6  # of the limits where a CPU rehearses


def main(argv: list[str] | None = None) -> int:
    """Run all parts, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small models; implied without a GPU")
    parser.add_argument("--pretend", action="store_true", help="on the pretended device")
    parser.add_argument("--out", type=Path, default=None, help="default: $OUT or first-contact/")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    kind: Kind = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.pretend:
        kind = "pretended"
    out = arguments.out or Path(os.environ.get("OUT") or "first-contact")
    out.mkdir(parents=True, exist_ok=True)
    tiny = arguments.tiny or kind != "cuda"
    if arguments.here:
        (name,) = arguments.parts
        return _run_here(name, kind, tiny=tiny, out=out)
    names = arguments.parts or list(PRETENDED if kind == "pretended" else PARTS)
    machine = describe_machine(kind)
    print(machine, flush=True)
    (out / "log.txt").write_text("")
    results: list[dict[str, Any]] = []
    for name in names:
        results.append(_run_part(name, kind, tiny=tiny, out=out))
        # After each part: a machine may be reclaimed before the last.
        (out / "results.json").write_text(
            json.dumps({"machine": machine, "parts": results}, indent=1)
        )
        (out / "results.md").write_text(as_markdown(machine, results))
    print()
    for result in results:
        print(f"{result['part']:<10} {result['end']} in {result['seconds']:.0f} s")
    print(f"{out / 'results.md'}, {out / 'results.json'}")
    return int(any(result["end"] != "passed" for result in results))


def describe_machine(kind: Kind) -> str:
    """Return one line on device and versions."""
    name = {"cpu": "CPU (a rehearsal)", "pretended": "pretended device (a rehearsal)"}.get(kind)
    if name is None:
        properties = torch.cuda.get_device_properties(0)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    versions = [f"Python {sys.version.split()[0]}", f"torch {torch.__version__}"]
    for package in ("transformers", "deepspeed", "flash_attn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return f"{name}; {', '.join(versions)}"


def _run_part(name: str, kind: Kind, *, tiny: bool, out: Path) -> dict[str, Any]:
    """Run a part as a separate process, show its output as it comes, and collect its figures."""
    seconds, title = PARTS[name]
    limit = seconds if kind == "cuda" else seconds * _FACTOR
    print(f"\n## {name}: {title}\n\n{HEAD}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "tests.gpu.first_contact", name, "--here", "--out", folder]
        words += ["--tiny"] * tiny + ["--pretend"] * (kind == "pretended")
        code, taken = _run_process(words, limit, out / "log.txt", on_gpu=kind == "cuda")
        lines = Path(folder) / f"{name}.jsonl"
        text = lines.read_text() if lines.exists() else ""
    figures = [json.loads(line) for line in text.splitlines()]
    missed = [figure["name"] for figure in figures if figure["ok"] is False]
    end = "passed"
    if code is None:
        end = f"FAILED: not finished after {limit} s"
    elif code != 0 or not figures:
        end = f"FAILED: exit code {code}"
    elif missed:
        end = f"FAILED: {'; '.join(missed)}"
    print(f"\n{name}: {end}", flush=True)
    return {"part": name, "title": title, "end": end, "seconds": taken, "figures": figures}


def _run_process(
    words: list[str], limit: float, log: Path, *, on_gpu: bool
) -> tuple[int | None, float]:
    """Run a Python process; return its exit code, None if it took too long, and its seconds."""
    # The tests' variables give a process one core.
    more = {"OMP_NUM_THREADS": "8", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with log.open("a") as written, log.open() as shown:
        shown.seek(0, os.SEEK_END)
        process = forks.Process(
            words, folder=forks.ROOT, stdout=written, environment=more if on_gpu else {}
        )
        began = time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - began < limit:
                print(shown.read(), end="", flush=True)
                time.sleep(0.1)
            code = process.poll()
        finally:
            process.kill()
        print(shown.read(), end="", flush=True)
    return code, time.monotonic() - began


def _run_here(name: str, kind: Kind, *, tiny: bool, out: Path) -> int:
    """Be the process of one part."""
    seconds, _ = PARTS[name]
    limit = seconds if kind == "cuda" else seconds * _FACTOR
    report = Report(out / f"{name}.jsonl")
    part = importlib.import_module(f"tests.gpu.part_{name}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if kind == "pretended":
            from tests.fake_cuda.fake_cuda import FakeCuda

            stack.enter_context(FakeCuda())
        place = Place(
            kind=kind, tiny=tiny, deadline=time.monotonic() + limit - 5, folder=Path(folder)
        )
        try:
            part.run(place, report)
        except Exception:
            traceback.print_exc()
            report(
                f"{name}: ended early", traceback.format_exc(limit=-1).splitlines()[-1], ok=False
            )
            return 1
    return 0


def as_markdown(machine: str, results: list[dict[str, Any]]) -> str:
    """Write all figures in the form of RESULTS.md."""
    blocks = [f"{time.strftime('%d %B %Y')}, {machine}."]
    for result in results:
        rows = [
            line_of(Figure(**{key: f[key] for key in ("name", "measured", "asked", "ok")}))
            for f in result["figures"]
        ]
        summary = f"{result['end']} in {result['seconds']:.0f} s"
        blocks.append(
            "\n".join([f"### {result['part']}: {result['title']}", "", summary, "", HEAD, *rows])
        )
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    sys.exit(main())
