"""Low-rank adapters on a backbone, by peft."""

from __future__ import annotations

import warnings

import peft
from torch import nn

from pipeline.config import LoraConfig
from pipeline.errors import UserError


def add_lora(backbone: nn.Module, config: LoraConfig) -> nn.Module:
    """Freeze the backbone and add fresh adapters to the linear layers named in the config.

    Raises:
        UserError: none of the named layers exists.
    """
    adapter = peft.LoraConfig(
        task_type=peft.TaskType.FEATURE_EXTRACTION,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        use_rslora=config.rslora,
        bias="none",
    )
    # peft ignores a name that matches nothing as long as another one matches.
    names = _linear_names(backbone)
    unknown = [target for target in config.targets if target not in names]
    if unknown:
        raise UserError(
            f"model.lora.targets: no layer is called {', '.join(unknown)}",
            allowed=", ".join(sorted(names)),
        )
    with warnings.catch_warnings():
        # peft still asks for a property that transformers renames.
        warnings.simplefilter("ignore", FutureWarning)
        adapted: nn.Module = peft.get_peft_model(backbone, adapter)
    return adapted


def _linear_names(backbone: nn.Module) -> set[str]:
    """Last parts of the names of the linear layers inside the blocks."""
    kinds = ("Linear", "Conv1D")  # Conv1D is GPT-2's transposed linear layer
    return {
        name.rsplit(".", 1)[-1]
        for name, module in backbone.named_modules()
        if type(module).__name__ in kinds
    }
