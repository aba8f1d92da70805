"""A run that continues with other ranks and another ZeRO stage is still the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pipeline import run_folder
from pipeline.training import checkpoints
from tests.training.trainer_command import run_trainer

# Dropout masks are drawn per rank, so the curves can only be one without them.
SETTINGS = (
    "model.attention_dropout=0",
    "model.lora={rank: 5, dropout: 0}",
    "optimizer.lr=0.01",
    "num_steps=3",
)


def train(recipe: Path, run: Path, num_ranks: int, stage: int) -> int:
    """The exit code of a run on so many ranks of this machine."""
    zero = ("--deepspeed", f"ds_configs/zero{stage}.json")
    done = run_trainer(recipe, *zero, f"output_dir={run}", *SETTINGS, num_ranks=num_ranks)
    assert done.returncode in (0, 75), done.stderr
    return done.returncode


def stop_after_a_step(run: Path) -> None:
    """As `diffembed stop` does."""
    run.mkdir(exist_ok=True)
    (run / "stop").touch()


def curve(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_one_two_then_three_ranks_follow_the_curve_of_one(recipe: Path, tmp_path: Path) -> None:
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    assert train(recipe, undisturbed, 1, stage=3) == 0
    for num_ranks, stage in ((1, 1), (2, 2)):
        stop_after_a_step(run)
        assert train(recipe, run, num_ranks, stage) == 75
    # Three ranks divide no matrix of an adapter of rank 5: partitions have padding.
    assert train(recipe, run, 3, stage=3) == 0
    wanted, found = curve(undisturbed), curve(run)
    assert [line["step"] for line in found] == list(range(3))
    assert wanted[0]["grad_norm"] > 1e-3
    for key in ("loss", "grad_norm"):
        # The order of a sum over ranks is all that differs.
        expected = pytest.approx([line[key] for line in wanted], rel=1e-5)
        assert [line[key] for line in found] == expected, key
    assert_adapters_alone_are_saved(run / "checkpoints")


def assert_adapters_alone_are_saved(folder: Path) -> None:
    """ZeRO-3 would write empty tensors, and a broken filter the base model."""
    newest = run_folder.latest_checkpoint(folder)
    assert newest is not None
    adapters = {name: state["weight"] for name, state in checkpoints.iterate_tensors(newest)}
    assert len(adapters) == 2 * 2 * 7  # A and B, layers, targets
    for name, weight in adapters.items():
        assert "lora_" in name
        assert min(weight.shape) == 5, name
        assert weight.count_nonzero() == weight.numel(), name  # B starts as zeros
    for file in newest.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            assert all(tensors.get_tensor(key).numel() for key in tensors.keys())  # noqa: SIM118
