"""The DeepSpeed JSON and our config made into one: every `auto` filled, every disagreement refused.

`config.yaml` owns hyper-parameters, the DeepSpeed JSON owns sharding and offload.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from pipeline.config import TrainConfig
from pipeline.errors import UserError

_OWNED_BY_CONFIG = {
    "optimizer": "optimizer.* of the training config",
    "scheduler": "optimizer.warmup_steps and optimizer.decay of the training config",
}


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises:
        UserError: no such file, or not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file", fix="give a DeepSpeed JSON, see ds_configs/")
    try:
        tree = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {type(tree).__name__} at the top", allowed="a JSON object")
    return tree


def resolve_ds_config(
    ds_config: dict[str, Any], config: TrainConfig, *, world_size: int
) -> dict[str, Any]:
    """Return the complete DeepSpeed config; pure.

    Raises:
        UserError: a value contradicts the training config, or asks for what cannot be exact.
    """
    tree = copy.deepcopy(ds_config)
    for key, owner in _OWNED_BY_CONFIG.items():
        if key in tree:
            raise UserError(f"DeepSpeed config sets {key!r}", fix=f"remove it; use {owner}")
    stage = tree.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(
            f"zero_optimization.stage: {stage}",
            allowed="1, 2 or 3",
            fix="stage 1 is plain data parallelism with a sharded optimizer",
        )
    if tree.get("fp16", {}).get("enabled"):
        raise UserError(
            "fp16.enabled: true", allowed="bf16 or fp32", fix="set model.dtype to bfloat16"
        )
    bf16 = config.model.dtype == "bfloat16"
    # DeepSpeed's micro-batch and accumulation know nothing of cached chunks: one optimizer step
    # is one accumulation boundary, whatever the number of chunks.
    _fill(tree, "train_micro_batch_size_per_gpu", 1)
    _fill(tree, "gradient_accumulation_steps", 1)
    _fill(tree, "train_batch_size", world_size)
    # DeepSpeed's own default is 1.0, not off.
    _fill(
        tree, "gradient_clipping", config.optimizer.max_grad_norm, owner="optimizer.max_grad_norm"
    )
    _fill(tree.setdefault("bf16", {}), "enabled", bf16, owner="model.dtype", prefix="bf16.")
    _fill(tree, "zero_allow_untested_optimizer", True)
    tree.setdefault("steps_per_print", 2**31 - 1)
    if "offload_optimizer" in tree["zero_optimization"]:
        # torch's AdamW steps on the CPU as well, and needs no compiler.
        _fill(tree, "zero_force_ds_cpu_optimizer", False)
    _refuse_auto(tree)
    return tree


def _fill(
    tree: dict[str, Any], key: str, value: Any, *, owner: str = "this trainer", prefix: str = ""
) -> None:
    found = tree.get(key, "auto")
    if found not in ("auto", value):
        raise UserError(
            f"DeepSpeed config sets {prefix}{key} to {found!r}, but {owner} says {value!r}",
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
