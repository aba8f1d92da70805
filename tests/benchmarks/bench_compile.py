"""P7: a step of compiled layers over one whose layers are not, and what compiling takes."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_step import run_step
from bench_support import (
    Figure,
    PlainEngine,
    draw_texts,
    gradient_error,
    interleave,
    load,
    make_batch,
    ratio,
    retrieval_lengths,
    same_gradients,
    step_config,
    tiny_qwen2,
)

from pipeline.model.compiled import compile_layers, num_graphs

SCHEDULES = ("cache", "sweep")
REPEATS = 5


def compiled(quick: bool) -> list[Figure]:
    """P7: cached steps and sweeps in fp32 over chunks of several sizes, one process."""
    size, pairs = (64, 4) if quick else (256, 24)
    texts = draw_texts(np.concatenate(retrieval_lengths(np.random.default_rng(0), pairs)), 300)
    batch = make_batch(texts, pairs, max_tokens=2048, min_chunks=3)
    with tempfile.TemporaryDirectory() as folder:
        # Empty, so that everything is compiled.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        path = tiny_qwen2(Path(folder) / "model", hidden_size=size, num_layers=4, vocab_size=300)
        engines = {name: PlainEngine(load(path)) for name in ("plain", "compiled")}
        compile_layers(engines["compiled"].encoder)
        works = {
            f"{name}, {schedule}": functools.partial(run_step, engine, batch, step_config(schedule))
            for schedule in SCHEDULES
            for name, engine in engines.items()
        }
        began = time.perf_counter()
        for schedule in SCHEDULES:
            works[f"compiled, {schedule}"]()
        seconds = time.perf_counter() - began
        costs, gradients = interleave(works, 1 if quick else REPEATS)
    figures = [
        Figure(name="first steps", measured=f"{seconds:.0f} s, {num_graphs()} graphs of any size")
    ]
    for schedule in SCHEDULES:
        names = [f"{name}, {schedule}" for name in ("compiled", "plain")]
        error = gradient_error(*(gradients[name] for name in names))
        figures.append(same_gradients(f"{schedule}, compiled", error, 2e-6))
        figures.append(ratio(*(costs[name] for name in names), f"{schedule}: compiled / plain", 1))
    return figures
