"""The DeepSpeed JSON and the training config are one or they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.training.ds_config import load_ds_config, resolve_ds_config

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def make_config(dtype: str = "float32", max_grad_norm: float = 0.5) -> TrainConfig:
    return TrainConfig(
        output_dir=Path("run"),
        num_steps=10,
        model=ModelConfig(path="model", dtype=dtype),
        data=DataConfig(path=Path("shards")),
        optimizer=OptimizerConfig(max_grad_norm=max_grad_norm),
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_resolves_without_auto(path: Path) -> None:
    resolved = resolve_ds_config(load_ds_config(path), make_config("bfloat16"), world_size=4)
    assert "auto" not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 4
    assert resolved["bf16"]["enabled"] is True


def test_clipping_is_always_explicit() -> None:
    """DeepSpeed clips at 1.0 when nothing is said."""
    tree = {"zero_optimization": {"stage": 2}}
    off = resolve_ds_config(tree, make_config(max_grad_norm=0.0), world_size=1)
    assert off["gradient_clipping"] == 0.0


def test_resolving_leaves_the_input_alone() -> None:
    tree = {"zero_optimization": {"stage": 2}}
    resolve_ds_config(tree, make_config(), world_size=1)
    assert tree == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping to 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled to True"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps to 4"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu to 8"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"zero_optimization": {"stage": 0}}, "stage: 0"),
        ({"amp": {"enabled": True}}, "amp"),
        ({"pipeline": {"stages": 2}}, "pipeline"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"gradient_cliping": 1.0}, "gradient_cliping"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "quantized_weights"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "exact"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param"),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "round_robin_gradients",
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}, "with 6 ranks"),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}, "at stage 2"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "device: nvme",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}},
            "offload_optimizer.ratio",
        ),
        (
            {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
            "grad_accum_dtype",
        ),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "reduce_bucket_size"),
    ],
)
def test_a_disagreement_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    tree = {"zero_optimization": {"stage": 2}, **changes}
    with pytest.raises(UserError, match=message):
        resolve_ds_config(tree, make_config(), world_size=6)


def test_a_refused_option_that_is_off_may_stay() -> None:
    zero = {"stage": 3, "zero_quantized_weights": False}
    tree = {"zero_optimization": zero, "fp16": {"enabled": False}, "amp": None}
    resolved = resolve_ds_config(tree, make_config(), world_size=1)
    assert resolved["gradient_clipping"] == 0.5


def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[]")
    for name, message in (("a.json", "damaged"), ("b.json", "list"), ("c.json", "no such file")):
        with pytest.raises(UserError, match=message):
            load_ds_config(tmp_path / name)
