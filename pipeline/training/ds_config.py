"""Resolve the DeepSpeed JSON: fill every `auto` from the training config, refuse contradictions.

The training config owns hyper-parameters, the DeepSpeed JSON owns sharding and offload.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.shipped_files import find_shipped

_OWNED_BY_CONFIG = {
    "optimizer": "optimizer.* of the training config",
    "scheduler": "optimizer.warmup_steps and optimizer.decay of the training config",
}

# Everything else is refused: DeepSpeed silently accepts unknown keys, and its other features have
# not been shown to give exact gradients together with one reduction per step.
_KNOWN = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "bf16", "fp16", "zero_optimization", "data_types"),
    *("communication_data_type", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("steps_per_print", "wall_clock_breakdown", "comms_logger"),
}
_KNOWN_ZERO = {
    *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "overlap_comm"),
    *("allgather_partitions", "allgather_bucket_size"),
    *("offload_optimizer", "sub_group_size", "zero_hpz_partition_size"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"),
    *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
}
_KNOWN_OFFLOAD = {"device", "pin_memory", "buffer_count", "fast_init"}
_SWITCHES = {
    *("contiguous_gradients", "reduce_scatter", "overlap_comm", "allgather_partitions"),
    *("pin_memory", "fast_init", "enabled", "wall_clock_breakdown"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
}
_SECTIONS = {
    "bf16",
    "fp16",
    "zero_optimization",
    "data_types",
    "comms_logger",
    "offload_optimizer",
}
_WORDS = {"device", "communication_data_type", "grad_accum_dtype"}
_NESTED = {"enabled", "grad_accum_dtype"}
_ROUNDS = "it rounds what ranks exchange, and gradients would not be exact"
_WHY = {
    "memory_efficient_linear": "parameters are held from forward to backward",
    "zero_quantized_weights": _ROUNDS,
    "zero_quantized_gradients": _ROUNDS,
    "zero_quantized_nontrainable_weights": _ROUNDS,
    "offload_param": "schedule sweep already holds one layer at a time",
    "round_robin_gradients": "its gradients have not been compared with the exact ones",
    "mics_shard_size": "use zero_hpz_partition_size to keep gathers inside a node",
    "amp": "set model.dtype to bfloat16",
    "pipeline": "chunks of a batch already follow one another",
    "compression_training": _ROUNDS,
}


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file, a shipped one also where the current folder lacks it.

    Raises:
        UserError: no such file, or not a JSON object.
    """
    path = find_shipped(Path(path))
    if not path.is_file():
        raise UserError(f"{path}: no such file", fix="give a DeepSpeed JSON, see ds_configs/")
    tree = read_json(path, fix="give a DeepSpeed JSON, see ds_configs/")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {type(tree).__name__} at the top", allowed="a JSON object")
    return tree


def resolve_ds_config(
    ds_config: dict[str, Any], config: TrainConfig, *, world_size: int
) -> dict[str, Any]:
    """Return the complete DeepSpeed config.

    Raises:
        UserError: a value contradicts the training config, or its gradients would not be exact.
    """
    tree = copy.deepcopy(ds_config)
    for key, owner in _OWNED_BY_CONFIG.items():
        if key in tree:
            raise UserError(f"DeepSpeed config sets {key!r}", fix=f"remove it; use {owner}")
    _check_zero(tree, world_size)
    _check_types(tree)
    bf16 = config.model.dtype == "bfloat16"
    # DeepSpeed's micro-batch and accumulation know nothing of cached chunks: one optimizer step
    # is one accumulation boundary for any number of chunks.
    _fill(tree, "train_micro_batch_size_per_gpu", 1)
    _fill(tree, "gradient_accumulation_steps", 1)
    _fill(tree, "train_batch_size", world_size)
    # DeepSpeed's own default is 1.0, not off.
    _fill(
        tree, "gradient_clipping", config.optimizer.max_grad_norm, owner="optimizer.max_grad_norm"
    )
    _fill(tree.setdefault("bf16", {}), "enabled", bf16, owner="model.dtype", prefix="bf16.")
    _fill(tree, "zero_allow_untested_optimizer", True)
    if tree["zero_optimization"]["stage"] == 3:
        # Otherwise DeepSpeed replaces torch's linear function in the whole process by one in
        # Python, which takes most of the host's time of a layer. It saves memory only where
        # parameters are released between forward and backward; ours are held.
        tree["zero_optimization"]["memory_efficient_linear"] = False
    tree.setdefault("steps_per_print", 2**31 - 1)  # never: a step has its own line
    if "offload_optimizer" in tree["zero_optimization"]:
        # torch's AdamW steps on the CPU as well, and needs no compiler.
        _fill(tree, "zero_force_ds_cpu_optimizer", False)
    _refuse_auto(tree)
    return tree


