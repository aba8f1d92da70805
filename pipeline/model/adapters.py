"""Low-rank adapters that are trained: fresh ones, and those of an earlier run, by peft."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from pipeline.config import LoraConfig
from pipeline.errors import UserError
from pipeline.model.adapter_files import AdapterFiles, attach, read_adapter

# peft's word for every linear layer except the head.
ALL_LINEAR = "all-linear"
# Starts that leave the weights below an adapter as they are.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def add_lora(backbone: nn.Module, config: LoraConfig) -> nn.Module:
    """Freeze the backbone and add fresh adapters to the linear layers named in the config.

    Raises:
        UserError: one of the named layers does not exist.
    """
    # peft ignores a name that matches nothing as long as another one matches.
    names = _linear_names(backbone)
    targets = sorted(names) if config.targets == ALL_LINEAR else list(config.targets)
    unknown = [target for target in targets if target not in names]
    if unknown:
        raise UserError(
            f"model.lora.targets: no layer is called {', '.join(unknown)}",
            allowed=f"{ALL_LINEAR}, or some of {', '.join(sorted(names))}",
        )
    adapter = peft.LoraConfig(
        task_type=peft.TaskType.FEATURE_EXTRACTION,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.rslora,
        bias="none",
    )
    adapted: nn.Module = attach(backbone, adapter)
    return adapted


def continue_adapter(backbone: nn.Module, path: str, *, meta: bool) -> nn.Module:
    """Put an adapter folder on the backbone and keep it trainable, as the only part that is.

    Args:
        backbone: the model the adapter was trained on.
        path: a folder or hub name with adapter_config.json.
        meta: shapes only; load no weights.

    Raises:
        UserError: no adapter is there, it belongs to another model, or it changes more than it
            adds.
    """
    files = read_adapter(backbone, path, shapes_only=meta)
    _check_continuable(files)
    own = _on_backbone(files, backbone)
    adapted = own.attach(backbone)
    if not meta:
        own.load(adapted)
    trained: nn.Module = adapted
    return trained


def _check_continuable(files: AdapterFiles) -> None:
    config = files.config
    start = getattr(config, "init_lora_weights", True)
    faults = {
        f"modules_to_save: {getattr(config, 'modules_to_save', None)}": getattr(
            config, "modules_to_save", None
        ),
        f"bias: {getattr(config, 'bias', 'none')}": getattr(config, "bias", "none") != "none",
        f"init_lora_weights: {start}": start not in _PLAIN_STARTS,
    }
    for fault, holds in faults.items():
        if holds:
            raise UserError(
                f"model.adapter_use: continue, but {files.path} changes weights of its model "
                f"({fault})",
                allowed="an adapter that only adds to them",
                fix="set adapter_use: merge, with a fresh model.lora on top",
            )


def _on_backbone(files: AdapterFiles, backbone: nn.Module) -> AdapterFiles:
    """The same adapter by the names of the backbone alone; its patterns become lists of names."""
    if not files.outer:
        return files
    outer = f"{files.outer}."
    config = files.config
    modules = [name for name, _ in backbone.named_modules() if name]
    changes: dict[str, Any] = {}
    if getattr(config, "target_modules", None) not in (None, ALL_LINEAR):
        found = [name for name in modules if check_target_module_exists(config, outer + name)]
        changes |= {"target_modules": found}
        changes |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        for key, pattern in vars(config).items():
            if key.endswith("_pattern") and isinstance(pattern, dict) and pattern:
                hits = {name: get_pattern_key(pattern, outer + name) for name in found}
                changes[key] = {
                    f"^{name}": pattern[hit] for name, hit in hits.items() if hit in pattern
                }
    for key, value in changes.items():
        if hasattr(config, key):
            setattr(config, key, value)
    stem = "base_model.model."
    weights = {name.replace(stem + outer, stem, 1): value for name, value in files.weights.items()}
    return dataclasses.replace(files, weights=weights, outer="")


def _linear_names(backbone: nn.Module) -> set[str]:
    """Last parts of the names of the linear layers inside the blocks."""
    kinds = ("Linear", "Conv1D")  # Conv1D is GPT-2's transposed linear layer
    return {
        name.rsplit(".", 1)[-1]
        for name, module in backbone.named_modules()
        if type(module).__name__ in kinds
    }
