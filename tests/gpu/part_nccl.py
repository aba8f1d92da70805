"""Two ranks on one GPU over NCCL, if it allows that; the same over gloo on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests import forks
from tests.gpu.contact import Place, Report

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}


def run(place: Place, report: Report) -> None:
    """Start both ranks, and say how it ended."""
    backend = BACKENDS[place.kind]
    store = place.folder / "store"
    files = [place.folder / f"rank{rank}.txt" for rank in range(2)]
    began = time.monotonic()
    if place.kind == "cuda":
        codes = _start(store, files, place.seconds_left - 5)
    else:
        children = [
            forks.Child(
                lambda rank=rank: be_rank(backend, store, rank),
                folder=forks.ROOT,
                stdout=file,
                stderr=file.with_suffix(".err"),
            )
            for rank, file in enumerate(files)
        ]
        codes = [child.wait(place.seconds_left) for child in children]
    text = "\n".join(file.read_text() for file in files)
    name = f"two ranks over {backend} on one device"
    if codes == [0, 0]:
        report(
            name,
            f"sums are right, {time.monotonic() - began:.0f} s",
            "right sums",
            "wrong" not in text,
        )
    elif "uplicate GPU" in text:
        report(name, "NCCL refuses two ranks on one GPU (Duplicate GPU detected)")
    else:
        last = [line for line in text.splitlines() if line.strip()][-1:]
        report(
            name, f"exit codes {codes}: {' '.join(last)[:200]}", "right sums, or refused", ok=False
        )


def _start(store: Path, files: list[Path], seconds: float) -> list[int | None]:
    """Start real processes, because a fork cannot use a GPU."""
    code = "import sys; from tests.gpu.part_nccl import main; main(sys.argv[1:])"
    ranks = []
    for rank, file in enumerate(files):
        with file.open("w") as stream:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, str(store), str(rank)],
                    cwd=forks.ROOT,
                    env={**os.environ, "NCCL_DEBUG": "WARN"},
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
            )
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in ranks:
        process.kill()
        process.wait()
    return [process.returncode for process in ranks]


def main(arguments: list[str]) -> None:
    """Be a rank on the GPU."""
    be_rank("nccl", Path(arguments[0]), int(arguments[1]))


def be_rank(backend: str, store: Path, rank: int) -> None:
    """Sum numbers of both ranks in each of the trainer's collectives."""
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    own = torch.full((1024,), float(rank + 1), device=device)
    total = own.clone()
    dist.all_reduce(total)
    gathered = torch.empty(2048, device=device)
    dist.all_gather_into_tensor(gathered, own)
    good = bool((total == 3).all()) and float(gathered.sum()) == 3 * 1024
    print("right" if good else "wrong", flush=True)
    dist.barrier()
    dist.destroy_process_group()
