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
        ({"zero_optimization": {"stage": "auto"}}, "stage: auto . allowed: 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}, "size is 'auto'"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, "a whole number >= 1"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0.5}}, "a whole number >= 1"),
        ({"steps_per_print": 0}, "steps_per_print to 0 . allowed: a whole number >= 1"),
        ({"train_batch_size": 256}, "256, but .* needs 6 . fix: remove it.*data.global_batch_size"),
        ({"gradient_accumulation_steps": 4}, "needs 1 . fix: remove it.*chunks.max_tokens"),
        # Weights, sums or messages of fewer bits, which DeepSpeed would silently take.
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16_master.*always float32"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states.*always float32"),
        ({"bf16": {"check_grad_overflow": False}}, "check_grad_overflow to False .*not finite"),
        ({"bf16": {"loss_scale": 0}}, "bf16.loss_scale . allowed: check_grad_overflow, enabled"),
        ({"communication_data_type": "fp16"}, "communication_data_type to 'fp16' . allowed: fp32"),
        ({"communication_data_type": "bf16"}, "to 'bf16' . allowed: fp32, as model.dtype is"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "accum_dtype to 'bf16' . allowed: fp32"),
        ({"data_types": {"buffer_dtype": "bf16"}}, "data_types.buffer_dtype . allowed: grad_accum"),
        ({"comms_logger": {"on": True}}, "comms_logger.on . allowed: debug, enabled"),
    ],
)
def test_a_disagreement_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    tree = {"zero_optimization": {"stage": 2}, **changes}
    with pytest.raises(UserError, match=message):
        resolve_ds_config(tree, make_config(), world_size=6)


def test_a_refused_option_that_is_off_may_stay() -> None:
    zero = {"stage": 3, "zero_quantized_weights": False}
    zero["offload_param"] = {"device": "none"}
    tree = {"zero_optimization": zero, "fp16": {"enabled": False}, "amp": {"enabled": False}}
    resolved = resolve_ds_config(tree, make_config(), world_size=1)
    assert resolved["gradient_clipping"] == 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_blocks_of_common_templates_resolve(dtype: str) -> None:
    """What transformers' documentation gives, whose fp16 follows a flag that is never set here."""
    fp16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2}
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    zero |= {"allgather_bucket_size": 2e8, "reduce_bucket_size": 5e8, "overlap_comm": True}
    tree = {
        **{"fp16": fp16, "bf16": {"enabled": "auto"}, "zero_optimization": zero},
        **{"gradient_clipping": "auto", "train_batch_size": "auto", "steps_per_print": 2000},
    }
    resolved = resolve_ds_config(tree, make_config(dtype), world_size=4)
    assert resolved["fp16"] == {"enabled": False}
    assert resolved["bf16"] == {"enabled": dtype == "bfloat16"}


@pytest.mark.parametrize("section", ["fp16", "bf16", "data_types", "comms_logger"])
def test_a_section_that_is_null_is_as_good_as_none(section: str) -> None:
    tree = {"zero_optimization": {"stage": 2, "offload_optimizer": None}}
    wanted = resolve_ds_config({"zero_optimization": {"stage": 2}}, make_config(), world_size=1)
    assert resolve_ds_config({**tree, section: None}, make_config(), world_size=1) == wanted


def test_a_wider_type_may_be_written_by_any_name_of_deepspeed() -> None:
    tree = {"zero_optimization": {"stage": 3}, "communication_data_type": "float32"}
    tree["data_types"] = {"grad_accum_dtype": "torch.float32"}
    resolved = resolve_ds_config(tree, make_config("bfloat16"), world_size=1)
    assert resolved["communication_data_type"] == "fp32"
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}


def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[]")
    for name, message in (("a.json", "damaged"), ("b.json", "list"), ("c.json", "no such file")):
        with pytest.raises(UserError, match=message):
            load_ds_config(tmp_path / name)
