"""Supported architectures: how a model is taken apart, and which published layouts become native.

A family names the modules of transformers that an encoder calls one after another:

    model_type                              embed                     blocks         last
    qwen2 qwen3 llama mistral gemma gemma2  embed_tokens, rotary_emb  layers         norm
      olmo2 phi3 smollm3, eurobert (an encoder), gemma3_text (rotary_emb by layer type)
    gpt2                                    wte + wpe, drop           h              ln_f
    bert roberta xlm-roberta                embeddings                encoder.layer  -
    modernbert                              embeddings, rotary_emb    layers         final_norm

A published layout with other names is read as the transformers model that computes the same:

    published            model_type  native config   renamed weights
    Dream                Dream       Qwen2Config     none
    LLaDA                llada       LlamaConfig     all: model.transformer.blocks.N.* -> layers.N.*
    DiffuLLaMA           llama       LlamaConfig     denoise_model.* -> *
    DiffuGPT             gpt2        GPT2Config      denoise_model.* -> *, embed_tokens -> wte
    Gemma 3 with images  gemma3      its text part   language_model.* -> *, the rest is left out
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Gemma3Config, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from pipeline.config import RopeScaling
from pipeline.errors import UserError

LayerInputs = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The parts of a backbone, so that it can be run layer by layer on packed rows.

    Modules are called, and their weights never read directly: under ZeRO-3 it is the call that
    gathers the weights.

    Attributes:
        embed: (model, (1, T) ids, (1, T) positions) -> (1, T, D) and each layer's keyword inputs.
        layers: model -> its blocks.
        finish: (model, (1, T, D)) -> (1, T, D), the final norm.
        decoder: whether the family has a causal mask, which can be kept or taken off.
        attention_dropout: the config key of the dropout on attention weights.
        arguments: constructor arguments that leave out heads that an embedder does not use.
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
    # Learned positions are added here, so the layers need none.
    hidden = model.drop(model.wte(ids) + model.wpe(positions))
    return hidden, [{}] * len(model.h)


def _embed_bert(model: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, LayerInputs]:
    hidden = model.embeddings(input_ids=ids, position_ids=positions)
    return hidden, [{}] * len(model.encoder.layer)


def _embed_roberta(model: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, LayerInputs]:
    # RoBERTa numbers positions from the one after the padding token's id.
    return _embed_bert(model, ids, positions + model.config.pad_token_id + 1)


def _embed_gemma3(model: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, LayerInputs]:
    hidden = model.embed_tokens(ids)
    return hidden, _rotary_by_layer_type(model, hidden, positions)


def _embed_modernbert(model: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, LayerInputs]:
    hidden = model.embeddings(input_ids=ids)
    return hidden, _rotary_by_layer_type(model, hidden, positions)


def _rotary_by_layer_type(model: Any, hidden: Tensor, positions: Tensor) -> LayerInputs:
    """Return rotary positions for each layer: layers with a window have another base."""
    types = model.config.layer_types
    rotary = {kind: model.rotary_emb(hidden, positions, kind) for kind in sorted(set(types))}
    return [{"position_embeddings": rotary[kind]} for kind in types]


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
# By `model_type` of the native config.
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NativeForm:
    """The native equivalent of a published layout.

    Attributes:
        config: the published config.json -> the native config.
        keys: regular expressions over weight names -> their native names.
        shifted: True if a token is predicted from the hidden state before it, otherwise from its
            own.
    """

    config: Callable[[dict[str, Any]], PretrainedConfig]
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    shifted: bool = True


def _dream_config(published: dict[str, Any]) -> PretrainedConfig:
    """Return Dream's config as Qwen2's: same arithmetic, same weight names (arXiv 2508.15487)."""
    # These describe Dream's own code; all other keys have Qwen2's names.
    dropped = ("architectures", "auto_map", "model_type", "transformers_version")
    return Qwen2Config(**{k: v for k, v in published.items() if k not in dropped})


# The values with which LLaDA's blocks are Llama's; an absent key has the same meaning.
_LLADA_IS_LLAMA = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "rope": True,
    "alibi": False,
    "input_emb_norm": False,
    "multi_query_attention": None,
    "scale_logits": False,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
}


def _llada_config(published: dict[str, Any]) -> PretrainedConfig:
    """Return LLaDA's config as Llama's: it has OLMo's names and no causal mask (arXiv 2502.09992).

    Raises:
        UserError: this variant uses a feature that Llama does not have.
    """
    for key, wanted in _LLADA_IS_LLAMA.items():
        if published.get(key, wanted) not in (wanted, None):
            raise UserError(
                f"config.json: {key}: {published[key]!r} in a LLaDA model", allowed=repr(wanted)
            )
    width, heads = published["d_model"], published["n_heads"]
    return LlamaConfig(
        # Rows of the embedding, which LLaDA pads beyond its vocabulary.
        vocab_size=published.get("embedding_size") or published["vocab_size"],
        hidden_size=width,
        intermediate_size=published.get("mlp_hidden_size") or published["mlp_ratio"] * width,
        num_hidden_layers=published["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=published.get("n_kv_heads") or heads,
        max_position_embeddings=published["max_sequence_length"],
        rope_theta=published.get("rope_theta", 10000.0),
        rms_norm_eps=published.get("rms_norm_eps", 1e-5),
        attention_dropout=published.get("attention_dropout", 0.0),
        tie_word_embeddings=published.get("weight_tying", False),
        bos_token_id=None,  # Llama's default, 1, is some other token here
        eos_token_id=published.get("eos_token_id"),
        pad_token_id=published.get("pad_token_id"),
    )


# `ff_proj` is the half of the gated product that goes through the activation.
_LLADA_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_LLADA_KEYS = {
    r"^model\.transformer\.wte\.": "embed_tokens.",
    r"^model\.transformer\.ln_f\.": "norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    **{
        rf"^model\.transformer\.blocks\.(\d+)\.{theirs}\.": rf"layers.\1.{native}."
        for theirs, native in _LLADA_BLOCK.items()
    },
}


def _gemma3_text_config(published: dict[str, Any]) -> PretrainedConfig:
    """Return the text model inside Gemma 3 (4B and larger); it has the layout of the 1B model."""
    text: PretrainedConfig = Gemma3Config.from_dict(published).text_config
    return text


# DiffuGPT and DiffuLLaMA (arXiv 2410.17891) keep the embedding apart from the blocks. Their configs
# have the model_type of plain GPT-2 and Llama, whose weight names these rules leave alone.
_DIFFUGPT_KEYS = {r"^embed_tokens\.": "wte.", r"^denoise_model\.": ""}
_DIFFULLAMA_KEYS = {r"^denoise_model\.": ""}
# Both the published names (`language_model.model.`) and those that transformers 5 saves
# (`model.language_model.`).
_GEMMA3_KEYS = {r"^(?:model\.)?language_model\.(?:model\.)?": ""}
# By the `model_type` of the published config.json.
NATIVE_FORMS = {
    "gpt2": NativeForm(config=GPT2Config.from_dict, keys=_DIFFUGPT_KEYS),
    "llama": NativeForm(config=LlamaConfig.from_dict, keys=_DIFFULLAMA_KEYS),
    "Dream": NativeForm(config=_dream_config),
    "gemma3": NativeForm(config=_gemma3_text_config, keys=_GEMMA3_KEYS),
    "llada": NativeForm(config=_llada_config, keys=_LLADA_KEYS, shifted=False),
}


def known_kinds() -> list[str]:
    """Return every `model_type` of a config.json that can be read without a model's own code."""
    return sorted({*NATIVE_FORMS, *FAMILIES})


