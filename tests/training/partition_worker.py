"""One rank of the loading tests: a model built in ZeRO-3 partitions, and the same built whole.

Prints one JSON line per result and rank, on rank 0.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from parity_worker import make_batch
from trap_worker import ZEROS, make_config

from pipeline import comm
from pipeline.config import LoraConfig, ModelConfig
from pipeline.errors import DiffembedError
from pipeline.launch import discover_world
from pipeline.model.encoder import Encoder, build_encoder
from pipeline.model.weights import Placement
from pipeline.training.contrastive_step import accumulate_gradients
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.engine import build_optimizer, seed_random
from pipeline.training.zero import ZeroEngine, placement_of
from tests.support import PATIENCE

CPU = torch.device("cpu")
M_MMAP_THRESHOLD = -3  # malloc.h


def anonymous() -> int:
    """Bytes of this process that no file stands behind; mapped weights can be dropped any time."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def growth(build: Callable[[], Encoder]) -> tuple[Encoder, int]:
    """A model, and the most that memory was seen to grow by while it was built."""
    gc.collect()
    before, most, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        encoder = build()
    finally:
        done.set()
        watcher.join()
    return encoder, max(most, anonymous()) - before


def memory(path: str) -> dict[str, Any]:
    """Growth by both ways to partitions, in bytes, and whether they hold the same."""
    model = ModelConfig(path=path, dtype="float32")
    ds_config = resolve_ds_config(
        {"zero_optimization": {"stage": 3}}, make_config(path), world_size=comm.world_size()
    )

    def whole_first() -> Encoder:
        encoder = build_encoder(model)
        deepspeed.zero.Init(module=encoder, config_dict_or_path=ds_config)
        return encoder

    shapes = build_encoder(model, meta=True)  # also pays for what first calls import
    placement = placement_of(ds_config)
    partitioned, in_pieces = growth(lambda: build_encoder(model, placement=placement))
    whole, at_once = growth(whole_first)
    equal = True
    for ours, wanted in zip(partitioned.parameters(), whole.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([ours, wanted]):
            equal &= torch.equal(ours, wanted)
    return {
        "in_pieces": in_pieces,
        "at_once": at_once,
        "equal": equal,
        "model": sum(4 * p.numel() for p in shapes.parameters()),
        "layer": sum(4 * p.numel() for p in shapes.layers[0].parameters()),
    }


def two_steps(path: str, zero: dict[str, Any], model: ModelConfig, *, pieces: bool) -> list[str]:
    """Losses and gradient norms, bit by bit."""
    config = make_config(path, dtype=model.dtype)
    ds_config = resolve_ds_config(
        {"zero_optimization": dict(zero)}, config, world_size=comm.world_size()
    )
    seed_random(0)
    placement = placement_of(ds_config) if pieces else Placement()
    encoder = build_encoder(model, placement=placement)
    engine = ZeroEngine(encoder, build_optimizer(encoder, config.optimizer), ds_config)
    numbers = []
    for _ in range(2):
        batch = make_batch(comm.rank(), comm.world_size(), [3, 5])
        output = accumulate_gradients(engine, batch, config, device=CPU)
        numbers += [float(output.loss).hex(), engine.step(1e-2).hex()]
    engine.close()
    return numbers


def failure(path: str) -> str:
    """Return the error of a model that cannot be built."""
    ds_config = resolve_ds_config(
        {"zero_optimization": {"stage": 3}}, make_config(path), world_size=comm.world_size()
    )
    try:
        build_encoder(ModelConfig(path=path), placement=placement_of(ds_config))
    except DiffembedError as error:
        return f"{type(error).__name__}: {error}"
    return "built"


def main() -> None:
    torch.set_num_threads(1)
    # glibc keeps freed blocks of up to 32 MiB by default, more or fewer of them in every run.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)
    comm.start(discover_world(), timeout_seconds=PATIENCE)
    large, tiny, broken, *adapters = sys.argv[1:]
    results: list[dict[str, Any]] = [{"case": "memory", **memory(large)}]
    full = ModelConfig(path=tiny, dtype="float32")
    adapter = ModelConfig(path=tiny, dtype="bfloat16", lora=LoraConfig(rank=4))
    for name, model in (("3", full), ("3 hpz", adapter)):
        pieces, whole = (two_steps(tiny, ZEROS[name], model, pieces=p) for p in (True, False))
        results.append({"case": name, "pieces": pieces, "whole": whole})
    for number, path in enumerate(adapters):
        model = dataclasses.replace(full, adapter=path, adapter_use="continue")
        pieces, whole = (two_steps(tiny, ZEROS["3"], model, pieces=p) for p in (True, False))
        results.append({"case": f"continued {number}", "pieces": pieces, "whole": whole})
    # Missing weights are seen by rank 0, which reads; a missing folder by rank 1 alone.
    results.append({"case": "misfit", "error": failure(broken)})
    results.append({"case": "rank 1", "error": failure(tiny if comm.rank() == 0 else "/nowhere")})
    for rank, lines in enumerate(comm.all_gather_object(results)):
        for line in lines if comm.rank() == 0 else ():
            print(json.dumps({"rank": rank, **line}), flush=True)
    comm.leave(0, gracefully=True)


if __name__ == "__main__":
    main()
