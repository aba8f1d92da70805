"""One rank of the out-of-memory test: rank 1's encoder refuses long chunks, as a full GPU would.

A stand-in for a device this machine does not have: `torch.OutOfMemoryError` is raised by the test.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
from parity_worker import SEED, TEMPERATURE, make_batch, reference_gradients

from pipeline import comm
from pipeline.config import DataConfig, LossConfig, ModelConfig, TrainConfig
from pipeline.launch import discover_world
from pipeline.model.encoder import build_encoder
from pipeline.training.contrastive_step import accumulate_gradients
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.engine import (
    Agreement,
    ChunkOutOfMemoryError,
    StepGivenUpError,
    build_optimizer,
)
from pipeline.training.zero import ZeroEngine
from tests.support import PATIENCE
from tests.training.exactness import gradient_errors


def run_case(model_path: str, *, stage: int, in_backward_pass: bool) -> dict[str, float]:
    """Fail once with two chunks a rank, then continue with five."""
    model = ModelConfig(path=model_path, dtype="float32")
    config = TrainConfig(
        output_dir=Path("unused"),
        num_steps=1,
        seed=SEED,
        schedule="cache",
        model=model,
        data=DataConfig(path=Path("unused")),
        loss=LossConfig(temperature=TEMPERATURE),
    )
    rank = comm.rank()
    encoder = build_encoder(model).train()
    reference = build_encoder(model).train()
    _, wanted = reference_gradients(reference, [make_batch(r, 2, [5, 5]) for r in range(2)])
    real_embed = encoder.embed
    failures = 0

    def embed(input_ids: torch.Tensor, lengths: torch.Tensor, skipped: None) -> object:
        nonlocal failures
        if rank == 1 and len(input_ids) > 50 and torch.is_grad_enabled() == in_backward_pass:
            failures += 1
            raise torch.OutOfMemoryError("the test's stand-in for a full device")
        return real_embed(input_ids, lengths, skipped)

    encoder.embed = embed
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    ds_config = resolve_ds_config({"zero_optimization": zero}, config, world_size=2)
    engine = ZeroEngine(encoder, build_optimizer(encoder, config.optimizer), ds_config)
    raised = 0
    try:
        accumulate_gradients(engine, make_batch(rank, 2, [2, 2]), config, device=comm.device())
    except ChunkOutOfMemoryError:
        raised = 1
    assert failures == rank, "only rank 1 fails, and once"
    for schedule in ("cache", "sweep"):
        raised += give_up(engine, dataclasses.replace(config, schedule=schedule))
    accumulate_gradients(engine, make_batch(rank, 2, [5, 5]), config, device=comm.device())
    errors = gradient_errors(engine, wanted)
    engine.step(1e-4)
    engine.close()
    return {"raised": sum(comm.all_gather_object(raised)), "error": max(errors.values())}


def give_up(engine: ZeroEngine, config: TrainConfig) -> bool:
    """Request a stop on rank 1 alone near a step's end; return whether the step was given up."""
    points = 0

    def wants_to_stop() -> bool:
        nonlocal points
        points += 1
        return comm.rank() == 1 and points == 9

    agreement = Agreement(wants_to_stop)
    agreement.end_step(seconds=1e6)  # from now on every point agrees
    batch = make_batch(comm.rank(), 2, [5, 5])
    try:
        accumulate_gradients(engine, batch, config, device=comm.device(), agreement=agreement)
    except StepGivenUpError:
        return True
    return False


def main() -> None:
    torch.set_num_threads(1)
    comm.start(discover_world(), timeout_seconds=PATIENCE)
    for stage in (1, 2, 3):
        for in_backward_pass in (False, True):
            result = run_case(sys.argv[1], stage=stage, in_backward_pass=in_backward_pass)
            if comm.rank() == 0:
                line = {"stage": stage, "in_backward_pass": in_backward_pass, **result}
                print(json.dumps(line), flush=True)
    comm.leave(0, gracefully=True)


if __name__ == "__main__":
    main()
