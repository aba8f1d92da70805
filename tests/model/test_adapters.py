"""Adapters that are added fresh, continued, or merged below others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from pipeline.config import LoraConfig, ModelConfig, build_config
from pipeline.errors import UserError
from pipeline.model.encoder import build_encoder
from tests.model.model_support import save_adapter

IDS, LENGTHS = torch.arange(3, 20), torch.tensor([12, 5])


def llama(**changes: Any) -> hf.LlamaConfig:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4}
    return hf.LlamaConfig(**{**sizes, **depth, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model's folder."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    hf.LlamaForCausalLM(llama(initializer_range=0.3)).save_pretrained(path)
    return path


def reference(adapted: Any) -> torch.Tensor:
    """Causal mean vectors by peft and transformers alone."""
    rows = [adapted(row[None], output_hidden_states=True) for row in IDS.split([12, 5])]
    return torch.cat([row.hidden_states[-1].mean(1) for row in rows])


@pytest.mark.parametrize("use", ["merge", "continue"])
def test_an_adapter_of_a_language_model_starts_an_encoder(
    base: Path, tmp_path: Path, use: Any
) -> None:
    adapted = save_adapter(hf.AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    config = ModelConfig(
        path=str(base), dtype="float32", attention="causal", normalize=False,
        adapter=str(tmp_path), adapter_use=use,
    )  # fmt: skip
    encoder = build_encoder(config)
    torch.testing.assert_close(encoder(IDS, LENGTHS), reference(adapted), atol=1e-5, rtol=0)
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    # Merged: everything trains, no adapter is left. Continued: the adapter alone trains.
    assert all(("lora_" in name) == (use == "continue") for name in trained)
    assert len(trained) == (8 if use == "continue" else len(list(encoder.parameters())))
    names = [name for name, _ in encoder.named_parameters()]
    assert [name for name, _ in build_encoder(config, meta=True).named_parameters()] == names


def test_a_merged_adapter_can_carry_a_fresh_one(base: Path, tmp_path: Path) -> None:
    save_adapter(hf.AutoModelForCausalLM.from_pretrained(base), tmp_path)
    merged = ModelConfig(path=str(base), dtype="float32", adapter=str(tmp_path))
    encoder = build_encoder(dataclasses.replace(merged, lora=LoraConfig(rank=2)))
    # A fresh adapter changes nothing yet.
    torch.testing.assert_close(
        encoder(IDS, LENGTHS), build_encoder(merged)(IDS, LENGTHS), atol=1e-6, rtol=0
    )
    assert all(
        ("lora_" in name) == parameter.requires_grad
        for name, parameter in encoder.named_parameters()
    )


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 4**0.5)])
def test_rank_stabilised_adapters_are_scaled_by_the_root_of_their_rank(
    base: Path, rslora: bool, scale: float
) -> None:
    """Kalajdzievski, arXiv 2312.03732, in the place of alpha / rank."""
    lora = LoraConfig(rank=4, alpha=8, rslora=rslora)
    encoder: Any = build_encoder(ModelConfig(path=str(base), lora=lora), meta=True)
    assert encoder.layers[0].self_attn.q_proj.scaling["default"] == scale


@pytest.mark.parametrize("targets", ["all-linear", ["all-linear"]])
def test_all_linear_layers_are_the_ones_that_peft_takes(base: Path, targets: Any) -> None:
    lora = build_config(LoraConfig, {"rank": 2, "targets": targets}, origin="test")
    assert lora == LoraConfig(rank=2, targets="all-linear")
    encoder = build_encoder(ModelConfig(path=str(base), lora=lora), meta=True)
    theirs = peft.get_peft_model(
        hf.AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    names = {name for name, _ in encoder.backbone.named_parameters() if "lora_" in name}
    wanted = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert names == {name.replace("model.model.model.", "model.model.") for name in wanted}


def test_an_adapter_is_continued_on_another_one_that_is_merged(base: Path, tmp_path: Path) -> None:
    """SimCSE on MNTP: the second adapter was trained on the weights that the first went into."""
    first = save_adapter(hf.AutoModelForCausalLM.from_pretrained(base), tmp_path / "first", seed=1)
    second = save_adapter(first.merge_and_unload(), tmp_path / "second", seed=2).eval()
    config = ModelConfig(
        path=str(base), dtype="float32", attention="causal", normalize=False,
        merged_adapters=(str(tmp_path / "first"),),
        adapter=str(tmp_path / "second"), adapter_use="continue",
    )  # fmt: skip
    encoder = build_encoder(config)
    torch.testing.assert_close(encoder(IDS, LENGTHS), reference(second), atol=1e-5, rtol=0)
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all("lora_" in name for name in trained)


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(hf.LlamaModel(llama(num_hidden_layers=3)), tmp_path / "deeper")
    save_adapter(hf.LlamaModel(llama(hidden_size=32)), tmp_path / "wider")
    for name, words in (("deeper", "does not fit"), ("wider", "wider"), ("none", "cannot read")):
        with pytest.raises(UserError, match=words):
            build_encoder(ModelConfig(path=str(base), adapter=str(tmp_path / name)))


def test_continuing_without_an_adapter_or_with_a_second_one_is_refused() -> None:
    with pytest.raises(UserError, match="adapter_use"):
        ModelConfig(path="x", adapter_use="continue")
    with pytest.raises(UserError, match="adapter_use"):
        ModelConfig(path="x", adapter="y", adapter_use="continue", lora=LoraConfig())
