"""A model folder or hub name to a loaded Hugging Face backbone, without remote code."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import logging

from pipeline.config import ModelConfig
from pipeline.config.declared import model_fix, require_model_place
from pipeline.errors import UserError, blame
from pipeline.limits import embedding_rows
from pipeline.model.families import FAMILIES, Family
from pipeline.model.merging import Merge, plan_merge
from pipeline.model.native import NATIVE_FORMS, NativeForm
from pipeline.model.packing import PACKED
from pipeline.model.remote import REMOTE, PaddedModel, check_behaviour
from pipeline.model.rope import scale_rope
from pipeline.model.weights import Placement, WeightFiles, WeightReader, fill


def load_backbone(config: ModelConfig, *, placement: Placement | None) -> tuple[nn.Module, Family]:
    """Load weights, ready for packed rows; an adapter to merge is merged into them.

    Args:
        config: the model section.
        placement: where the weights go; without one, only shapes, on the meta device.

    Raises:
        UserError: nothing is there, the architecture is not supported, the attention cannot be
            what the config asks for, or weights are missing.
    """
    with placement.agreed() if placement else nullcontext():
        published = read_config(config)
        if config.trust_remote_code:
            model, family = _load_remote(config, placement), REMOTE
        else:
            native, hf_config, family = _resolve(config, published)
            if native is not None and native.keys:
                # DiffuGPT's config.json counts one token less than its embedding has rows.
                rows = embedding_rows(config.path, config.revision)
                hf_config.vocab_size = rows or hf_config.vocab_size
            model = _build_shapes(config, hf_config, family)
        merges = _plan_merges(config, model, placement)

    def finish(module: nn.Module) -> None:
        for merge in merges:
            merge(module)

    if config.trust_remote_code:
        for module in model.modules():
            finish(module)
    elif placement is not None:
        keys = native.keys if native else {}
        with quiet():
            fill(
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
    """One merge for each adapter, in order; one on the model that the earlier ones made."""

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
    """The transformers config that computes what the published one asks for."""
    if published["model_type"].startswith("diffusion_gemma"):
        raise UserError(
            f"model.path: {config.path} is a DiffusionGemma: a canvas that reads the key/value "
            "cache of a causal encoder, which no class of transformers loads by itself",
            allowed=", ".join(sorted({*NATIVE_FORMS, *FAMILIES})),
            fix="take Dream or LLaDA; an export of its text stack could not be loaded by others",
        )
    native = NATIVE_FORMS.get(published["model_type"])
    # Before transformers reads the config: to an unknown kind it would offer the folder's code.
    if native is None and published["model_type"] not in FAMILIES:
        raise _unknown_kind(config, published)
    with blame(f"model.path: the config.json of {config.path}", fix=model_fix(config.path)):
        hf_config = native.config(published) if native else _native_config(config)
    family = FAMILIES[hf_config.model_type]
    if getattr(hf_config, "use_bidirectional_attention", None):
        # Gemma 3 halves its window each time such a config is read, so a copy is another model.
        raise UserError(
            f"model.path: the config.json of {config.path} has use_bidirectional_attention",
            fix="remove that key; model.attention decides how the model attends",
        )
    if family.decoder:
        hf_config.is_causal = config.attention == "causal"
    elif config.attention == "causal":
        raise UserError(
            f"model.attention: causal, but {config.path} is an encoder ({hf_config.model_type})",
            allowed="bidirectional",
        )
    if config.rope_scaling is not None:
        scale_rope(hf_config, config.rope_scaling)
    hf_config.use_cache = False
    if config.attention_dropout is not None:
        setattr(hf_config, family.attention_dropout, config.attention_dropout)
    return native, hf_config, family


def _unknown_kind(config: ModelConfig, published: dict[str, Any]) -> UserError:
    """The error for a kind of model that this package does not know."""
    kind, inner = published["model_type"], published.get("text_config")
    inside = inner.get("model_type") if isinstance(inner, dict) else None
    if inside is not None:
        return UserError(
            f"model.path: {config.path} has model_type {kind!r}, which holds a text model of "
            f"model_type {inside!r} among others",
            allowed=", ".join(sorted({*NATIVE_FORMS, *FAMILIES})),
            fix="give a checkpoint of the text model alone: load the whole with transformers, and "
            "save_pretrained its language model and its tokenizer",
        )
    return UserError(
        f"model.path: {config.path} has model_type {kind!r}",
        allowed=", ".join(sorted({*NATIVE_FORMS, *FAMILIES})),
        fix="take a model of one of these kinds; any other one is loaded only by its own code, "
        "with model.trust_remote_code and model.revision",
    )


def _load_remote(config: ModelConfig, placement: Placement | None) -> nn.Module:
    """Load a model by its own code, at the revision that the config pins.

    Whole in every process: only that code knows its pieces, and it is probed before it is trusted.
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
        arguments = {"attention_dropout": config.attention_dropout}
        given = {key: value for key, value in arguments.items() if value is not None}
        inner = AutoModel.from_pretrained(
            config.path, dtype=dtype, **given, revision=config.revision, trust_remote_code=True
        )
    model = PaddedModel(inner)
    check_behaviour(model, config)
    return model.to(placement.device)


def read_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json as it was published.

    Raises:
        UserError: there is none, or it names no kind of model.
    """
    require_model_place(config.path, key="model.path")
    with blame(
        f"model.path: cannot read a config.json from {config.path!r}",
        allowed="a folder in Hugging Face layout, or a model name in the local cache",
        fix=model_fix(config.path),
    ):
        published, _ = PretrainedConfig.get_config_dict(config.path, revision=config.revision)
    if not isinstance(published.get("model_type"), str):
        raise UserError(
            f"model.path: the config.json of {config.path} names no model_type",
            fix=model_fix(config.path),
        )
    return dict(published)


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
    """No bars and reports of transformers: every rank loads, and what they would say is checked."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


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
