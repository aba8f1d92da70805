"""Adapters of earlier runs that become part of a backbone's weights, as peft merges them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.model.adapter_files import AdapterFiles, read_adapter, read_adapter_config
from pipeline.model.weights import Placement

Merge = Callable[[nn.Module], None]

# Keys of a LoRA config whose layers compute more than weights plus a product of two matrices.
_BEYOND_ADDING = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


def plan_merge(
    backbone: nn.Module,
    path: str,
    placement: Placement | None,
    *,
    load_base: Callable[[], nn.Module],
) -> Merge:
    """Read an adapter that is to become part of a backbone whose weights may be still to come.

    LoRA is merged layer by layer as weights are read. Other kinds start from the weights below
    them, or replace some: a process that reads has the whole model in memory for those.

    Args:
        backbone: the model the adapter was trained on; it is left as it is.
        path: a folder or hub name with adapter_config.json.
        placement: where the backbone's weights go; without one, there are only shapes.
        load_base: the same backbone once more with its weights, on the CPU.

    Returns:
        What merges the adapter's share into a module of the backbone, once that has its weights;
        does nothing in a process that reads none.

    Raises:
        UserError: no adapter is there, it belongs to another model, or it cannot be merged.
    """
    if placement is None or not placement.reads:
        read_adapter_config(path)
        return lambda module: None
    files = read_adapter(backbone, path)
    if _only_adds(files):
        return _merge_by_layer(backbone, files, placement)
    # What starts are drawn from is the run's own generator.
    with torch.random.fork_rng(devices=[]):
        return _merge_whole(backbone, files, load_base())


def _only_adds(files: AdapterFiles) -> bool:
    """Whether all of an adapter is matrices added to the weights of layers."""
    config = files.config
    return (
        config.peft_type == peft.PeftType.LORA
        and config.init_lora_weights in (True, False, "gaussian")
        and not any(getattr(config, key, None) for key in _BEYOND_ADDING)
        and all(".lora_" in name for name in files.weights)
    )


def _merge_by_layer(backbone: nn.Module, files: AdapterFiles, placement: Placement) -> Merge:
    tuners: dict[nn.Module, Any] = {}
    base = {id(parameter) for parameter in backbone.parameters()}
    adapted = files.attach(backbone)
    _leave_meta(adapted, base, placement.device)
    files.load(adapted)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):  # keeps the module that it stands in for
            tuners[module.get_base_layer()] = module
    adapted.unload()
    backbone.requires_grad_(True)  # peft froze it

    def merge(module: nn.Module) -> None:
        if module in tuners:
            tuners[module].merge()

    return merge


def _leave_meta(adapted: nn.Module, base: set[int], device: torch.device) -> None:
    """Make room for an adapter's own weights, which peft puts where the backbone's are."""
    for module in adapted.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in base:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))


def _merge_whole(backbone: nn.Module, files: AdapterFiles, base: nn.Module) -> Merge:
    adapted = files.attach(base)
    files.load(adapted)
    try:
        adapted.merge_and_unload()
    except (NotImplementedError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model.adapter: {files.path} ({files.config.peft_type.value}) cannot be merged into "
            f"weights: {reason}",
            allowed="adapters that peft can merge, such as LoRA",
        ) from error
    merged: dict[str, Tensor] = dict(base.named_parameters())
    if {name: value.shape for name, value in merged.items()} != {
        name: value.shape for name, value in backbone.named_parameters()
    }:
        raise UserError(
            f"model.adapter: {files.path} adds weights that the model has no place for",
            fix="merge it into its model with peft and give that as model.path",
        )
    names = {module: name for name, module in backbone.named_modules()}

    def merge(module: nn.Module) -> None:
        with torch.no_grad():
            for attribute, parameter in module.named_parameters(recurse=False):
                name = f"{names[module]}.{attribute}".removeprefix(".")
                parameter.copy_(merged.pop(name))

    return merge
