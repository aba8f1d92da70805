"""A backbone with its language-model head, for training that predicts tokens on packed rows.

Shapes: T packed tokens, C rows, P predictions, D width, V vocabulary.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pipeline.config import ModelConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.limits import read_limits
from pipeline.model.backbones import quiet, read_config
from pipeline.model.encoder import Encoder, build_encoder
from pipeline.model.native import NATIVE_FORMS
from pipeline.model.weights import Placement, WeightFiles

_HEAD = "lm_head.weight"


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
                whole: Any = AutoModelForCausalLM.from_config(
                    self.model.config, trust_remote_code=False
                )
            setattr(whole, whole.base_model_prefix, self.model)
            whole.lm_head = self.lm_head
            whole.save_pretrained(folder, save_original_format=False)


def build_model(
    config: TrainConfig, *, meta: bool = False, placement: Placement | None = None
) -> Encoder:
    """The model of a run: an encoder, with a head where the objective predicts tokens.

    See `build_encoder` for the arguments.

    Raises:
        UserError: it cannot be loaded, or cannot be what the config asks for.
    """
    build = build_encoder if config.objective is None else build_language_model
    return build(config.model, meta=meta, placement=placement)


def build_language_model(
    config: ModelConfig, *, meta: bool = False, placement: Placement | None = None
) -> LanguageModel:
    """Load a backbone and its head, in evaluation mode.

    The head is trained where the backbone's own weights are; beside an adapter it stays as it is.

    Args:
        config: the model section.
        meta: build shapes only, on the meta device, without reading weights.
        placement: where the weights go; by default they stay whole, on the CPU.

    Raises:
        UserError: the model cannot be loaded, or has no plain head that predicts tokens.
    """
    placement = None if meta else placement or Placement()
    encoder = build_encoder(config, meta=meta, placement=placement)
    if not encoder.family.decoder:
        raise UserError(
            f"objective: {config.path} has no language-model head that this package reads",
            allowed="decoders of transformers, Dream, LLaDA, DiffuLLaMA",
            fix="train it contrastively, without objective",
        )
    head = _build_head(encoder, config, placement)
    if config.lora is not None or config.adapter_use == "continue":
        head.requires_grad_(False)
    return LanguageModel(encoder, head).eval()


def _build_head(encoder: Encoder, config: ModelConfig, placement: Placement | None) -> nn.Linear:
    """The token embedding again where the two are tied, otherwise the published head."""
    embedding = encoder.model.get_input_embeddings().weight
    vocabulary, width = getattr(embedding, "ds_shape", embedding.shape)  # whole, in partitions too
    head = nn.Linear(width, vocabulary, bias=False, dtype=embedding.dtype, device="meta")
    if encoder.model.config.tie_word_embeddings:
        head.weight = embedding
    elif placement is not None:
        with placement.agreed():
            if placement.reads:
                weight = _read_head(config, (vocabulary, width))
                weight = weight.to(placement.device, head.weight.dtype)
            else:
                weight = torch.empty_like(head.weight, device=placement.device)
            head.weight = nn.Parameter(weight)
        placement.take([head.weight])
    return head


def predicts_shifted(config: ModelConfig) -> bool:
    """Whether the model was made to predict a token from the hidden state before it."""
    native = NATIVE_FORMS.get(read_config(config)["model_type"])
    return native is None or native.shifted


def find_mask_token(config: ModelConfig, tokenizer: Any, name: str | None) -> int:
    """The id of the token that hides others.

    Args:
        name: the token itself; None for the one that tokenizer or model declare.

    Raises:
        UserError: there is none, or the model has no embedding for it.
    """
    published = read_config(config)
    if name is None:
        known = tokenizer.mask_token_id
        known = published.get("mask_token_id") if known is None else known
    else:
        known = tokenizer.get_vocab().get(name)
    if known is None:
        what = "has no mask token" if name is None else f"has no token {name!r}"
        raise UserError(
            f"objective: the tokenizer of {config.path} {what}",
            fix="set mask_token in the objective's section to a token of its vocabulary, such as _",
        )
    size = read_limits(config.path, config.revision).tokens
    if size is not None and known >= size:
        raise UserError(
            f"objective: the mask token of {config.path} is number {known}",
            allowed=f"below {size}, the tokens that the model knows",
            fix="set mask_token in the objective's section to one of them, such as _",
        )
    return int(known)


def _read_head(config: ModelConfig, shape: tuple[int, int]) -> Tensor:
    """The head's weight from the model's safetensors, under whatever name it was published."""
    native = NATIVE_FORMS.get(read_config(config)["model_type"])
    files = WeightFiles(config.path, config.revision)
    for name, found in files.shapes.items():
        if _native_name(name, native.keys if native else {}) == _HEAD:
            if tuple(found) != shape:
                raise UserError(
                    f"model.path: {config.path}: {name} has shape {tuple(found)}",
                    allowed=str(shape),
                )
            with files.slices([name]) as slices:
                weight: Tensor = slices[name][...]
            return weight
    raise UserError(
        f"model.path: the safetensors of {config.path} hold no {_HEAD}",
        fix="start from the language model, not from an embedder made of it",
    )


def _native_name(name: str, keys: dict[str, str]) -> str:
    for pattern, native in keys.items():
        name = re.sub(pattern, native, name)
    return name
