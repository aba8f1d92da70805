"""One rank of the checkpoint tests: a small model on the real engine, saved, loaded, continued."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from pipeline import comm, run_folder
from pipeline.config import DataConfig, ModelConfig, TrainConfig
from pipeline.launch import discover_world
from pipeline.training import checkpoints
from pipeline.training.ds_config import resolve_ds_config
from pipeline.training.engine import build_optimizer
from pipeline.training.zero import ZeroEngine
from tests.support import PATIENCE

IDENTITY = {"data.global_batch_size": 8}
WIDTH = 19


class TwoGroups(torch.nn.Module):
    """Matrices and biases, hence two parameter groups with different weight decay."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        # Sizes that no number of ranks divides, so that every ZeRO-3 partition has padding.
        self.table = torch.nn.Embedding(53, WIDTH)
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, ids: torch.Tensor, *packing: torch.Tensor | None) -> torch.Tensor:
        hidden: torch.Tensor = self.norm(torch.tanh(self.linear(self.table(ids))))
        return hidden


def start_engine(stage: int, dtype: str, **zero: int) -> ZeroEngine:
    model = TwoGroups()
    if dtype == "bfloat16":
        model = model.bfloat16()
    config = TrainConfig(
        output_dir=Path("unused"),
        num_steps=10,
        model=ModelConfig(path="unused", dtype=dtype),
        data=DataConfig(path=Path("unused")),
    )
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **zero}
    ds_config = resolve_ds_config({"zero_optimization": zero}, config, world_size=comm.world_size())
    return ZeroEngine(model, build_optimizer(model, config.optimizer), ds_config)


def train(engine: ZeroEngine, steps: range) -> list[float]:
    """Gradient norms of the steps, the same global batch whatever the world size."""
    rank, world_size = comm.rank(), comm.world_size()
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 53, (8,), generator=generator)
        target = torch.randn(8, WIDTH, generator=generator)
        with engine.hold(list(engine.encoder.parameters())), engine.accumulation():
            for rows in (slice(0, 4), slice(4, 8)):
                mine, wanted = ids[rows][rank::world_size], target[rows][rank::world_size]
                out = engine.embed(mine, torch.ones_like(mine))
                loss = ((out.float() - wanted) ** 2).sum() / target.numel()
                engine.backward(loss * world_size)
        norms.append(engine.step(1e-2))
    return norms


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("mode", choices=["save", "load"])
    arguments = parser.parse_args()
    comm.start(discover_world(), timeout_seconds=PATIENCE)
    for dtype in ("float32", "bfloat16"):
        for stage in (1, 2, 3):
            folder = arguments.folder / f"{dtype}-{stage}"
            if arguments.mode == "save":
                engine = start_engine(stage, dtype)
                train(engine, range(3))
                saver = checkpoints.Saver(folder)
                saver.begin(engine, step=3, identity=IDENTITY)
                # While it is written the weights change.
                _report(dtype, stage, stage, "uninterrupted", train(engine, range(3, 6)))
                saver.finish()
                engine.close()
            for new_stage in (1, 2, 3):
                engine = start_engine(new_stage, dtype)
                path = run_folder.latest_checkpoint(folder)
                assert path is not None
                assert checkpoints.load(path, engine, IDENTITY) == (3, {})
                _report(dtype, stage, new_stage, "resumed", train(engine, range(3, 6)))
                engine.close()
    comm.leave(0, gracefully=True)


def _report(dtype: str, saved: int, stage: int, kind: str, norms: list[float]) -> None:
    if comm.rank() == 0:
        line = {"dtype": dtype, "saved": saved, "stage": stage, "kind": kind, "norms": norms}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
