"""Measure how far 128 coalesced bf16 backwards drift from the fp32 sum of the same 128 gradients.

One rank, ZeRO-2 as the trainer configures it; prints one JSON line.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch

from pipeline import comm
from pipeline.config import ModelConfig
from pipeline.launch import discover_world
from pipeline.model.encoder import build_encoder
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.engine import build_optimizer
from pipeline.training.zero import ZeroEngine
from tests.benchmarks.bench_support import Gradients, draw_texts, gradient_error, step_config
from tests.support import PATIENCE

NUM_CHUNKS, ROWS, VOCAB_SIZE = 128, 4, 500


def main(path: str) -> None:
    """Run every chunk's backward through the engine, and into an fp32 sum."""
    comm.start(discover_world(), timeout_seconds=PATIENCE)
    device = comm.device()
    model = ModelConfig(path=path, dtype="bfloat16")
    encoder = build_encoder(model).to(device)
    twin = build_encoder(model).to(device)  # the same bf16 weights, outside the engine
    config = dataclasses.replace(step_config(), model=model)
    ds_config = resolve_ds_config({"zero_optimization": {"stage": 2}}, config, world_size=1)
    engine = ZeroEngine(encoder, build_optimizer(encoder, config.optimizer), ds_config)
    rng = np.random.default_rng(0)
    width = encoder.model.config.hidden_size
    total: Gradients = {}
    with engine.accumulation():
        for number in range(NUM_CHUNKS):
            texts = draw_texts(rng.integers(8, 40, size=ROWS), VOCAB_SIZE, seed=number)
            ids = torch.from_numpy(np.concatenate(texts)).to(device)
            lengths = torch.tensor([len(text) for text in texts])
            # A common direction, as gradients of one loss have, and noise on top.
            weights = torch.from_numpy(0.3 + rng.standard_normal((ROWS, width))).to(device).float()
            engine.backward((engine.embed(ids, lengths) * weights).sum())
            (twin(ids, lengths) * weights).sum().backward()
            for name, parameter in twin.named_parameters():
                gradient = parameter.grad
                assert gradient is not None
                total[name] = total.get(name, 0.0) + gradient.float()
            twin.zero_grad(set_to_none=True)
    ours = {name: engine.full_gradient(name) for name in engine.parameter_names}
    print(json.dumps({"chunks": NUM_CHUNKS, "drift": gradient_error(ours, total)}), flush=True)
    engine.close()
    comm.leave(0, gracefully=True)


if __name__ == "__main__":
    main(str(Path(sys.argv[1])))
