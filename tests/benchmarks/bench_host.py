"""Host time of a layer: what DeepSpeed adds to plain torch, on layers too small to compute much.

On a GPU the host only launches kernels; where it takes longer than they do, the GPU waits for it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from bench_support import Figure, PlainEngine, interleave, ratio, step_config, tiny_qwen2

from pipeline import comm
from pipeline.config import ModelConfig
from pipeline.launch import discover_world
from pipeline.model.encoder import build_encoder
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.engine import build_optimizer
from pipeline.training.zero import ZeroEngine, placement_of

LAYERS = 8
CHUNKS = 20
REPEATS = 10
LIMIT = 1.15
Work = Callable[[], None]


def host_time(quick: bool) -> list[Figure]:
    """P6: CPU seconds per layer and chunk on one rank, the least of several steps."""
    comm.start(discover_world())
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        path = tiny_qwen2(Path(folder), hidden_size=64, num_layers=LAYERS, vocab_size=300)
        works: dict[str, Work] = {}
        for name in ("plain", "ZeRO-2", "ZeRO-3"):
            engine = _make_engine(path, name)
            held.enter_context(engine.hold(list(engine.encoder.parameters())))
            works[f"{name}, forward without graph"] = _forward(engine)
            works[f"{name}, forward and backward"] = _backward(engine)
        costs, _ = interleave(works, 2 if quick else REPEATS)
    figures = [
        Figure(name=name, measured=f"{1e3 * cost.cpu / LAYERS / CHUNKS:.3f} ms a layer")
        for name, cost in costs.items()
    ]
    for part in ("forward without graph", "forward and backward"):
        above, below = costs[f"ZeRO-3, {part}"], costs[f"ZeRO-2, {part}"]
        figures.append(ratio(above, below, f"{part}: ZeRO-3 / ZeRO-2", LIMIT))
    return figures


def _make_engine(path: Path, name: str) -> ZeroEngine | PlainEngine:
    model = ModelConfig(path=str(path), dtype="bfloat16")
    config = dataclasses.replace(step_config(), model=model)
    if name == "plain":
        return PlainEngine(build_encoder(model))
    zero = {"stage": int(name[-1]), "stage3_param_persistence_threshold": 0}
    ds_config = resolve_ds_config({"zero_optimization": zero}, config, world_size=1)
    encoder = build_encoder(model, placement=placement_of(ds_config))
    return ZeroEngine(encoder, build_optimizer(encoder, config.optimizer), ds_config)


def _forward(engine: ZeroEngine | PlainEngine) -> Work:
    ids, lengths = torch.arange(8), torch.tensor([8])

    @torch.no_grad()
    def run() -> None:
        for _ in range(CHUNKS):
            engine.embed(ids, lengths, None)

    return run


def _backward(engine: ZeroEngine | PlainEngine) -> Work:
    ids, lengths = torch.arange(8), torch.tensor([8])

    def run() -> None:
        with engine.accumulation():
            for _ in range(CHUNKS):
                engine.backward(engine.embed(ids, lengths, None).sum())

    return run
