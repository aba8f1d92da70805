"""A backbone with its language-model head, for training that predicts tokens on packed rows.

Shapes: T packed tokens, C rows, P predictions, D width, V vocabulary.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.hub import cached_file

from pipeline.config import ModelConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.model.backbones import quiet, read_config
from pipeline.model.encoder import Encoder, build_encoder
from pipeline.model.native import NATIVE_FORMS

_HEAD = "lm_head.weight"
_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"


class LanguageModel(Encoder):
    """An encoder that also says which token comes where.

    Args:
        encoder: the packed encoder, whose parts this model takes over.
        head: (D -> V) without bias; its weight may be the token embedding's.
    """

    def __init__(self, encoder: Encoder, head: nn.Linear) -> None:
        super().__init__(encoder.backbone, encoder.family, encoder.config)
        self.lm_head = head

    def logits(self, hidden: Tensor) -> Tensor:
        """(P, D) hidden states to (P, V) float32 scores of tokens."""
        scores: Tensor = self.lm_head(hidden).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)  # Gemma 2
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def save_backbone(self, folder: Path) -> None:
        """Write a causal language model of transformers; adapters are merged, for good.

        Its backbone loads alone as well, and further training of either kind can begin from it.
        """
        self.merge_adapters()
        with quiet():
            with torch.device("meta"):
                whole: Any = AutoModelForCausalLM.from_config(self.model.config)
            setattr(whole, whole.base_model_prefix, self.model)
            whole.lm_head = self.lm_head
            whole.save_pretrained(folder, save_original_format=False)


def build_model(config: TrainConfig, *, meta: bool = False) -> Encoder:
    """The model of a run: an encoder, with a head where the objective predicts tokens.

    Raises:
        UserError: it cannot be loaded, or cannot be what the config asks for.
    """
    build = build_encoder if config.objective is None else build_language_model
    return build(config.model, meta=meta)


def build_language_model(config: ModelConfig, *, meta: bool = False) -> LanguageModel:
    """Load a backbone and its head, in evaluation mode.

    The head is trained where the backbone's own weights are; beside an adapter it stays as it is.

    Args:
        config: the model section.
        meta: build shapes only, on the meta device, without reading weights.

    Raises:
        UserError: the model cannot be loaded, or has no plain head that predicts tokens.
    """
    encoder = build_encoder(config, meta=meta)
    if not encoder.family.decoder:
        raise UserError(
            f"objective: {config.path} has no language-model head that this package reads",
            allowed="decoders of transformers, Dream, LLaDA, DiffuLLaMA",
            fix="train it contrastively, without objective",
        )
    embedding = encoder.model.get_input_embeddings().weight
    vocabulary, width = embedding.shape
    head = nn.Linear(width, vocabulary, bias=False, dtype=embedding.dtype, device="meta")
    if encoder.model.config.tie_word_embeddings:
        head.weight = embedding
    elif not meta:
        head.weight = nn.Parameter(_read_head(config, (vocabulary, width)).to(embedding.dtype))
    if config.lora is not None or config.adapter_use == "continue":
        head.requires_grad_(False)
    return LanguageModel(encoder, head).eval()


def predicts_shifted(config: ModelConfig) -> bool:
    """Whether the model was made to predict a token from the hidden state before it."""
    native = NATIVE_FORMS.get(read_config(config)["model_type"])
    return native is None or native.shifted


def find_mask_token(config: ModelConfig, tokenizer: Any, name: str | None) -> int:
    """The id of the token that hides others.

    Args:
        name: the token itself; None for the one that tokenizer or model declare.

    Raises:
        UserError: there is none.
    """
    if name is None:
        known = tokenizer.mask_token_id
        known = read_config(config).get("mask_token_id") if known is None else known
    else:
        known = tokenizer.get_vocab().get(name)
    if known is None:
        what = "has no mask token" if name is None else f"has no token {name!r}"
        raise UserError(
            f"objective: the tokenizer of {config.path} {what}",
            fix="set mask_token in the objective's section to a token of its vocabulary, such as _",
        )
    return int(known)


def _read_head(config: ModelConfig, shape: tuple[int, int]) -> Tensor:
    """The head's weight from the model's safetensors, under whatever name it was published."""
    native = NATIVE_FORMS.get(read_config(config)["model_type"])
    for file in _weight_files(config):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- not a mapping
                if _native_name(name, native.keys if native else {}) == _HEAD:
                    weight: Tensor = tensors.get_tensor(name)
                    if tuple(weight.shape) != shape:
                        raise UserError(
                            f"{file}: {name} has shape {tuple(weight.shape)}", allowed=str(shape)
                        )
                    return weight
    raise UserError(
        f"model.path: the safetensors of {config.path} hold no {_HEAD}",
        fix="start from the language model, not from an embedder made of it",
    )


def _native_name(name: str, keys: dict[str, str]) -> str:
    for pattern, native in keys.items():
        name = re.sub(pattern, native, name)
    return name


def _weight_files(config: ModelConfig) -> list[str]:
    """The files that may hold the head, those that the index names for it first."""

    def find(name: str) -> str | None:
        path: str | None = cached_file(
            config.path,
            name,
            revision=config.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return path

    index = find(_INDEX)
    if index is None:
        return [file for file in [find(_WEIGHTS)] if file is not None]
    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [file for file in map(find, names) if file is not None]
