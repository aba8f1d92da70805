"""Published diffusion layouts against the equations of their papers, written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model.encoder import build_encoder

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


def llada_states(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """(L,) ids -> (L, WIDTH): pre-norm blocks, full attention, half-split rotary, SwiGLU."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    length, half = len(ids), WIDTH // HEADS // 2
    frequency = 500000.0 ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones(length, half), torch.arange(length)[:, None] * frequency)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(x[..., :half], x[..., half:]) * turn  # (HEADS, L, half)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    x = w["model.transformer.wte.weight"][ids]
    for layer in range(LAYERS):
        block = f"model.transformer.blocks.{layer}"
        h = norm(x, f"{block}.attn_norm")
        q, k, v = (
            (h @ w[f"{block}.{name}.weight"].T).view(length, HEADS, -1).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        scores = rotate(q) @ rotate(k).transpose(1, 2) / (WIDTH // HEADS) ** 0.5
        attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, WIDTH)
        x = x + attended @ w[f"{block}.attn_out.weight"].T
        h = norm(x, f"{block}.ff_norm")
        gated = F.silu(h @ w[f"{block}.ff_proj.weight"].T) * (h @ w[f"{block}.up_proj.weight"].T)
        x = x + gated @ w[f"{block}.ff_out.weight"].T
    return norm(x, "model.transformer.ln_f")


def test_llada_computes_its_papers_equations(tmp_path: Path) -> None:
    weights = llada_folder(tmp_path / "llada")
    config = ModelConfig(path=str(tmp_path / "llada"), dtype="float32", normalize=False)
    encoder = build_encoder(config)
    rows = torch.randint(0, VOCAB, (19,), generator=torch.Generator().manual_seed(1)).split([12, 7])
    wanted = torch.stack([llada_states(weights, row).mean(0) for row in rows])
    ours = encoder(torch.cat(rows), torch.tensor([12, 7]))
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)

    # What is saved is a Llama that transformers reads without remote code.
    encoder.save_backbone(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors")
    assert "layers.1.mlp.gate_proj.weight" in names
    reloaded = hf.AutoModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert type(reloaded) is hf.LlamaModel
    hidden = reloaded(rows[0][None]).last_hidden_state
    torch.testing.assert_close(hidden.mean(1), wanted[:1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_type", "sequential"), ("alibi", True), ("include_qkv_bias", True)],
)
def test_a_llada_variant_that_is_no_llama_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    llada_folder(tmp_path / "llada", **{key: value})
    with pytest.raises(UserError, match=key):
        build_encoder(ModelConfig(path=str(tmp_path / "llada")))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_adapted_diffusion_checkpoints_give_the_vectors_of_their_plain_layout(
    tmp_path: Path, kind: str
) -> None:
    if kind == "gpt2":
        config: Any = hf.GPT2Config(vocab_size=90, n_embd=16, n_layer=2, n_head=4, n_positions=32)
        stem, embedding = "transformer.", "transformer.wte.weight"
    else:
        config = hf.LlamaConfig(
            vocab_size=90,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        stem, embedding = "model.", "model.embed_tokens.weight"
    model = hf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "plain")
    adapted = {
        "embed_tokens.weight"
        if key == embedding
        else key.replace(stem, "denoise_model.", 1): value.clone()
        for key, value in model.state_dict().items()
    }
    config.save_pretrained(tmp_path / "adapted")
    save_file(adapted, tmp_path / "adapted" / "model.safetensors", metadata={"format": "pt"})
    ids, lengths = torch.arange(20), torch.tensor([13, 7])
    vectors = [
        build_encoder(ModelConfig(path=str(tmp_path / name), dtype="float32"))(ids, lengths)
        for name in ("plain", "adapted")
    ]
    torch.testing.assert_close(*vectors, atol=0, rtol=0)
