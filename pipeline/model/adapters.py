"""Add fresh peft adapters, continue trained ones, and merge them into weights.

    add_lora           freeze the backbone, add fresh LoRA layers
    continue_adapter   load an adapter folder, keep it as the only trainable part
    plan_merge         load an adapter folder, return a function that merges it module by module

An adapter names modules of the model that it was trained on, usually a causal language model or a
classifier that holds the backbone under a name (`model.layers.0...`). Here the backbone is the
whole model (`layers.0...`). `NamedBackbone` gives it the outer name again, so that every pattern in
the adapter's config keeps its meaning.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline import comm
from pipeline.config import LoraConfig, model_fix
from pipeline.errors import UserError, say_warning
from pipeline.model.weights import Placement

Merge = Callable[[nn.Module], None]
# The prefix of all names in peft's files.
_STEM = "base_model.model."
# The part of a name by which a layer of peft holds the layer that it adapts.
_BASE = ".base_layer."
# Keys of a LoRA config with which a layer computes more than its weights plus a matrix product.
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
    """Read an adapter, to be merged into a backbone as its weights are read.

    LoRA is merged layer by layer. Other kinds derive their start from the base weights, or replace
    some: for those, a process that reads weights holds the whole model in memory.

    Args:
        backbone: the model the adapter was trained on; not changed here.
        path: a folder or hub name with adapter_config.json.
        placement: where the backbone's weights go; None: shapes only.
        load_base: loads a second copy of the backbone with its weights, on the CPU.

    Returns:
        A function to call with each module of the backbone once its weights are read. It does
        nothing in a process that reads none.

    Raises:
        UserError: there is no adapter, it belongs to another model, or it cannot be merged.
    """
    if placement is None or not placement.reads:
        read_adapter_config(path)
        return lambda module: None
    files = read_adapter(backbone, path)
    if _only_adds(files):
        return _merge_by_layer(backbone, files, placement)
    # Some kinds draw random starts, which must not advance the run's generator.
    with torch.random.fork_rng(devices=[]):
        return _merge_whole(backbone, files, load_base())


def _only_adds(files: AdapterFiles) -> bool:
    """Return True if an adapter only adds products of matrices to the weights of layers."""
    config = files.config
    return (
        config.peft_type == peft.PeftType.LORA
        # Other starts, such as PiSSA, take a part out of the base weights.
        and config.init_lora_weights in (True, False, "gaussian")
        and not any(getattr(config, key, None) for key in _BEYOND_ADDING)
        # Trained biases and embeddings are in the file under other names.
        and all(".lora_" in name for name in files.weights)
    )


def _merge_by_layer(backbone: nn.Module, files: AdapterFiles, placement: Placement) -> Merge:
    tuners: dict[nn.Module, Any] = {}
    # By identity, because `attach` renames the backbone's own parameters.
    base = {id(parameter) for parameter in backbone.parameters()}
    adapted = files.attach(backbone)
    _allocate_adapter(adapted, base, placement.device)
    files.load(adapted)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):  # it holds the layer that it replaces
            tuners[module.get_base_layer()] = module
    # The backbone becomes plain again; `tuners` still hold its layers, whose weights are to come.
    adapted.unload()
    backbone.requires_grad_(True)  # peft froze it

    def merge(module: nn.Module) -> None:
        if module in tuners:
            tuners[module].merge()

    return merge


def _allocate_adapter(adapted: nn.Module, base: set[int], device: torch.device) -> None:
    """Allocate an adapter's own weights, which peft creates on the backbone's meta device."""
    for module in adapted.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in base:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))


def _merge_whole(backbone: nn.Module, files: AdapterFiles, base: nn.Module) -> Merge:
    adapted = files.attach(base)
    files.load(adapted)
    try:
        adapted.merge_and_unload()  # `base` is plain again, with other weights
    # peft has no error of its own for what it cannot merge.
    except (NotImplementedError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model.adapter: {files.path} ({files.config.peft_type.value}) cannot be merged into "
            f"weights: {reason}",
            allowed="adapters that peft can merge, such as LoRA",
        ) from error
    # Added tokens, for example, give the merged model rows that the backbone lacks.
    merged: dict[str, Tensor] = dict(base.named_parameters())
    if {name: value.shape for name, value in merged.items()} != {
        name: value.shape for name, value in backbone.named_parameters()
    }:
        raise UserError(
            f"model.adapter: {files.path} adds weights that the model does not have",
            fix="merge it into its model with peft and give that as model.path",
        )
    names = {module: name for name, module in backbone.named_modules()}

    def merge(module: nn.Module) -> None:
        with torch.no_grad():
            for attribute, parameter in module.named_parameters(recurse=False):
                # The name of the model itself is "".
                name = f"{names[module]}.{attribute}".removeprefix(".")
                parameter.copy_(merged.pop(name))  # frees the copy as the backbone fills

    return merge


# These learn no change of weights: virtual tokens, a route for each text, added states.
_UNMERGEABLE = ("ADAPTION_PROMPT", "LILY", "POLY", "SHADOW", "XLORA")
# Keys of a LoRA config that turn it on for some tokens or texts only. Without them, peft would
# silently leave such an adapter off.
_ON_FOR_SOME = ("alora_invocation_tokens", "arrow_config")
_MERGE_IT = "merge it into its model with peft, if it can do that, and give that as model.path"


class NamedBackbone(nn.Module):
    """A model that holds nothing but a backbone, under the name that it has in a larger model.

    Args:
        backbone: its modules become part of this one.
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
        self._inner = [backbone]  # in a list, so that torch does not register it twice

    def get_input_embeddings(self) -> Any:
        """Pass the request on to the backbone."""
        return self._inner[0].get_input_embeddings()  # type: ignore[operator]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFiles:
    """An adapter folder's contents, without the weights of heads that an embedder lacks.

    Attributes:
        path: the folder or hub name.
        config: made trainable, and without its task type.
        weights: by the names in the file.
        outer: the backbone's name in the model that the adapter was trained on; "" for itself.
    """

    path: str
    config: peft.PeftConfig
    weights: dict[str, Tensor]
    outer: str

    def attach(self, backbone: nn.Module) -> Any:
        """Put an empty adapter on the backbone, under its outer name if it has one.

        Raises:
            UserError: the adapter's layers do not exist, or are of another kind.
        """
        model = NamedBackbone(backbone, self.outer) if self.outer else backbone
        adapted = _put_adapter(model, self.config, self.path)
        if getattr(self.config, "lora_bias", False):
            self._require_biases(adapted)
        return adapted

    def _require_biases(self, adapted: nn.Module) -> None:
        """Refuse an adapter with biases for layers without one."""
        for name, module in adapted.named_modules():
            if isinstance(module, lora.Linear) and module.get_base_layer().bias is None:
                raise UserError(
                    f"model.adapter: {self.path} has a bias (lora_bias) for "
                    f"{name.removeprefix(_STEM)}, a layer without bias, so it cannot be merged",
                    allowed="lora_bias: true where every adapted layer has a bias",
                    fix="train the adapter with lora_bias: false",
                )

    def load(self, adapted: Any) -> None:
        """Load all weights or refuse them: peft would leave a missing one at its fresh value.

        Raises:
            UserError: weights are missing, left over or of another shape.
        """
        try:
            loaded = peft.set_peft_model_state_dict(adapted, dict(self.weights))
            # Without the base model's embedding, which peft adds where an adapter targets it.
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
        UserError: there is no adapter, or its kind does not change weights.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = peft.PeftConfig.from_pretrained(path)
    except Exception as error:  # a damaged file fails anywhere in peft's code
        raise UserError(
            f"model.adapter: cannot read an adapter from {path!r} ({_last_line(error)})",
            allowed="a folder with adapter_config.json and adapter_model.safetensors",
            fix=_inner_adapters(path),
        ) from error
    for warning in caught if comm.rank() == 0 else ():  # keys that this version of peft lacks
        say_warning(f"model.adapter: {path}: {str(warning.message).splitlines()[0]}")
    kind = str(config.peft_type).removeprefix("PeftType.")
    if chosen := [key for key in _ON_FOR_SOME if getattr(config, key, None)]:
        kind += f" with {chosen[0]}"
    mergeable = kind not in _UNMERGEABLE and not (config.is_prompt_learning or chosen)
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
    """Name adapters one folder below, where peft saves named ones and trainers checkpoints."""
    inner = sorted(str(file.parent) for file in Path(path).glob("*/adapter_config.json"))
    return f"give {' or '.join(inner[-2:])}" if inner else ""


