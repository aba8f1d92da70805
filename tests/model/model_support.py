"""Small models of every family, of published layouts, and adapters, with weights that matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from safetensors.torch import save_file

from pipeline.model.architectures import FAMILIES

SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **IDS, "num_key_value_heads": 2}
# Name -> config, and the attention of transformers that computes it. Windows are shorter than the
# longest row, so that they matter.
CASES: dict[str, tuple[hf.PretrainedConfig, str]] = {
    "llama": (hf.LlamaConfig(**GROUPED), "sdpa"),
    "mistral": (hf.MistralConfig(**GROUPED, sliding_window=6), "sdpa"),
    "qwen2": (hf.Qwen2Config(**GROUPED), "sdpa"),
    "qwen2-window": (
        hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=6, max_window_layers=1),
        "sdpa",
    ),
    "qwen3": (hf.Qwen3Config(**GROUPED, head_dim=8), "sdpa"),
    "gemma": (hf.GemmaConfig(**GROUPED, head_dim=8), "sdpa"),
    "gemma2": (hf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=6), "eager"),
    "gemma3_text": (
        hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6, sliding_window_pattern=2),
        "sdpa",
    ),
    "olmo2": (hf.Olmo2Config(**GROUPED), "sdpa"),
    "phi3": (hf.Phi3Config(**GROUPED), "sdpa"),
    "smollm3": (hf.SmolLM3Config(**GROUPED), "sdpa"),
    "gpt2": (hf.GPT2Config(vocab_size=200, n_embd=32, n_layer=3, n_head=4, n_positions=64), "sdpa"),
    "bert": (hf.BertConfig(**SIZES, pad_token_id=0), "sdpa"),
    "roberta": (hf.RobertaConfig(**SIZES, pad_token_id=1), "sdpa"),
    "xlm-roberta": (hf.XLMRobertaConfig(**SIZES, pad_token_id=1), "sdpa"),
    "eurobert": (hf.EuroBertConfig(**GROUPED), "sdpa"),
    "modernbert": (
        hf.ModernBertConfig(
            **{**SIZES, **IDS}, local_attention=12, global_attn_every_n_layers=2, cls_token_id=1
        ),
        "sdpa",
    ),
}
DECODERS = [name for name in CASES if FAMILIES[name.removesuffix("-window")].decoder]
LENGTHS = torch.tensor([3, 17, 1, 9])


def save_model(config: hf.PretrainedConfig, folder: Path) -> Path:
    """Random weights, large enough that attention and position matter."""
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def padded_means(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean of the last hidden states by transformers alone, from a padded batch."""
    mask = torch.arange(int(LENGTHS.max())) < LENGTHS[:, None]
    padded = torch.full(mask.shape, model.config.pad_token_id or 0)
    padded[mask] = ids
    hidden = model(input_ids=padded, attention_mask=mask.long()).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / LENGTHS[:, None]


WIDTH, LAYERS, HEADS, MLP, VOCAB = 16, 2, 4, 24, 90
LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
    "d_model": WIDTH,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": HEADS,
    "mlp_hidden_size": MLP,
    "embedding_size": VOCAB,
    "vocab_size": VOCAB,
    "max_sequence_length": 64,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "include_bias": False,
    "weight_tying": False,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "mask_token_id": 2,
}


def llada_folder(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a random checkpoint in LLaDA's layout; returns its weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.transformer.wte.weight": (VOCAB, WIDTH),
        "model.transformer.ln_f.weight": (WIDTH,),
        "model.transformer.ff_out.weight": (VOCAB, WIDTH),
    }
    for layer in range(LAYERS):
        block = f"model.transformer.blocks.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            shapes[f"{block}.{name}.weight"] = (WIDTH, WIDTH)
        for name in ("attn_norm", "ff_norm"):
            shapes[f"{block}.{name}.weight"] = (WIDTH,)
        for name in ("ff_proj", "up_proj"):
            shapes[f"{block}.{name}.weight"] = (MLP, WIDTH)
        shapes[f"{block}.ff_out.weight"] = (WIDTH, MLP)
    weights = {k: torch.randn(shape, generator=generator) * 0.4 for k, shape in shapes.items()}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**LLADA, **changes}))
    return weights


def save_adapter(model: Any, folder: Path, seed: int = 1) -> Any:
    """A peft adapter with weights that matter, trained elsewhere on `model`."""
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(model, adapter)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return adapted
