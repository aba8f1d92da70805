"""The one rank of the GPU loading test: a bfloat16 model in partitions, and read whole.

Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch

from pipeline import comm
from pipeline.config import DataConfig, ModelConfig, TrainConfig
from pipeline.launch import discover_world
from pipeline.model.encoder import build_encoder
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.zero import placement_of


def main() -> None:
    comm.start(discover_world())
    model = ModelConfig(path=sys.argv[1], dtype="bfloat16")
    config = TrainConfig(
        output_dir=Path("unused"), num_steps=1, model=model, data=DataConfig(path=Path("unused"))
    )
    ds_config = resolve_ds_config({"zero_optimization": {"stage": 3}}, config, world_size=1)
    encoder = build_encoder(model, placement=placement_of(ds_config))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    whole = build_encoder(model)
    equal = True
    for ours, wanted in zip(encoder.parameters(), whole.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([ours]):
            equal &= torch.equal(ours.cpu(), wanted)
    for ours, wanted in zip(encoder.buffers(), whole.buffers(), strict=True):
        equal &= ours.device == comm.device() and torch.equal(ours.cpu(), wanted)
    sizes = [p.numel() * p.element_size() for p in whole.parameters()]
    layer = sum(p.numel() * p.element_size() for p in whole.layers[0].parameters())
    result = {"peak": peak, "model": sum(sizes), "piece": max(layer, *sizes), "equal": equal}
    print(json.dumps(result), flush=True)
    comm.leave(0, gracefully=True)


if __name__ == "__main__":
    main()