# The type of layers that see the whole text. A layer with a window keeps its rotation: training has
# seen all distances within a window.
_FULL = "full_attention"


def scale_rope(hf_config: PretrainedConfig, scaling: RopeScaling) -> None:
    """Rescale rotary positions in place; `max_position_embeddings` grows by the factor.

    There is no `dynamic` kind: it rotates by the longest row of a forward, so a vector would depend
    on the other texts of its batch. `ntk` is the same rule at the full length.

    Raises:
        UserError: the family has no rotary positions, or this model's are rescaled already.
    """
    parameters: dict[str, Any] | None = getattr(hf_config, "rope_parameters", None)
    if not parameters:
        raise UserError(
            f"model.rope_scaling: a {hf_config.model_type} model has no rotary positions",
            fix="remove model.rope_scaling, and keep texts within its learned positions",
        )
    # Gemma 3 and ModernBERT have parameters for each type of layer.
    rope = parameters.get(_FULL, parameters)
    if rope["rope_type"] != "default":
        raise UserError(
            f"model.rope_scaling: this model's positions are already {rope['rope_type']}",
            fix="remove model.rope_scaling",
        )
    trained = hf_config.max_position_embeddings  # read before it grows below
    if scaling.kind == "ntk":
        width = getattr(hf_config, "head_dim", None)
        width = width or hf_config.hidden_size // hf_config.num_attention_heads
        # Phi-3's small models rotate only a part of each head.
        width = int(width * rope.get("partial_rotary_factor", 1.0))
        # The base at which the slowest pair of dimensions turns `factor` times as slowly, while the
        # fastest keeps its speed.
        rope["rope_theta"] *= scaling.factor ** (width / (width - 2))
    else:
        rope.update(rope_type=scaling.kind, factor=scaling.factor)
        if scaling.kind == "yarn":
            # YaRN counts turns within the trained length; transformers would take the grown one.
            rope["original_max_position_embeddings"] = trained
    hf_config.max_position_embeddings = int(trained * scaling.factor)
