"""Adapter folders of peft: what they hold, and the names by which they know a backbone.

An adapter names the modules of the model that it was trained on. That is mostly a causal language
model or a classifier, in which a backbone has a name of its own (`model.layers.0...`); the backbone
here stands alone (`layers.0...`). `NamedBackbone` gives it that name back, so that every pattern of
the adapter's config means what it meant.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline import comm
from pipeline.config.declared import model_fix
from pipeline.errors import UserError, say_warning

_STEM = "base_model.model."
# What these learn is no change of weights: virtual tokens, a route for each text, added states.
_UNMERGEABLE = ("ADAPTION_PROMPT", "LILY", "POLY", "SHADOW", "XLORA")
_MERGE_IT = "merge it into its model with peft, if it can do that, and give that as model.path"


class NamedBackbone(nn.Module):
    """A backbone as part of a model without anything else, under its name there.

    Args:
        backbone: its modules become part of this one, and stay part of it.
        name: dotted, such as `model`.
    """

    def __init__(self, backbone: nn.Module, name: str) -> None:
        super().__init__()
        self.config = backbone.config
        holder: nn.Module = self
        *outer, last = name.split(".")
        for part in outer:
            inner = nn.Module()
            holder.add_module(part, inner)
            holder = inner
        holder.add_module(last, backbone)
        self._inner = [backbone]  # in a list, lest it be a second name

    def get_input_embeddings(self) -> Any:
        """Hand the request to the backbone."""
        return self._inner[0].get_input_embeddings()  # type: ignore[operator]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFiles:
    """An adapter folder's contents, without what belongs to heads that an embedder lacks.

    Attributes:
        path: the folder or hub name.
        config: made trainable, and free of the kind of task.
        weights: by the names in the file.
        outer: the backbone's name in the model that the adapter was trained on; "" for itself.
    """

    path: str
    config: peft.PeftConfig
    weights: dict[str, Tensor]
    outer: str

    def attach(self, backbone: nn.Module) -> Any:
        """Put an empty adapter on the backbone, in its outer name if it has one.

        Raises:
            UserError: the adapter's layers are not there, or are of another kind.
        """
        model = NamedBackbone(backbone, self.outer) if self.outer else backbone
        return attach(model, self.config, self.path)

    def load(self, adapted: Any) -> None:
        """Load all weights or refuse them: peft leaves what does not fit at its fresh value.

        Raises:
            UserError: weights are missing, left over or of another shape.
        """
        try:
            loaded = peft.set_peft_model_state_dict(adapted, dict(self.weights))
            own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"model.adapter: {self.path} does not fit the model: {_last_line(error)}",
                fix=f"give the adapter of this backbone; of one with added tokens, {_MERGE_IT}",
            ) from error
        missing = sorted(set(own) - set(self.weights))
        left_over = list(loaded.unexpected_keys)
        if missing or left_over:
            raise UserError(
                f"model.adapter: {self.path} does not fit the model: missing {missing[:2]}, "
                f"unexpected {left_over[:2]}",
                fix="give the adapter of this backbone",
            )


def read_adapter_config(path: str) -> peft.PeftConfig:
    """Read the config of an adapter folder.

    Raises:
        UserError: no adapter is there, or one of a kind that is no change of weights.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = peft.PeftConfig.from_pretrained(path)
    except Exception as error:  # whatever a damaged file makes of peft's code
        raise UserError(
            f"model.adapter: cannot read an adapter from {path!r} ({_last_line(error)})",
            allowed="a folder with adapter_config.json and adapter_model.safetensors",
            fix=_inner_adapters(path),
        ) from error
    for warning in caught:  # keys that this version of peft does not know
        say_warning(f"model.adapter: {path}: {str(warning.message).splitlines()[0]}")
    kind = str(config.peft_type).removeprefix("PeftType.")
    mergeable = kind not in _UNMERGEABLE and not config.is_prompt_learning
    if not mergeable or config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise UserError(
            f"model.adapter: {path} is {kind}, which cannot be merged into the weights of a model",
            allowed="adapters that change weights, such as LoRA",
        )
    if getattr(config, "layer_replication", None):
        raise UserError(
            f"model.adapter: {path} repeats layers of its model (layer_replication)", fix=_MERGE_IT
        )
    return config


