"""Heads of published language models give the scores of transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from pipeline.config import LoraConfig, ModelConfig
from pipeline.errors import UserError
from pipeline.model.encoder import (
    build_encoder,
    build_language_model,
    find_mask_token,
    predicts_shifted,
)

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS, LENGTHS = torch.arange(3, 15), torch.tensor([5, 7])


def config(path: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(path=str(path), dtype="float32", **changes)


def make(kind: Any, folder: Path, **changes: Any) -> Any:
    """A random causal language model of transformers, saved."""
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**SIZES, **changes})).eval()
    model.save_pretrained(folder)
    return model


def logits(folder: Path, **changes: Any) -> torch.Tensor:
    """Our scores of all tokens of two packed rows."""
    model = build_language_model(config(folder, **changes))
    with torch.inference_mode():
        return model.logits(model.hidden_states(IDS, LENGTHS))


def expected(model: Any) -> torch.Tensor:
    """The plain model's, row by row."""
    with torch.inference_mode():
        return torch.cat([model(input_ids=row[None]).logits[0] for row in IDS.split([5, 7])])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (hf.Qwen2ForCausalLM, {}),
        (hf.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
        (hf.GPT2LMHeadModel, {"n_embd": 16, "n_layer": 2, "n_head": 4}),
        (hf.Gemma2ForCausalLM, {"head_dim": 4, "final_logit_softcapping": 0.05}),
    ],
    ids=["untied", "tied", "GPT-2", "soft cap"],
)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_scores_equal_those_of_transformers(
    kind: Any, changes: dict[str, Any], attention: Any, tmp_path: Path
) -> None:
    if kind is hf.GPT2LMHeadModel:
        changes = {**changes, "vocab_size": 60}
    plain = make(kind, tmp_path, **changes)
    if attention == "bidirectional":
        plain.config.is_causal = False
    torch.testing.assert_close(
        logits(tmp_path, attention=attention), expected(plain), atol=1e-5, rtol=1e-5
    )


def test_a_head_is_found_in_the_last_of_several_files(tmp_path: Path) -> None:
    plain = make(hf.LlamaForCausalLM, tmp_path / "whole")
    plain.save_pretrained(tmp_path / "parts", max_shard_size="6KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    torch.testing.assert_close(
        logits(tmp_path / "parts", attention="causal"), expected(plain), atol=1e-5, rtol=1e-5
    )


def test_llada_names_its_head_otherwise_and_predicts_in_place(tmp_path: Path) -> None:
    width, layers = 16, 2
    published = {
        "model_type": "llada",
        "d_model": width,
        "n_layers": layers,
        "n_heads": 4,
        "mlp_hidden_size": 24,
        "vocab_size": 60,
        "max_sequence_length": 64,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "mask_token_id": 42,
    }
    plain = make(hf.LlamaForCausalLM, tmp_path / "native", num_key_value_heads=4)
    renamed = {}
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
        "self_attn.o_proj": "attn_out",
        "self_attn.": "",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
        "model.layers.": "model.transformer.blocks.",
        "model.embed_tokens": "model.transformer.wte",
        "model.norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
    }
    for name, value in load_file(tmp_path / "native" / "model.safetensors").items():
        for native, theirs in names.items():
            name = name.replace(native, theirs)
        renamed[name] = value
    folder = tmp_path / "llada"
    folder.mkdir()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(published))
    plain.config.is_causal = False
    torch.testing.assert_close(logits(folder), expected(plain), atol=1e-5, rtol=1e-5)
    assert not predicts_shifted(config(folder))
    assert predicts_shifted(config(tmp_path / "native"))
    assert find_mask_token(config(folder), SimpleNamespace(mask_token_id=None), None) == 42


def test_the_head_is_trained_with_the_backbone_and_frozen_with_an_adapter(tmp_path: Path) -> None:
    make(hf.Qwen2ForCausalLM, tmp_path)
    full = build_language_model(config(tmp_path))
    assert full.lm_head.weight.requires_grad
    targets = ("q_proj", "v_proj")
    lora = build_language_model(config(tmp_path, lora=LoraConfig(targets=targets)))
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_an_encoder_without_a_head_is_refused(tmp_path: Path) -> None:
    plain = make(hf.Qwen2ForCausalLM, tmp_path / "whole")
    plain.model.save_pretrained(tmp_path / "backbone")
    with pytest.raises(UserError, match=r"hold no lm_head.weight"):
        build_language_model(config(tmp_path / "backbone"))
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    hf.BertModel(hf.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="no language-model head"):
        build_language_model(config(tmp_path / "bert"))


def test_a_mask_token_that_does_not_exist_is_named(tmp_path: Path) -> None:
    make(hf.Qwen2ForCausalLM, tmp_path)
    tokenizer = SimpleNamespace(mask_token_id=None, get_vocab=lambda: {"_": 7})
    assert find_mask_token(config(tmp_path), tokenizer, "_") == 7
    beyond = SimpleNamespace(mask_token_id=60)
    with pytest.raises(UserError, match=r"number 60.*allowed: below 60"):
        find_mask_token(config(tmp_path), beyond, None)
    for name, message in ((None, "has no mask token"), ("<m>", "has no token '<m>'")):
        with pytest.raises(UserError, match=message):
            find_mask_token(config(tmp_path), tokenizer, name)


def test_an_export_with_its_head_loads_as_a_language_model_and_as_an_encoder(
    tmp_path: Path,
) -> None:
    make(hf.Qwen2ForCausalLM, tmp_path / "model")
    model = build_language_model(config(tmp_path / "model", attention="causal"))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_backbone(tmp_path / "export")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(
        logits(tmp_path / "export", attention="causal"), expected(again), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(again.lm_head.weight, model.lm_head.weight)
    vectors = build_encoder(config(tmp_path / "export", attention="causal"))(IDS, LENGTHS)
    torch.testing.assert_close(vectors, model(IDS, LENGTHS))
