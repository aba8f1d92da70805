"""Time and memory of the loss, next to the naive autograd one, which holds every score.

`python tests/benchmarks/bench_loss.py`: one thread, one JSON line per measurement. Each runs in a
separate process, because a heap that has been large once hides what comes after.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from pipeline.config import LossConfig
from pipeline.loss.contrastive import contrastive_loss
from pipeline.loss.targets import RaggedIndex, Targets

WIDTH = 384
TEMPERATURE = 0.02


def one_to_one(size: int) -> Targets:
    """Query i has document i as its positive and no list of negatives."""
    index, nothing = torch.arange(size), torch.arange(0)
    none = RaggedIndex(offsets=torch.zeros(size + 1, dtype=torch.int64), values=nothing)
    return Targets(
        num_queries=size,
        num_documents=size,
        query_index=index,
        document_index=index,
        positives=RaggedIndex(offsets=torch.arange(size + 1), values=index),
        negatives=none,
        masked=none,
    )


def naive(query: torch.Tensor, document: torch.Tensor) -> list[torch.Tensor]:
    """Autograd through the whole score matrix."""
    q, d = query.clone().requires_grad_(), document.clone().requires_grad_()
    loss = F.cross_entropy(q @ d.T / TEMPERATURE, torch.arange(len(q)))
    return [loss.detach(), *torch.autograd.grad(loss, (q, d))]


def tiled(query: torch.Tensor, document: torch.Tensor) -> list[torch.Tensor]:
    """This project's loss."""
    config = LossConfig(temperature=TEMPERATURE, similarity="dot")
    out = contrastive_loss(query, document, one_to_one(len(query)), config=config)
    return [out.loss, out.query_grad, out.document_grad]


def resident_kib(key: str) -> int:
    """A line of this process's memory status."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0])


def measure(kind: str, size: int) -> dict[str, object]:
    """CPU seconds and added resident memory of one evaluation with gradients."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(size, WIDTH, generator=g), dim=1)
    document = F.normalize(torch.randn(size, WIDTH, generator=g) + 6 * query, dim=1)
    function = {"naive": naive, "tiled": tiled}[kind]
    function(query[:128], document[:128])
    Path("/proc/self/clear_refs").write_text("5")  # restart the high-water mark
    before, began = resident_kib("VmRSS"), time.process_time()
    loss, query_grad, document_grad = function(query, document)
    return {
        "loss": kind,
        "queries": size,
        "seconds": round(time.process_time() - began, 3),
        "extra_mib": round((resident_kib("VmHWM") - before) / 1024, 1),
        "value": round(float(loss), 6),
        "query_grad_norm": float(query_grad.norm()),
        "document_grad_norm": float(document_grad.norm()),
    }


def main() -> None:
    """Measure both losses in turn, several times, and compare their best times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("naive", "tiled"))
    parser.add_argument("--here", action="store_true", help="one measurement in this process")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.only, arguments.queries)))
        return
    kinds = [arguments.only] if arguments.only else ["naive", "tiled"]
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.repeats):
        for kind in kinds:
            command = [sys.executable, __file__, "--here", "--only", kind]
            line = subprocess.check_output(
                [*command, "--queries", str(arguments.queries)],
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            print(line, end="", flush=True)
            results[kind].append(json.loads(line))
    if len(kinds) == 2:
        ratios = {
            key: min(r[key] for r in results["tiled"]) / min(r[key] for r in results["naive"])
            for key in ("seconds", "extra_mib")
        }
        print(json.dumps({"tiled / naive": {k: round(v, 3) for k, v in ratios.items()}}))


if __name__ == "__main__":
    main()