def _inner_adapters(path: str) -> str:
    """Name adapters one folder below: peft saves named ones there, trainers their checkpoints."""
    inner = sorted(str(file.parent) for file in Path(path).glob("*/adapter_config.json"))
    return f"give {' or '.join(inner[-2:])}" if inner else ""


def read_adapter(backbone: nn.Module, path: str, *, shapes_only: bool = False) -> AdapterFiles:
    """Read an adapter folder for a backbone.

    Args:
        shapes_only: a config is enough, as for a plan where weights are not here yet.

    Raises:
        UserError: no adapter is there, one of a kind that is no change of weights, or one of a
            model with other modules.
    """
    config = read_adapter_config(path)
    weights: dict[str, Tensor] = {}
    try:
        weights = peft.load_peft_weights(path, device="cpu")
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        if not shapes_only:
            raise UserError(
                f"model.adapter: cannot read the weights of {path!r} ({_last_line(error)})",
                allowed="adapter_model.safetensors as peft writes it",
                fix=model_fix(path),
            ) from error
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"model.adapter: {path}: {name} holds NaN or infinity",
                fix="take an earlier checkpoint of the adapter",
            )
    outer, heads = _outer_name(backbone, weights, path)
    if heads and comm.rank() == 0:
        say_warning(
            f"model.adapter: {path}: tensors outside of the backbone are not used "
            f"({len(heads)}, such as {heads[0]})"
        )
    saved = getattr(config, "modules_to_save", None)
    if saved:
        names = [f".{name}" for name, _ in backbone.named_modules()]
        own = [name for name in saved if any(known.endswith(f".{name}") for known in names)]
        config.modules_to_save = own or None
    config.inference_mode = False
    config.task_type = None  # peft would wrap a backbone as the head that the task needs
    kept = {name: value for name, value in weights.items() if name not in heads}
    return AdapterFiles(path=path, config=config, weights=kept, outer=outer)


def _outer_name(
    backbone: nn.Module, weights: dict[str, Tensor], path: str
) -> tuple[str, list[str]]:
    """The backbone's name in the model that an adapter was trained on, and weights of its heads."""
    children = {name for name, _ in backbone.named_children()}
    outer, heads = set(), []
    for name in weights:
        if not name.startswith(_STEM):  # shared by all layers
            continue
        parts = name.removeprefix(_STEM).split(".")
        start = next((k for k, part in enumerate(parts) if part in children), None)
        if start is None:
            heads.append(name)
        else:
            outer.add(".".join(parts[:start]))
    if not outer and not heads:  # none of them names a layer; most are made on whole models
        outer.add(str(backbone.base_model_prefix))
    if len(outer) != 1:
        raise UserError(
            f"model.adapter: {path} does not fit the model: it adapts "
            f"{', '.join(sorted(outer)) or 'none of its layers'}, unexpected {heads[:2]}",
            fix="give the adapter of this backbone",
        )
    return outer.pop(), heads


def attach(model: nn.Module, config: peft.PeftConfig, path: str | None = None) -> Any:
    """Put an adapter on a model; only as shapes where the model has only shapes.

    Args:
        path: where the config comes from, for the message; None for a fresh adapter.

    Raises:
        UserError: the layers that the config names are not there, or of another kind.
    """
    shapes_only = next(model.parameters()).is_meta
    try:
        with warnings.catch_warnings():
            # peft asks for renamed properties, and notes where an adapter came from.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            return peft.get_peft_model(model, config, low_cpu_mem_usage=shapes_only)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError) as error:
        if path is None:
            raise
        raise UserError(
            f"model.adapter: {path} ({config.peft_type.value}) cannot be put on this model: "
            + _last_line(error),
            fix=f"give the adapter of this backbone, or {_MERGE_IT}",
        ) from error


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