def read_adapter(backbone: nn.Module, path: str, *, shapes_only: bool = False) -> AdapterFiles:
    """Read an adapter folder for a backbone.

    Args:
        backbone: the model that the adapter was trained on, or its part of it.
        path: a folder or hub name with adapter_config.json.
        shapes_only: a config is enough, as for planning before the weights are fetched.

    Raises:
        UserError: there is no adapter, its kind does not change weights, or it belongs to a model
            with other modules.
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
        # Whole copies of modules. A head's were left out above, and peft would not find the module.
        names = [f".{name}" for name, _ in backbone.named_modules()]
        own = [name for name in saved if any(known.endswith(f".{name}") for known in names)]
        config.modules_to_save = own or None
    config.inference_mode = False  # True in every saved adapter: peft would freeze its weights
    config.task_type = None  # otherwise peft would expect the head of that task
    kept = {name: value for name, value in weights.items() if name not in heads}
    return AdapterFiles(path=path, config=config, weights=kept, outer=outer)


def _outer_name(
    backbone: nn.Module, weights: dict[str, Tensor], path: str
) -> tuple[str, list[str]]:
    """Find the backbone's name in the model an adapter was trained on, and the weights of heads."""
    children = {name for name, _ in backbone.named_children()}
    outer, heads = set(), []
    for name in weights:
        if not name.startswith(_STEM):
            continue  # shared by all layers, so it names none
        parts = name.removeprefix(_STEM).split(".")
        # The parts before the backbone's first child are the backbone's own name.
        start = next((k for k, part in enumerate(parts) if part in children), None)
        if start is None:
            heads.append(name)
        else:
            outer.add(".".join(parts[:start]))
    if not outer and not heads:  # no weight names a layer; assume the usual whole model
        outer.add(str(backbone.base_model_prefix))
    if len(outer) != 1:
        raise UserError(
            f"model.adapter: {path} does not fit the model: it adapts "
            f"{', '.join(sorted(outer)) or 'none of its layers'}, unexpected {heads[:2]}",
            fix="give the adapter of this backbone",
        )
    return outer.pop(), heads


