"""Train, read and merge peft adapters.

An adapter names the modules of the model that it was trained on. That is mostly a causal language
model or a classifier, in which a backbone has a name of its own (`model.layers.0...`); the backbone
here stands alone (`layers.0...`). `NamedBackbone` gives it that name back, so that every pattern of
the adapter's config means what it meant.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline import comm
from pipeline.config import LoraConfig
from pipeline.config.model import model_fix
from pipeline.errors import UserError, say_warning
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
