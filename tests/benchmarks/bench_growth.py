"""Growth of a cached step's time and memory with the number of queries, for a tiny model.

Each measurement runs in its own process, because a heap that has been large once hides what
comes after: python tests/benchmarks/bench_growth.py MODEL SCHEDULE QUERIES
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_support import (
    Figure,
    PlainEngine,
    draw_texts,
    load,
    make_batch,
    step_config,
    tiny_qwen2,
)

from pipeline.loss.targets import LossOutput
from pipeline.training import contrastive_step

HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE = 128, 4, 1000
QUERY_TOKENS, DOCUMENT_TOKENS = 16, 48
CHUNK_TOKENS = 2048
# Every freed tensor goes back to the system at once, so that the resident peak is the true one; it
# costs more time than the step itself.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def growth(quick: bool) -> list[Figure]:
    """Time by tokens, the loss's share of it, and the peak at a fixed chunk budget."""
    sizes = (64, 256, 512) if quick else (64, 256, 1024, 4096, 16384)
    with tempfile.TemporaryDirectory() as folder:
        tiny_qwen2(
            Path(folder), hidden_size=HIDDEN_SIZE, num_layers=NUM_LAYERS, vocab_size=VOCAB_SIZE
        )
        run = functools.partial(_run, folder)
        timed = {size: run("cache", size) for size in sizes if size >= 256}
        small = [size for size in sizes if size <= 1024]
        cache, sweep = (
            {size: run(schedule, size, **ALLOCATOR) for size in small}
            for schedule in ("cache", "sweep")
        )
    return [*_time(timed), *_memory("cache", cache), *_memory("sweep", sweep)]


def _run(folder: str, schedule: str, size: int, **environment: str) -> dict[str, float]:
    command = [sys.executable, __file__, folder, schedule, str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    output = subprocess.check_output(command, env=environment, text=True)
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def _time(results: dict[int, dict[str, float]]) -> list[Figure]:
    sizes = list(results)
    first, last = results[sizes[0]], results[sizes[-1]]
    lines = [
        Figure(
            name=f"N = {size:,}: {results[size]['tokens']:,.0f} tokens",
            measured=f"{results[size]['seconds']:.1f} s CPU, "
            f"{results[size]['seconds'] / results[size]['tokens'] * 1e6:.0f} us a token, "
            f"loss {results[size]['loss_seconds'] / results[size]['seconds']:.2%}",
        )
        for size in sizes
    ]
    per_token = [r["seconds"] / r["tokens"] for r in (first, last)]
    share = last["loss_seconds"] / last["seconds"]
    return [
        *lines,
        Figure(
            name=f"time a token, N = {sizes[-1]:,} / N = {sizes[0]:,}",
            asked="<= 1.1 (linear)",
            measured=f"{per_token[1] / per_token[0]:.3f}",
            ok=per_token[1] / per_token[0] <= 1.1,
        ),
        Figure(
            name=f"share of the loss, N = {sizes[-1]:,}",
            asked="< 2 %",
            measured=f"{share:.2%}",
            ok=share < 0.02,
        ),
    ]


def _memory(schedule: str, results: dict[int, dict[str, float]]) -> list[Figure]:
    """The peak of a step less what must grow: tokens, embeddings, boundaries of a sweep."""
    sizes = list(results)
    flat = [results[size]["peak_mib"] - results[size]["growing_mib"] for size in sizes]
    return [
        *(
            Figure(
                name=f"{schedule}, N = {size:,}: extra memory",
                measured=f"{results[size]['peak_mib']:.1f} MiB, of it embeddings and boundaries "
                f"{results[size]['growing_mib']:.1f}",
            )
            for size in sizes
        ),
        Figure(
            name=f"{schedule}: peak without them, N = {sizes[-1]:,} / N = {sizes[0]:,}",
            asked="0.9 to 1.1",
            measured=f"{flat[-1] / flat[0]:.3f}",
            ok=0.9 <= flat[-1] / flat[0] <= 1.1,
        ),
    ]


def _resident_mib(key: str) -> float:
    """A line of this process's memory status."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) / 1024


@contextmanager
def _timed_loss() -> Iterator[list[float]]:
    """CPU seconds of each evaluation of the loss inside a step."""
    seconds: list[float] = []
    original = contrastive_step.contrastive_loss

    def timed(*args: Any, **kwargs: Any) -> LossOutput:
        began = time.process_time()
        output = original(*args, **kwargs)
        seconds.append(time.process_time() - began)
        return output

    contrastive_step.contrastive_loss = timed
    try:
        yield seconds
    finally:
        contrastive_step.contrastive_loss = original


def measure(folder: Path, schedule: str, size: int) -> dict[str, float]:
    """One step of `size` queries, each with one document, all of the same two lengths."""
    engine = PlainEngine(load(folder))
    config = step_config(schedule)
    lengths = np.repeat([QUERY_TOKENS, DOCUMENT_TOKENS], size)
    texts = draw_texts(lengths, VOCAB_SIZE)
    device = torch.device("cpu")
    small = make_batch([text[:2] for text in texts[: 2 * 8]], 8, max_tokens=CHUNK_TOKENS)
    contrastive_step.accumulate_gradients(
        engine, small, config, device=device
    )  # gradients exist from here
    batch = make_batch(texts, size, max_tokens=CHUNK_TOKENS)
    del texts
    Path("/proc/self/clear_refs").write_text("5")  # restart the high-water mark
    before = _resident_mib("VmRSS")
    with _timed_loss() as loss_seconds:
        began = time.process_time()
        contrastive_step.accumulate_gradients(engine, batch, config, device=device)
        seconds = time.process_time() - began
    # Rows, their gradients, and the loss's copies of both are 2 N x D each.
    embeddings = 2 * size * HIDDEN_SIZE * 4 * 4
    # A sweep keeps every chunk's layer inputs and its rotary tables (cosine and sine, a head wide).
    heads = engine.encoder.model.config.num_attention_heads
    kept = (NUM_LAYERS + 1) * HIDDEN_SIZE + 2 * HIDDEN_SIZE // heads
    boundaries = batch.tokens * kept * 4 if schedule == "sweep" else 0
    return {
        "tokens": batch.tokens,
        "chunks": len(batch.chunks),
        "seconds": seconds,
        "loss_seconds": sum(loss_seconds),
        "peak_mib": _resident_mib("VmHWM") - before,
        "growing_mib": (embeddings + boundaries) / 2**20,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
