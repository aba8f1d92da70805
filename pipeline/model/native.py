"""Published layouts that are read as plain models of transformers: diffusion models, Gemma 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from transformers import Gemma3Config, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from pipeline.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NativeForm:
    """A published layout in native terms.

    Attributes:
        config: the published config.json -> the native config.
        keys: regular expressions over weight names -> their native names.
        shifted: whether a token is predicted from the hidden state before it, not from its own.
    """

    config: Callable[[dict[str, Any]], PretrainedConfig]
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    shifted: bool = True


def _dream_config(published: dict[str, Any]) -> PretrainedConfig:
    """Dream (arXiv 2508.15487) computes what Qwen2 computes, under the same weight names."""
    dropped = ("architectures", "auto_map", "model_type", "transformers_version")
    return Qwen2Config(**{k: v for k, v in published.items() if k not in dropped})


# What a LLaDA config must say (absent keys mean the same) for its blocks to be Llama's.
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
    """LLaDA (arXiv 2502.09992) is Llama without the causal mask, under OLMo's names.

    Raises:
        UserError: this variant switches on something that Llama does not have.
    """
    for key, wanted in _LLADA_IS_LLAMA.items():
        if published.get(key, wanted) not in (wanted, None):
            raise UserError(
                f"config.json: {key}: {published[key]!r} in a LLaDA model", allowed=repr(wanted)
            )
    width, heads = published["d_model"], published["n_heads"]
    return LlamaConfig(
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
        bos_token_id=None,
        eos_token_id=published.get("eos_token_id"),
        pad_token_id=published.get("pad_token_id"),
    )


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
    """Gemma 3 from 4B on reads images as well; the text model inside is the one of 1B."""
    text: PretrainedConfig = Gemma3Config.from_dict(published).text_config
    return text


def _plain(kind: type[PretrainedConfig]) -> Callable[[dict[str, Any]], PretrainedConfig]:
    return lambda published: kind.from_dict(published)


# DiffuGPT and DiffuLLaMA (arXiv 2410.17891) keep the embedding apart from the blocks. Their configs
# are those of plain GPT-2 and Llama, whose own weight names these rules leave alone.
_DIFFUGPT_KEYS = {r"^embed_tokens\.": "wte.", r"^denoise_model\.": ""}
_DIFFULLAMA_KEYS = {r"^denoise_model\.": ""}

# As it was published, and as transformers 5 saves it.
_GEMMA3_KEYS = {r"^(?:model\.)?language_model\.(?:model\.)?": ""}

# By the `model_type` of the published config.json.
NATIVE_FORMS = {
    "gpt2": NativeForm(config=_plain(GPT2Config), keys=_DIFFUGPT_KEYS),
    "llama": NativeForm(config=_plain(LlamaConfig), keys=_DIFFULLAMA_KEYS),
    "Dream": NativeForm(config=_dream_config),
    "gemma3": NativeForm(config=_gemma3_text_config, keys=_GEMMA3_KEYS),
    "llada": NativeForm(config=_llada_config, keys=_LLADA_KEYS, shifted=False),
}
