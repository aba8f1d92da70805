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
# Keys of the other sections, except `fp16`, which is always off.
_KNOWN_INSIDE = {
    "bf16": {"enabled", "check_grad_overflow"},
    "data_types": {"grad_accum_dtype"},
    "comms_logger": {"enabled", "prof_all", "prof_ops", "verbose", "debug"},
}
_SWITCHES = {
    *("contiguous_gradients", "reduce_scatter", "overlap_comm", "allgather_partitions"),
    *("pin_memory", "fast_init", "enabled", "wall_clock_breakdown", "check_grad_overflow"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("prof_all", "verbose", "debug"),
}
# Sizes that DeepSpeed divides by, or fills.
_ABOVE_ZERO = {"reduce_bucket_size", "steps_per_print"}
_SECTIONS = {
    "bf16",
    "fp16",
    "zero_optimization",
    "data_types",
    "comms_logger",
    "offload_optimizer",
}
_WORDS = {"device", "communication_data_type", "grad_accum_dtype"}
_LISTS = {"prof_ops"}
_ROUNDS = "it rounds what ranks exchange, and gradients would not be exact"
_FULL = "master weights, gradients and moments are always float32"
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
    "bf16_master_weights_and_grads": _FULL,
    "bf16_optimizer_states": _FULL,
    "immediate_grad_update": "gradients of chunks add up in fp32 and are reduced once",
}
# Values by which a section of `_WHY` is turned off.
_OFF = (False, None, {"enabled": False}, {"device": "none"})
# DeepSpeed's names of the types that gradients may have; all of its keys know the short ones.
_TYPES = {
    **dict.fromkeys(("fp32", "float32", "torch.float32", "float"), "fp32"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16", "bfloat"), "bf16"),
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
    tree = _without_null_sections(copy.deepcopy(ds_config))
    for key, owner in _OWNED_BY_CONFIG.items():
        if key in tree:
            raise UserError(f"DeepSpeed config sets {key!r}", fix=f"remove it; use {owner}")
    _check_zero(tree, world_size)
    bf16 = config.model.dtype == "bfloat16"
    _check_types(tree, bf16=bf16)
    # DeepSpeed's micro-batch and accumulation know nothing of cached chunks: one optimizer step
    # is one accumulation boundary for any number of chunks.
    chunks = "a step's batch is data.global_batch_size, cut into forwards by chunks.max_tokens"
    _fill(tree, "train_micro_batch_size_per_gpu", 1, instead=chunks)
    _fill(tree, "gradient_accumulation_steps", 1, instead=chunks)
    _fill(tree, "train_batch_size", world_size, instead=chunks)
    # DeepSpeed's own default is 1.0, not off.
    _fill(
        tree, "gradient_clipping", config.optimizer.max_grad_norm, owner="optimizer.max_grad_norm"
    )
    _fill(tree.setdefault("bf16", {}), "enabled", bf16, owner="model.dtype", prefix="bf16.")
    _fill(tree, "zero_allow_untested_optimizer", True, instead="AdamW here is torch's own")
    if tree["zero_optimization"]["stage"] == 3:
        # Otherwise DeepSpeed replaces torch's linear function in the whole process by one in
        # Python, which takes most of the host's time of a layer. It saves memory only where
        # parameters are released between forward and backward; ours are held.
        tree["zero_optimization"]["memory_efficient_linear"] = False
    tree.setdefault("steps_per_print", 2**31 - 1)  # never: a step has its own line
    if "offload_optimizer" in tree["zero_optimization"]:
        # torch's AdamW steps on the CPU as well, and needs no compiler.
        instead = "torch's AdamW runs on the CPU too, and needs no compiler"
        _fill(tree, "zero_force_ds_cpu_optimizer", False, instead=instead)
    _refuse_auto(tree)
    return tree


def _without_null_sections(tree: dict[str, Any]) -> dict[str, Any]:
    """Leave out sections that are null, as if they were absent."""
    return {
        key: _without_null_sections(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None or key not in _SECTIONS
    }


def _check_keys(tree: dict[str, Any], known: set[str], prefix: str = "") -> None:
    """Raise on the first key that the trainer does not know, unless it is only turned off."""
    for key, value in tree.items():
        off = key in _WHY and value in _OFF
        if key not in known and not off:
            raise UserError(
                f"DeepSpeed config sets {prefix}{key}",
                allowed=", ".join(sorted(known)),
                fix="remove it" + (f"; {_WHY[key]}" if key in _WHY else ""),
            )


def _check_kinds(tree: dict[str, Any], prefix: str = "") -> None:
    """Raise on the first value whose type does not fit its key; numbers are sizes."""
    known = set.union(_KNOWN, _KNOWN_ZERO, _KNOWN_OFFLOAD, *_KNOWN_INSIDE.values())
    for key, value in tree.items():
        # Other keys are left to `_check_keys`, which names the known ones.
        if key in known and value != "auto":
            allowed = _kind_of(key, value)
            found = f"DeepSpeed config sets {prefix}{key} to {value!r}"
            if allowed:
                raise UserError(found, allowed=allowed)
        if isinstance(value, dict) and key != "fp16":
            _check_kinds(value, f"{prefix}{key}.")


def _kind_of(key: str, value: Any) -> str:
    """Return the values that a key accepts, in words, if this is none of them."""
    if key in _SECTIONS:
        return "" if isinstance(value, dict) else "a JSON object"
    if key in _SWITCHES:
        return "" if isinstance(value, bool) else "true or false"
    if key in _WORDS:
        return "" if isinstance(value, str) or value is None else "a word"
    if key in _LISTS:
        return "" if isinstance(value, list) else "a list"
    least = 1 if key in _ABOVE_ZERO else 0
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "gradient_clipping":
        return "" if is_number and value >= 0 else "a number >= 0"
    # Written as 5e8, a size is a float.
    fits = is_number and value >= least and value == value // 1
    return "" if fits else f"a whole number >= {least}"


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
    for section, known in _KNOWN_INSIDE.items():
        _check_keys(tree.get(section, {}), known, f"{section}.")
    offload = zero.get("offload_optimizer") or {}
    _check_keys(offload, _KNOWN_OFFLOAD, "zero_optimization.offload_optimizer.")
    if offload.get("device", "cpu") not in ("cpu", "none"):
        raise UserError(
            f"zero_optimization.offload_optimizer.device: {offload['device']}",
            allowed="cpu or none",
            fix="disks hold checkpoints only; use more ranks, or LoRA",
        )
    _refuse_auto(zero, "zero_optimization")  # nothing of it is filled, and numbers are compared
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


def _check_types(tree: dict[str, Any], *, bf16: bool) -> None:
    """Raise on number formats that DeepSpeed or exactness does not allow."""
    if tree.get("fp16", {}).get("enabled") not in (False, None, "auto"):
        raise UserError(
            "fp16.enabled: true", allowed="bf16 or fp32", fix="set model.dtype to bfloat16"
        )
    if "fp16" in tree:
        tree["fp16"] = {"enabled": False}  # nothing else in it has an effect then
    if not tree.get("bf16", {}).get("check_grad_overflow", True):
        raise UserError(
            "DeepSpeed config sets bf16.check_grad_overflow to False",
            fix="remove it; a step whose gradient is not finite must not be applied",
        )
    types = tree.get("data_types", {})
    # A type narrower than the weights' would round what ranks exchange or add up.
    _check_type(tree, "communication_data_type", bf16=bf16)
    _check_type(types, "grad_accum_dtype", bf16=bf16, prefix="data_types.")
    if types.get("grad_accum_dtype") and tree["zero_optimization"]["stage"] == 1:
        # DeepSpeed would take another optimizer, which cannot reduce once per step.
        raise UserError(
            f"data_types.grad_accum_dtype: {types['grad_accum_dtype']} at stage 1",
            allowed="stage 2 or 3",
            fix="remove it; chunks add up in fp32 at every stage",
        )


def _check_type(section: dict[str, Any], key: str, *, bf16: bool, prefix: str = "") -> None:
    """Raise on the name of a type that is not as wide as the weights'; shorten the name."""
    given = section.get(key)
    if given in (None, "auto"):
        return
    name = _TYPES.get(given)
    if name is None or (name == "bf16" and not bf16):
        raise UserError(
            f"DeepSpeed config sets {prefix}{key} to {given!r}",
            allowed="fp32 or bf16" if bf16 else "fp32, as model.dtype is float32",
            fix="remove it; gradients then have the type of the weights",
        )
    section[key] = name


def _fill(
    tree: dict[str, Any],
    key: str,
    value: Any,
    *,
    owner: str = "this trainer",
    instead: str = "",
    prefix: str = "",
) -> None:
    found = tree.get(key, "auto")  # a missing key is to be filled too
    if found not in ("auto", value):
        fix = f'set it to "auto" in the DeepSpeed config, or change {owner}'
        raise UserError(
            f"DeepSpeed config sets {prefix}{key} to {found!r}, but {owner} "
            + (f"needs {value!r}" if instead else f"is {value!r}"),
            fix=f'remove it, or set it to "auto"; {instead}' if instead else fix,
        )
    tree[key] = value


def _refuse_auto(tree: Any, path: str = "") -> None:
    """Raise on any `auto` that is left: DeepSpeed would guess or fail later."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            _refuse_auto(value, f"{path}.{key}" if path else key)
    elif tree == "auto":
        raise UserError(f"DeepSpeed config: {path} is 'auto'", fix="give it a value or remove it")
