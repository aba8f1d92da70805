"""Published diffusion layouts against the equations of their papers, written out here."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file

from pipeline.config import LoraConfig, ModelConfig
from pipeline.errors import UserError
from pipeline.model.backbones import has_other_names
from pipeline.model.encoder import build_encoder
from tests.model.model_support import HEADS, LAYERS, MLP, VOCAB, WIDTH, llada_folder

ADAPTER = "adapter_model.safetensors"


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

    # The saved folder is a Llama that transformers reads without remote code.
    encoder.save_backbone(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors")
    assert "layers.1.mlp.gate_proj.weight" in names
    reloaded = hf.AutoModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert type(reloaded) is hf.LlamaModel
    hidden = reloaded(rows[0][None]).last_hidden_state
    torch.testing.assert_close(hidden.mean(1), wanted[:1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_type", "sequential"),
        ("alibi", True),
        ("include_qkv_bias", True),
        ("scale_logits", True),
        ("residual_dropout", 0.1),
        ("embedding_dropout", 0.1),
    ],
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
    # So that the card of an adapter alone does not send its reader to transformers.
    named = [
        has_other_names(ModelConfig(path=str(tmp_path / name))) for name in ("plain", "adapted")
    ]
    assert named == [False, True]


@pytest.mark.parametrize("kind", ["llada", "gpt2"])
def test_a_config_that_counts_fewer_tokens_than_there_are_rows_is_corrected(
    tmp_path: Path, kind: str
) -> None:
    """DiffuGPT's mask token has a row that its config.json does not count."""
    if kind == "llada":
        llada_folder(tmp_path, embedding_size=None, vocab_size=VOCAB - 3)
    else:
        config = hf.GPT2Config(vocab_size=90, n_embd=16, n_layer=2, n_head=4, n_positions=32)
        state = hf.GPT2Model(config).state_dict()
        names = {"wte.weight": "embed_tokens.weight"}
        weights = {names.get(k, f"denoise_model.{k}"): v.clone() for k, v in state.items()}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        config.vocab_size = 89
        config.save_pretrained(tmp_path)
    given = ModelConfig(path=str(tmp_path), dtype="float32")
    for encoder in (build_encoder(given), build_encoder(given, meta=True)):
        assert encoder.model.get_input_embeddings().num_embeddings == VOCAB
        assert encoder.model.config.vocab_size == VOCAB
    # peft would take the difference for added tokens, and save the embedding with an adapter.
    lora = LoraConfig(rank=2, targets="all-linear")
    build_encoder(dataclasses.replace(given, lora=lora)).save_adapter(tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / ADAPTER))


@pytest.mark.parametrize("old_names", [False, True])
def test_gemma_3_that_reads_images_is_its_text_model(
    tmp_path: Path, old_names: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    text = hf.Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=4,
        sliding_window=6,
        sliding_window_pattern=2,
    )
    eye = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes = {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    whole = hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text.to_dict(), vision_config={**eye, **sizes})
    )
    whole.save_pretrained(tmp_path)
    if not old_names:
        weights = load_file(tmp_path / "model.safetensors")
        new = {
            re.sub(r"^language_model\.model\.", "model.language_model.", name): value
            for name, value in weights.items()
        }
        save_file(new, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = ModelConfig(path=str(tmp_path), dtype="float32", attention="causal", normalize=False)
    encoder = build_encoder(config)
    ids = torch.arange(3, 20)
    wanted = whole.model.language_model(ids[None]).last_hidden_state.mean(1)
    torch.testing.assert_close(encoder(ids, torch.tensor([17])), wanted, atol=1e-5, rtol=0)
    assert "vision_tower" in (told := capsys.readouterr().err) or "projector" in told
    encoder.save_backbone(tmp_path / "saved")
    assert type(hf.AutoModel.from_pretrained(tmp_path / "saved")) is hf.Gemma3TextModel


def test_a_model_that_holds_a_text_model_of_another_kind_names_it(tmp_path: Path) -> None:
    tree = {"model_type": "mistral3", "text_config": {"model_type": "mistral"}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"'mistral3', which holds a text model .* 'mistral'"):
        build_encoder(ModelConfig(path=str(tmp_path)))