def _put_adapter(model: nn.Module, config: peft.PeftConfig, path: str | None = None) -> Any:
    """Put an adapter on a model; on the meta device if the model is there.

    Args:
        model: is changed in place.
        config: of the adapter.
        path: source of the config, for the message; None for a fresh adapter.

    Raises:
        UserError: the layers that the config names do not exist, or are of another kind.
    """
    # Otherwise peft would allocate real adapter weights for a model of shapes.
    shapes_only = next(model.parameters()).is_meta
    try:
        with warnings.catch_warnings(), _shaped(model):
            # peft reads properties that torch has renamed, and reports an adapter's source.
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


@contextmanager
def _shaped(model: nn.Module) -> Iterator[None]:
    """Give weights that ZeRO-3 has partitioned their shapes, as zeros that take no memory.

    Some kinds of adapters, such as DoRA, derive their fresh values from the weights they adapt. The
    values do not matter, because loading the adapter replaces them.
    """
    partitioned: Any = [p for p in model.parameters() if hasattr(p, "ds_shape")]
    kept = [parameter.data for parameter in partitioned]
    for parameter in partitioned:
        parameter.data = parameter.new_zeros(1).expand(parameter.ds_shape)
    try:
        yield
    finally:
        for parameter, data in zip(partitioned, kept, strict=True):
            parameter.data = data


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


# peft's word for every linear layer except the head.
ALL_LINEAR = "all-linear"
# Values of `init_lora_weights` that do not change the base weights.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def add_lora(backbone: nn.Module, config: LoraConfig) -> nn.Module:
    """Freeze the backbone and add fresh adapters to the linear layers named in the config.

    Raises:
        UserError: one of the named layers does not exist.
    """
    # peft ignores a name that matches no layer if another name matches one.
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
    adapted: nn.Module = _put_adapter(backbone, adapter)
    _fuse_sums(adapted)
    return adapted


class FusedLoraLinear(lora.Linear):  # type: ignore[misc]
    """peft's LoRA of a linear layer, whose sum is part of a matrix product.

        peft   x W' + s (dropout(x) A') B'    scaled and summed by kernels of their own: five passes
        here   y = x W';  y += s (h B')       one product that reads and writes y: two

    The passes are over (T, width of the output), which bounds a small rank's time on a GPU.
    Everything else about the layer is peft's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer: (..., in) to (..., out)."""
        # One adapter that is on, and that has this layer, which others may lack.
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = len(names) == 1 and not (args or kwargs or self.disable_adapters or self.merged)
        if not plain or names[0] in self.lora_variant:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        name = names[0]
        # (T, in), so that `out` is no view: autograd copies the gradient of a view that is changed.
        x_TD = x.flatten(0, -2)
        out = self.base_layer(x_TD)
        down, up = self.lora_A[name], self.lora_B[name]
        hidden = down(self.lora_dropout[name](self._cast_input_dtype(x_TD, down.weight.dtype)))
        if out.dtype == hidden.dtype == up.weight.dtype and up.bias is None:
            # In place: the backward of a linear layer does not read its output.
            out.addmm_(hidden, up.weight.t(), alpha=self.scaling[name])
        else:  # adapters in another type than the model, as peft makes them
            out = (out + up(hidden) * self.scaling[name]).to(out.dtype)
        return out.view(*x.shape[:-1], out.shape[-1])


