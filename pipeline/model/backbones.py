"""Load a Hugging Face backbone from a folder or hub name, ready for packed rows.

    config.json -> native config -> shapes on the meta device -> weights, piece by piece
                                                    adapters are merged into each piece as it comes

A model with its own code (`trust_remote_code`, at a pinned revision) has no family here. It runs
padded behind the interface of a packed model, as one block (`PaddedModel`), and is probed first:
its attention must be as configured, and padding must not change a vector.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import logging

from pipeline.config import MODEL_PATHS, ModelConfig, model_fix, require_model_path
from pipeline.errors import UserError, blame
from pipeline.model.adapters import Merge, plan_merge
from pipeline.model.architectures import (
    FAMILIES,
    NATIVE_FORMS,
    Family,
    LayerInputs,
    NativeForm,
    known_kinds,
    scale_rope,
)
from pipeline.model.attention import PACKED, PackedRows
from pipeline.model.weights import Placement, WeightFiles, WeightReader, load_weights
from pipeline.model_limits import embedding_rows


def load_backbone(config: ModelConfig, *, placement: Placement | None) -> tuple[nn.Module, Family]:
    """Load a backbone and merge the adapters that the config merges.

    Args:
        config: the model section.
        placement: where the weights go; None: shapes only, on the meta device.

    Raises:
        UserError: there is no model, its architecture is not supported, its attention cannot be as
            configured, or weights are missing.
    """
    with placement.together() if placement else nullcontext():
        published = read_config(config)
        if config.trust_remote_code:
            model, family = _load_remote(config, placement), _REMOTE
        else:
            native, hf_config, family = _resolve(config, published)
            if native is not None and native.keys:
                # The vocab_size of DiffuGPT's config.json is one less than the rows it has.
                rows = embedding_rows(config.path, config.revision)
                hf_config.vocab_size = rows or hf_config.vocab_size
            model = _build_shapes(config, hf_config, family)
        merges = _plan_merges(config, model, placement)

    def finish(module: nn.Module) -> None:
        for merge in merges:
            merge(module)

    if config.trust_remote_code:
        for module in model.modules():  # its own code has read the weights already
            finish(module)
    elif placement is not None:
        keys = native.keys if native else {}
        with quiet():
            load_weights(
                model,
                layers=family.layers(model),
                open_reader=lambda: WeightReader(
                    model, WeightFiles(config.path, config.revision), keys, placement.device
                ),
                placement=placement,
                finish=finish,
            )
    return model, family


def _plan_merges(config: ModelConfig, model: nn.Module, placement: Placement | None) -> list[Merge]:
    """Return one merge for each adapter; each expects the model with all earlier ones merged."""

    # Called only for adapters that cannot be merged layer by layer: it reads the model again.
    def load_base(count: int) -> nn.Module:
        earlier = config.all_merged[:count]
        base = dataclasses.replace(
            config, lora=None, adapter=None, adapter_use="merge", merged_adapters=earlier
        )
        return load_backbone(base, placement=Placement())[0]

    return [
        plan_merge(model, path, placement, load_base=functools.partial(load_base, number))
        for number, path in enumerate(config.all_merged)
    ]


def _resolve(
    config: ModelConfig, published: dict[str, Any]
) -> tuple[NativeForm | None, PretrainedConfig, Family]:
    """Return the native form, if any, the native config under our config's settings, the family."""
    if published["model_type"].startswith("diffusion_gemma"):
        raise UserError(
            f"model.path: {config.path} is a DiffusionGemma: a canvas that reads the key/value "
            "cache of a causal encoder, and no class of transformers loads its text stack alone",
            allowed=", ".join(known_kinds()),
            fix="take Dream or LLaDA; an export of its text stack could not be loaded by others",
        )
    native = NATIVE_FORMS.get(published["model_type"])
    # Before transformers reads the config: for an unknown kind it would offer to run its code.
    if native is None and published["model_type"] not in FAMILIES:
        raise _unknown_kind(config, published)
    with blame(f"model.path: the config.json of {config.path}", fix=model_fix(config.path)):
        hf_config = native.config(published) if native else _native_config(config)
    family = FAMILIES[hf_config.model_type]
    if getattr(hf_config, "use_bidirectional_attention", None):
        # Reading such a config halves Gemma 3's window, and not every version of transformers
        # undoes that when it saves: a copy could be another model.
        raise UserError(
            f"model.path: the config.json of {config.path} has use_bidirectional_attention",
            fix="remove that key; model.attention decides how the model attends",
        )
    if family.decoder:
        # For transformers, which reads it from the config.json of an export; here
        # `PackedRows.causal` decides.
        hf_config.is_causal = config.attention == "causal"
    elif config.attention == "causal":
        raise UserError(
            f"model.attention: causal, but {config.path} is an encoder ({hf_config.model_type})",
            allowed="bidirectional",
        )
    if config.rope_scaling is not None:
        scale_rope(hf_config, config.rope_scaling)
    hf_config.use_cache = False  # a text is read once; a key/value cache would only take memory
    if config.attention_dropout is not None:
        setattr(hf_config, family.attention_dropout, config.attention_dropout)
    return native, hf_config, family


