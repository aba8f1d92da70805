"""P3: bytes that a step gathers and reduces under ZeRO-3, in units of the model, two ranks.

Started by itself for each rank; counts at the object through which all of DeepSpeed's collectives
go, on the trainer's own path, in the third step: by then DeepSpeed has recorded its traces.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_support import (
    Figure,
    draw_texts,
    gradient_error,
    load,
    make_batch,
    plain_loss,
    same_gradients,
    step_config,
    take_gradients,
    tiny_qwen2,
)

from pipeline import comm
from pipeline.data.batch import GlobalBatch
from pipeline.launch import discover_world
from pipeline.training.contrastive_step import accumulate_gradients
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.engine import build_optimizer
from pipeline.training.zero import ZeroEngine
from tests.support import PATIENCE, launch_ranks
from tests.traffic import Traffic

WORLD_SIZE = 2
PAIRS = 32
# The embedding is 8 % of the parameters, as in a 7B model.
SHAPE = {"hidden_size": 64, "num_layers": 8, "vocab_size": 700}
STEPS = 3


def traffic(quick: bool) -> list[Figure]:
    """P3: two gathers and one reduction for a sweep, however many chunks."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        tiny_qwen2(Path(folder), **SHAPE)
        size = "quick" if quick else "full"
        output = launch_ranks(WORLD_SIZE, Path(__file__), folder, size, seconds=900)
    for line in output.splitlines():
        if line.startswith("{"):
            figures += _figures(json.loads(line))
    return figures


def _figures(result: dict[str, Any]) -> list[Figure]:
    chunks, sweep = result["chunks"], result["schedule"] == "sweep"
    name = f"{result['schedule']}, C = {chunks}"
    # A tenth of a percent for norms of gradients and other scalars.
    asked = (2.001, 1.001) if sweep else (1 + chunks + 0.001, 1.001)
    gathered = result["pass 1"] + result["pass 2"] + result["update"]
    return [
        same_gradients(name, result["error"], 1e-5),
        Figure(
            name=f"{name}: gathered",
            asked="<= 2" if sweep else f"<= 1 + {chunks}",
            measured=f"{gathered:.3f} (pass 1 {result['pass 1']:.3f}, pass 2 "
            f"{result['pass 2']:.3f}, update {result['update']:.3f})",
            ok=gathered <= asked[0],
        ),
        Figure(
            name=f"{name}: reduced",
            asked="<= 1",
            measured=f"{result['reduced']:.3f}",
            ok=result["reduced"] <= asked[1],
        ),
    ]


def measure(path: Path, schedule: str, chunks: int) -> dict[str, Any]:
    """One engine, three steps, the last of them counted."""
    rng = np.random.default_rng(0)
    texts = draw_texts(rng.integers(6, 20, size=2 * PAIRS), SHAPE["vocab_size"])
    rank = comm.rank()
    batches = [
        make_batch(texts, PAIRS, max_tokens=1000, min_chunks=chunks, rank=r, world_size=WORLD_SIZE)
        for r in range(WORLD_SIZE)
    ]
    oracle, encoder = load(path), load(path)
    whole = make_batch(texts, PAIRS, max_tokens=2000)
    plain_loss(oracle, whole)[0].backward()
    wanted = take_gradients(oracle)
    parameter_bytes = sum(4 * p.numel() for p in encoder.parameters())
    config = step_config(schedule)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    ds_config = resolve_ds_config({"zero_optimization": zero}, config, world_size=WORLD_SIZE)
    engine = ZeroEngine(encoder, build_optimizer(encoder, config.optimizer), ds_config)
    counted = Traffic()
    _mark_second_pass(engine, counted)
    for step in range(STEPS):
        counted.bytes.clear()
        counted.phase = "pass 1"
        _step(engine, batches[rank], schedule)
        if step == 0:
            counted.phase = "check"
            gradients = {name: engine.full_gradient(name) for name in engine.parameter_names}
            error = gradient_error(gradients, wanted)
        counted.phase = "update"
        engine.step(1e-4)
    engine.close()
    units = {key: value / parameter_bytes for key, value in counted.bytes.items()}
    return {
        "schedule": schedule,
        "chunks": len(batches[rank].chunks),
        "error": error,
        **{name: units.get((name, "gathered"), 0.0) for name in ("pass 1", "pass 2", "update")},
        "reduced": sum(value for (_, kind), value in units.items() if kind == "reduced"),
    }


def _step(engine: ZeroEngine, batch: GlobalBatch, schedule: str) -> None:
    accumulate_gradients(engine, batch, step_config(schedule), device=torch.device("cpu"))


def _mark_second_pass(engine: ZeroEngine, counted: Traffic) -> None:
    """The second pass starts where the step opens the engine's accumulation."""
    accumulation = engine.accumulation

    def marked() -> Any:
        counted.phase = "pass 2"
        return accumulation()

    engine.accumulation = marked  # type: ignore[method-assign]


def main(folder: str, size: str) -> None:
    """One rank; rank 0 prints a JSON line per case."""
    torch.set_num_threads(1)
    comm.start(discover_world(), timeout_seconds=PATIENCE)
    for chunks in (4,) if size == "quick" else (4, 8, 16):
        for schedule in ("cache", "sweep"):
            result = measure(Path(folder), schedule, chunks)
            if comm.rank() == 0:
                print(json.dumps(result), flush=True)
    comm.leave(0, gracefully=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
