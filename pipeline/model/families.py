"""How each family of Hugging Face models is taken apart: embedding, layers, final norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

LayerInputs = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The parts of a backbone, so that it can be run layer by layer on packed rows.

    Modules are called, never their weights read: under ZeRO-3 the call is what brings the weights.

    Attributes:
        embed: (model, (1, T) ids, (1, T) positions) -> (1, T, D) and each layer's keyword inputs.
        layers: model -> its blocks.
        finish: (model, (1, T, D)) -> (1, T, D), the final norm.
        decoder: whether the family has a causal mask, which can be kept or taken off.
        attention_dropout: the config key of the dropout on attention weights.
        arguments: constructor arguments that leave out heads an embedder has no use for.
    """

    embed: Callable[[Any, Tensor, Tensor], tuple[Tensor, LayerInputs]]
    layers: Callable[[Any], nn.ModuleList]
    finish: Callable[[Any, Tensor], Tensor]
    decoder: bool
    attention_dropout: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


def _embed_decoder(model: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, LayerInputs]:
    hidden = model.embed_tokens(ids)
    inputs = {
        "position_ids": positions,
        "position_embeddings": model.rotary_emb(hidden, positions),
    }
    return hidden, [inputs] * len(model.layers)


def _embed_gpt2(model: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, LayerInputs]:
    hidden = model.drop(model.wte(ids) + model.wpe(positions))
    return hidden, [{}] * len(model.h)


def _embed_bert(model: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, LayerInputs]:
    hidden = model.embeddings(input_ids=ids, position_ids=positions)
    return hidden, [{}] * len(model.encoder.layer)


def _embed_roberta(model: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, LayerInputs]:
    # RoBERTa counts positions from the one after the padding token's id.
    return _embed_bert(model, ids, positions + model.config.pad_token_id + 1)


def _embed_gemma3(model: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, LayerInputs]:
    hidden = model.embed_tokens(ids)
    return hidden, _rotary_by_kind(model, hidden, positions)


def _embed_modernbert(model: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, LayerInputs]:
    hidden = model.embeddings(input_ids=ids)
    return hidden, _rotary_by_kind(model, hidden, positions)


def _rotary_by_kind(model: Any, hidden: Tensor, positions: Tensor) -> LayerInputs:
    """Near-sighted and far-sighted layers turn at different speeds."""
    kinds = model.config.layer_types
    rotary = {kind: model.rotary_emb(hidden, positions, kind) for kind in sorted(set(kinds))}
    return [{"position_embeddings": rotary[kind]} for kind in kinds]


_DECODER = Family(
    embed=_embed_decoder,
    layers=lambda model: model.layers,
    finish=lambda model, hidden: model.norm(hidden),
    decoder=True,
    attention_dropout="attention_dropout",
)
_GPT2 = Family(
    embed=_embed_gpt2,
    layers=lambda model: model.h,
    finish=lambda model, hidden: model.ln_f(hidden),
    decoder=True,
    attention_dropout="attn_pdrop",
)
_BERT = Family(
    embed=_embed_bert,
    layers=lambda model: model.encoder.layer,
    finish=lambda model, hidden: hidden,
    decoder=False,
    attention_dropout="attention_probs_dropout_prob",
    arguments={"add_pooling_layer": False},
)
_MODERNBERT = Family(
    embed=_embed_modernbert,
    layers=lambda model: model.layers,
    finish=lambda model, hidden: model.final_norm(hidden),
    decoder=False,
    attention_dropout="attention_dropout",
)

# By `model_type` of config.json, after a diffusion model's config became its native equivalent.
FAMILIES: dict[str, Family] = {
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "llama": _DECODER,
    "mistral": _DECODER,
    "gemma": _DECODER,
    "gemma2": _DECODER,
    "gemma3_text": dataclasses.replace(_DECODER, embed=_embed_gemma3),
    "olmo2": _DECODER,
    "phi3": _DECODER,
    "smollm3": _DECODER,
    "gpt2": _GPT2,
    "bert": _BERT,
    "roberta": dataclasses.replace(_BERT, embed=_embed_roberta),
    "xlm-roberta": dataclasses.replace(_BERT, embed=_embed_roberta),
    "eurobert": dataclasses.replace(_DECODER, decoder=False),
    "modernbert": _MODERNBERT,
}