def _check_keys(tree: dict[str, Any], known: set[str], prefix: str = "") -> None:
    """Raise on the first key that the trainer does not know, unless it is only turned off."""
    for key, value in tree.items():
        off = key in _WHY and value in (False, None)
        if key not in known and not off:
            raise UserError(
                f"DeepSpeed config sets {prefix}{key}",
                allowed=", ".join(sorted(known)),
                fix="remove it" + (f"; {_WHY[key]}" if key in _WHY else ""),
            )


def _check_kinds(tree: dict[str, Any], prefix: str = "") -> None:
    """Raise on the first value whose type does not fit its key; numbers are sizes."""
    for key, value in tree.items():
        if key in _SECTIONS:
            fits, allowed = isinstance(value, dict) or value is None, "a JSON object"
        elif key in _SWITCHES:
            fits, allowed = isinstance(value, bool), "true or false"
        elif key in _WORDS:
            fits, allowed = isinstance(value, str) or value is None, "a word"
        else:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
            allowed = "a number >= 0"
        # Other keys are left to `_check_keys`, which names the known ones.
        if not fits and value != "auto" and key in _KNOWN | _KNOWN_ZERO | _KNOWN_OFFLOAD | _NESTED:
            raise UserError(f"DeepSpeed config sets {prefix}{key} to {value!r}", allowed=allowed)
        if isinstance(value, dict):
            _check_kinds(value, f"{prefix}{key}.")


def _check_zero(tree: dict[str, Any], world_size: int) -> None:
    """Raise on settings that cannot be combined with one exact reduction per step."""
    _check_keys(tree, _KNOWN)
    _check_kinds(tree)
    zero = tree.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(
            f"zero_optimization.stage: {stage}",
            allowed="1, 2 or 3",
            fix="stage 1 is plain data parallelism with a sharded optimizer",
        )
    _check_keys(zero, _KNOWN_ZERO, "zero_optimization.")
    offload = zero.get("offload_optimizer") or {}
    _check_keys(offload, _KNOWN_OFFLOAD, "zero_optimization.offload_optimizer.")
    if offload.get("device", "cpu") not in ("cpu", "none"):
        raise UserError(
            f"zero_optimization.offload_optimizer.device: {offload['device']}",
            allowed="cpu or none",
            fix="disks hold checkpoints only; use more ranks, or LoRA",
        )
    replica = zero.get("zero_hpz_partition_size", 1)
    if replica > 1 and stage != 3:
        raise UserError(
            f"zero_optimization.zero_hpz_partition_size: {replica} at stage {stage}",
            allowed="stage 3",
            fix="remove it, or set stage to 3",
        )
    # DeepSpeed takes the world size where that is smaller.
    if replica > 1 and world_size > replica and world_size % replica:
        raise UserError(
            f"zero_optimization.zero_hpz_partition_size: {replica} with {world_size} ranks",
            allowed="a divisor of the number of ranks",
            fix="set it to the number of GPUs of a node",
        )


def _check_types(tree: dict[str, Any]) -> None:
    """Raise on number formats that DeepSpeed or exactness does not allow."""
    if tree.get("fp16", {}).get("enabled"):
        raise UserError(
            "fp16.enabled: true", allowed="bf16 or fp32", fix="set model.dtype to bfloat16"
        )
    types = tree.get("data_types", {})
    if types.get("grad_accum_dtype") and tree["zero_optimization"]["stage"] == 1:
        # DeepSpeed would take another optimizer, which cannot reduce once per step.
        raise UserError(
            f"data_types.grad_accum_dtype: {types['grad_accum_dtype']} at stage 1",
            allowed="stage 2 or 3",
            fix="remove it; chunks add up in fp32 at every stage",
        )


def _fill(
    tree: dict[str, Any], key: str, value: Any, *, owner: str = "this trainer", prefix: str = ""
) -> None:
    found = tree.get(key, "auto")  # a missing key is to be filled too
    if found not in ("auto", value):
        raise UserError(
            f"DeepSpeed config sets {prefix}{key} to {found!r}, but {owner} is {value!r}",
            fix=f'set it to "auto" in the DeepSpeed config, or change {owner}',
        )
    tree[key] = value


def _refuse_auto(tree: Any, path: str = "") -> None:
    """Raise on any `auto` that is left: DeepSpeed would guess or fail later."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            _refuse_auto(value, f"{path}.{key}" if path else key)
    elif tree == "auto":
        raise UserError(f"DeepSpeed config: {path} is 'auto'", fix="give it a value or remove it")