def _fuse_sums(adapted: nn.Module) -> None:
    """Have the plain LoRA layers of a model that is trained compute as `FusedLoraLinear`."""
    for module in adapted.modules():
        # peft has built the layer by all its rules; only `forward` changes. Exact types, because a
        # subclass may compute something else, and GPT-2's Conv1D has transposed weights.
        if type(module) is lora.Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = FusedLoraLinear


def continue_adapter(backbone: nn.Module, path: str, *, meta: bool) -> nn.Module:
    """Put an adapter folder on the backbone, as the only part that stays trainable.

    With `meta` it has shapes only, and its weights need not be there.

    Raises:
        UserError: there is no adapter, it belongs to another model, or it changes base weights.
    """
    files = read_adapter(backbone, path, shapes_only=meta)
    # Copies of base weights, which peft stores where an adapter targets an embedding.
    weights = {name: value for name, value in files.weights.items() if _BASE not in name}
    files = dataclasses.replace(files, weights=weights)
    _check_continuable(files, {name for name, _ in backbone.named_parameters()})
    own = _on_backbone(files, backbone)
    adapted: nn.Module = own.attach(backbone)
    if not meta:
        own.load(adapted)
    _fuse_sums(adapted)
    return adapted


def _check_continuable(files: AdapterFiles, base_names: set[str]) -> None:
    config = files.config
    stem = f"{_STEM}{files.outer}." if files.outer else _STEM
    replaced = sorted({name.removeprefix(stem) for name in files.weights} & base_names)
    # With defaults, because kinds other than LoRA lack some of these keys.
    saved = getattr(config, "modules_to_save", None)
    bias = getattr(config, "bias", "none")
    start = getattr(config, "init_lora_weights", True)
    faults = {
        f"modules_to_save: {saved}": saved,
        f"bias: {bias}": bias != "none",
        f"a saved {' and '.join(replaced[:1])}": replaced,
        f"init_lora_weights: {start}": start not in _PLAIN_STARTS,
        # It cuts a part off the base weights.
        "kasa_config": getattr(config, "kasa_config", None),
        # It needs another loss.
        "monteclora_config": getattr(config, "monteclora_config", None),
    }
    for fault, holds in faults.items():
        if holds:
            raise UserError(
                f"model.adapter_use: continue, but {files.path} does more than add to the weights "
                f"of its model ({fault})",
                allowed="an adapter that only adds to them",
                fix="set adapter_use: merge, with a fresh model.lora on top",
            )


def _on_backbone(files: AdapterFiles, backbone: nn.Module) -> AdapterFiles:
    """Rename an adapter to the backbone's own names; its patterns become lists of names."""
    if not files.outer:
        return files
    # Patterns were written for outer names, and would match nothing, or something else, among inner
    # ones. So each is resolved with outer names here, and only the layers it found are kept.
    outer = f"{files.outer}."
    config = files.config
    modules = [name for name, _ in backbone.named_modules() if name]
    changes: dict[str, Any] = {}
    if getattr(config, "target_modules", None) not in (None, ALL_LINEAR):
        found = [name for name in modules if check_target_module_exists(config, outer + name)]
        changes |= {"target_modules": found}
        changes |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        if inner := getattr(config, "feedforward_modules", None):  # IA3: a part of the targets
            match = dataclasses.replace(config, target_modules=inner, feedforward_modules=None)
            part = [name for name in found if check_target_module_exists(match, outer + name)]
            changes |= {"feedforward_modules": part}
        for key, pattern in vars(config).items():
            if key.endswith("_pattern") and isinstance(pattern, dict) and pattern:
                # peft returns the name itself where no key matches it.
                hits = {name: get_pattern_key(pattern, outer + name) for name in found}
                changes[key] = {
                    f"^{name}": pattern[hit] for name, hit in hits.items() if hit in pattern
                }
    for key, value in changes.items():
        if hasattr(config, key):  # not every kind has them all
            setattr(config, key, value)
    weights = {
        name.replace(_STEM + outer, _STEM, 1): value for name, value in files.weights.items()
    }
    return dataclasses.replace(files, weights=weights, outer="")


def _linear_names(backbone: nn.Module) -> set[str]:
    """Return the last parts of the names of all linear layers."""
    kinds = ("Linear", "Conv1D")  # Conv1D is GPT-2's transposed linear layer
    return {
        name.rsplit(".", 1)[-1]
        for name, module in backbone.named_modules()
        if type(module).__name__ in kinds
    }
