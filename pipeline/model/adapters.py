"""Low-rank adapters on a backbone, fresh or from an earlier run, by peft."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pipeline.config import LoraConfig
from pipeline.errors import UserError
from pipeline.model.weights import Placement


def add_lora(backbone: nn.Module, config: LoraConfig) -> nn.Module:
    """Freeze the backbone and add fresh adapters to the linear layers named in the config.

    Raises:
        UserError: one of the named layers does not exist.
    """
    # peft ignores a name that matches nothing as long as another one matches.
    names = _linear_names(backbone)
    unknown = [target for target in config.targets if target not in names]
    if unknown:
        raise UserError(
            f"model.lora.targets: no layer is called {', '.join(unknown)}",
            allowed=", ".join(sorted(names)),
        )
    adapter = peft.LoraConfig(
        task_type=peft.TaskType.FEATURE_EXTRACTION,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        use_rslora=config.rslora,
        bias="none",
    )
    return _attach(backbone, adapter)


def continue_adapter(backbone: nn.Module, path: str, *, meta: bool) -> nn.Module:
    """Put an adapter folder on the backbone and keep it trainable, as the only part that is.

    Args:
        backbone: the model the adapter was trained on.
        path: a folder or hub name with adapter_config.json.
        meta: shapes only; read no weights.

    Raises:
        UserError: no adapter is there, or it belongs to another model.
    """
    config, weights = _read_adapter(path, with_weights=not meta)
    adapted = _attach(backbone, config)
    if not meta:
        _set_weights(adapted, weights, path)
    return adapted


def plan_merge(
    backbone: nn.Module, path: str, placement: Placement | None
) -> Callable[[nn.Module], None]:
    """Read an adapter that is to become part of a backbone whose weights may be still to come.

    Args:
        backbone: the model the adapter was trained on; it is left as it is.
        path: a folder or hub name with adapter_config.json.
        placement: where the backbone's weights go; without one, there are only shapes.

    Returns:
        What merges the adapter's share into a module of the backbone, once that has its weights;
        does nothing in a process that reads none.

    Raises:
        UserError: no adapter is there, or it belongs to another model.
    """
    config, weights = _read_adapter(path, with_weights=placement is not None and placement.reads)
    tuners: dict[nn.Module, Any] = {}
    if placement is not None and placement.reads:
        base = {id(parameter) for parameter in backbone.parameters()}
        adapted: Any = _attach(backbone, config)
        _leave_meta(adapted, base, placement.device)
        _set_weights(adapted, weights, path)
        for module in adapted.modules():
            if isinstance(module, BaseTunerLayer):  # keeps the module that it stands in for
                tuners[module.get_base_layer()] = module
        adapted.unload().requires_grad_(True)  # peft froze it

    def merge(module: nn.Module) -> None:
        if module in tuners:
            tuners[module].merge()

    return merge


def _read_adapter(path: str, *, with_weights: bool) -> tuple[peft.PeftConfig, dict[str, Tensor]]:
    """An adapter folder's config, made trainable, and its weights if they are asked for."""
    try:
        config = peft.PeftConfig.from_pretrained(path)
        weights = peft.load_peft_weights(path, device="cpu") if with_weights else {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.adapter: cannot read an adapter from {path!r}",
            allowed="a folder with adapter_config.json and adapter_model.safetensors",
        ) from error
    if getattr(config, "modules_to_save", None):
        raise UserError(
            f"model.adapter: {path} replaces whole modules ({config.modules_to_save})",
            allowed="an adapter without modules_to_save",
            fix="merge it into its model with peft and give that as model.path",
        )
    config.inference_mode = False
    return config, weights


def _leave_meta(adapted: nn.Module, base: set[int], device: torch.device) -> None:
    """Make room for an adapter's own weights, which peft puts where the backbone's are."""
    for module in adapted.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in base:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))


def _attach(backbone: nn.Module, config: peft.PeftConfig) -> nn.Module:
    with warnings.catch_warnings():
        # peft asks for a property that transformers renames, and notes where an adapter came from.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        # Beside weights that are only shapes, adapters are only shapes as well.
        shapes_only = next(backbone.parameters()).is_meta
        adapted: nn.Module = peft.get_peft_model(backbone, config, low_cpu_mem_usage=shapes_only)
    return adapted


def _set_weights(adapted: Any, weights: dict[str, Tensor], path: str) -> None:
    """Load all of an adapter or refuse it: peft leaves what does not fit at its fresh value."""
    # Adapters of a language model name its backbone, which here stands alone.
    stem = "base_model.model."
    outer = f"{stem}{adapted.get_base_model().base_model_prefix}."
    if all(name.startswith(outer) for name in weights):
        weights = {stem + name.removeprefix(outer): value for name, value in weights.items()}
    try:
        loaded = peft.set_peft_model_state_dict(adapted, weights)
    except RuntimeError as error:
        raise UserError(f"model.adapter: {path}: {str(error).splitlines()[-1].strip()}") from error
    missing = [name for name in loaded.missing_keys if "lora_" in name]
    if missing or loaded.unexpected_keys:
        raise UserError(
            f"model.adapter: {path} does not fit the model: missing {missing[:2]}, "
            f"unexpected {list(loaded.unexpected_keys)[:2]}",
            fix="give the adapter of this backbone",
        )


def _linear_names(backbone: nn.Module) -> set[str]:
    """Last parts of the names of the linear layers inside the blocks."""
    kinds = ("Linear", "Conv1D")  # Conv1D is GPT-2's transposed linear layer
    return {
        name.rsplit(".", 1)[-1]
        for name, module in backbone.named_modules()
        if type(module).__name__ in kinds
    }