def _unknown_kind(config: ModelConfig, published: dict[str, Any]) -> UserError:
    """Return the error for an unknown kind of model; it names a text model inside, if any."""
    kind, inner = published["model_type"], published.get("text_config")
    inside = inner.get("model_type") if isinstance(inner, dict) else None
    if inside is not None:
        return UserError(
            f"model.path: {config.path} has model_type {kind!r}, which holds a text model of "
            f"model_type {inside!r} among others",
            allowed=", ".join(known_kinds()),
            fix="give a checkpoint of the text model alone: load the whole with transformers, and "
            "save_pretrained its language model and its tokenizer",
        )
    return UserError(
        f"model.path: {config.path} has model_type {kind!r}",
        allowed=", ".join(known_kinds()),
        fix="take a model of one of these kinds; any other one is loaded only by its own code, "
        "with model.trust_remote_code and model.revision",
    )


def _build_shapes(config: ModelConfig, hf_config: PretrainedConfig, family: Family) -> nn.Module:
    arguments = {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": PACKED,
        **family.arguments,
    }
    found = f"model.path: the config.json of {config.path} describes no model"
    with blame(found, fix=model_fix(config.path)), torch.device("meta"):
        shapes: nn.Module = AutoModel.from_config(hf_config, trust_remote_code=False, **arguments)
    return shapes


def read_config(config: ModelConfig) -> dict[str, Any]:
    """Read config.json as it was published.

    Raises:
        UserError: it is missing or damaged, names no kind of model, or describes quantized weights.
    """
    require_model_path(config.path, key="model.path")
    with blame(
        f"model.path: cannot read a config.json from {config.path!r}",
        allowed=MODEL_PATHS,
        fix=model_fix(config.path),
    ):
        # Not AutoConfig: for an unknown model_type it would look for code in the folder.
        published, _ = PretrainedConfig.get_config_dict(config.path, revision=config.revision)
    # A JSON text or list has no keys at all.
    if not isinstance(published, dict) or not isinstance(published.get("model_type"), str):
        raise UserError(
            f"model.path: the config.json of {config.path} names no model_type",
            fix=model_fix(config.path),
        )
    for key in ("quantization_config", "compression_config"):
        if found := published.get(key):
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise UserError(
                f"model.path: {config.path} has {key}: quantized weights ({method or 'unknown'})",
                allowed="weights in float32, bfloat16 or float16",
                fix="give the model that was quantized, or save what `dequantize()` of "
                "transformers returns",
            )
    return dict(published)


def has_other_names(config: ModelConfig) -> bool:
    """Return True for published weights under names that the class of their kind does not know.

    DiffuLLaMA's and DiffuGPT's are; transformers would load such a model with random weights.
    """
    native = NATIVE_FORMS.get(read_config(config)["model_type"])
    if native is None or not native.keys:
        return False
    names = WeightFiles(config.path, config.revision).shapes
    return any(re.search(pattern, name) for pattern in native.keys for name in names)


def _native_config(config: ModelConfig) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=False
        )
    except ValueError as error:
        raise UserError(
            f"model.path: {config.path}: {str(error).splitlines()[0]}", allowed=", ".join(FAMILIES)
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers: every rank would print, and our own checks cover its reports."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load_remote(config: ModelConfig, placement: Placement | None) -> nn.Module:
    """Load a model by its own code, at the revision that the config pins.

    It is whole in every process, because only that code knows its pieces.
    """
    if config.rope_scaling is not None:
        raise UserError(
            f"model.rope_scaling: the code of {config.path} decides about its positions",
            fix="remove model.rope_scaling",
        )
    dtype = getattr(torch, config.dtype)
    with quiet():
        if placement is None:
            hf_config = AutoConfig.from_pretrained(
                config.path, revision=config.revision, trust_remote_code=True
            )
            with torch.device("meta"):
                inner = AutoModel.from_config(hf_config, dtype=dtype, trust_remote_code=True)
            return PaddedModel(inner)
        # Not None: that would replace the value in the model's config.json.
        dropout = config.attention_dropout
        given = {} if dropout is None else {"attention_dropout": dropout}
        inner = AutoModel.from_pretrained(
            config.path, dtype=dtype, **given, revision=config.revision, trust_remote_code=True
        )
    model = PaddedModel(inner)
    _check_behaviour(model, config)
    return model.to(placement.device)


class PaddedModel(nn.Module):
    """A model with its own code behind the interface of a packed one: embedding and one block."""

    # Read for an adapter whose weights name no layer: no larger model holds this one under a name.
    base_model_prefix = ""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.config = inner.config
        self.layers = nn.ModuleList([_PaddedBlock(inner)])

    def gradient_checkpointing_enable(self, arguments: dict[str, Any]) -> None:
        """Pass the request on to the model's own code."""
        self.layers[0].inner.gradient_checkpointing_enable(arguments)  # type: ignore[operator, union-attr]


class _PaddedBlock(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, *, attention_mask: None, rows: PackedRows) -> Tensor:
        """Run (1, T, D) input embeddings as (C, L, D), and return (1, T, D) last hidden states."""
        padded = pad_sequence(list(torch.split(hidden[0], rows.sizes)), batch_first=True)
        columns = torch.arange(rows.longest, device=hidden.device)
        mask = columns < rows.lengths[:, None]  # (C, L)
        # (C, L, D)[mask] is (T, D), row after row, as it came.
        packed: Tensor = _last_states(self.inner, padded, mask)[mask].unsqueeze(0)
        return packed


def _last_states(inner: Any, embedded: Tensor, mask: Tensor) -> Tensor:
    """Return (C, L, D) last hidden states of embeddings under a (C, L) mask of real tokens.

    Raises:
        UserError: the model returns something else.
    """
    out = inner(inputs_embeds=embedded, attention_mask=mask.long())
    states: Tensor | None = getattr(out, "last_hidden_state", None)
    if states is None:
        raise UserError(
            "model.path: its code returns no last_hidden_state",
            fix="point AutoModel in its auto_map at the backbone, not at a head",
        )
    return states


def _embed(model: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, LayerInputs]:
    return model.layers[0].inner.get_input_embeddings()(ids), [{}]


_REMOTE = Family(
    embed=_embed,
    layers=lambda model: model.layers,
    finish=lambda model, hidden: hidden,
    decoder=True,
    attention_dropout="attention_dropout",
)


def _check_behaviour(model: PaddedModel, config: ModelConfig) -> None:
    """Probe a model's own code with three forwards of a few tokens.

    Raises:
        UserError: its attention is not as configured, or a vector depends on padding.
    """
    inner: Any = model.layers[0].inner
    inner.eval()  # dropout would look like a leak
    ids = torch.arange(1, 9)[None]
    # Padding with real embeddings, not zeros, so that attention to it would show.
    real = torch.tensor([[True] * 5 + [False] * 3])
    with torch.no_grad():
        embedded = inner.get_input_embeddings()(ids)
        alone = _last_states(inner, embedded[:, :5], real[:, :5]).float()
        padded = _last_states(inner, embedded, real)[:, :5].float()
        longer = _last_states(inner, embedded, torch.ones_like(real))[:, :5].float()
    # Far above the rounding of the dtype, far below the effect of an attended token.
    noise = (1e-4 if config.dtype == "float32" else 3e-2) * alone.abs().max()
    if (alone - padded).abs().max() > noise:
        raise UserError(
            f"model.path: in the code of {config.path} padding changes the vectors of a text",
            fix="correct its attention mask; a vector would depend on the other texts of its batch",
        )
    # Three more real tokens after the text move its states only without a causal mask.
    attends = "bidirectional" if (alone - longer).abs().max() > noise else "causal"
    if attends != config.attention:
        raise UserError(
            f"model.attention: {config.attention}, but the code of {config.path} is {attends}",
            allowed=attends,
        )


def unused_weights(model: Any, family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights, by native name, that a complete `model` would have in addition.

    They are the pooler of BERT-like models: the base model's, or zeros where the base has none.
    Without them every load of an export would warn of missing weights.
    """
    left_out = _left_out(model, family, config)
    found = {name: torch.zeros(shape, dtype=model.dtype) for name, (shape, _) in left_out.items()}
    sources = {name: source for name, (_, source) in left_out.items() if source is not None}
    if sources:
        with WeightFiles(config.path, config.revision).slices(list(sources.values())) as slices:
            for name, source in sources.items():
                found[name] = slices[source][:].to(model.dtype)
    return found


def unused_names(model: Any, family: Family, config: ModelConfig) -> list[str]:
    """Return the names of the `unused_weights` that the base model has."""
    left_out = _left_out(model, family, config)
    return [name for name, (_, source) in left_out.items() if source is not None]


def _left_out(
    model: Any, family: Family, config: ModelConfig
) -> dict[str, tuple[torch.Size, str | None]]:
    """Return the shape of each unused weight, and its name in the base model's files."""
    if not family.arguments:
        return {}  # the family leaves nothing out, and the base's files may be gone by now
    files = WeightFiles(config.path, config.revision)
    with torch.device("meta"):
        whole = AutoModel.from_config(model.config, trust_remote_code=False)
    shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
    found = {}
    for name in shapes.keys() - model.state_dict().keys():
        # The base may be a backbone alone, or one inside a model with a head.
        published = [name, f"{whole.base_model_prefix}.{name}"]
        source = next((key for key in published if files.shapes.get(key) == shapes[name]), None)
        found[name] = shapes[name], source
    return found
