"""A model with its own code runs padded and is probed first; other configs are refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers.dynamic_module_utils as dynamic

from pipeline.config import LoraConfig, ModelConfig
from pipeline.errors import UserError
from pipeline.model.backbones import load_backbone, read_config
from pipeline.model.encoder import build_encoder
from pipeline.model.weights import Placement

_CONFIG = """
from transformers import PretrainedConfig
class ToyConfig(PretrainedConfig):
    model_type = "toy"
    def __init__(self, hidden_size=8, **kwargs):
        self.hidden_size = hidden_size
        super().__init__(**kwargs)
"""
# One attention layer. BIAS is what becomes of the 0/1 padding mask.
_MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from .configuration_toy import ToyConfig
class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(30, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()
    def get_input_embeddings(self):
        return self.embed
    def _init_weights(self, module):
        torch.manual_seed(0)
        if hasattr(module, "weight"):
            nn.init.normal_(module.weight)
    def forward(self, inputs_embeds, attention_mask):
        x = inputs_embeds
        scores = self.q_proj(x) @ x.transpose(1, 2) / 8 + BIAS
        return BaseModelOutput(last_hidden_state=x + scores.softmax(-1) @ x)
"""
HONEST = "(1 - attention_mask[:, None]) * -1e9"
ADDITIVE = "attention_mask[:, None].float()"  # the fault of the published Dream code
CAUSAL = HONEST + " + torch.full((x.shape[1],) * 2, -1e9).triu(1)"


def write(folder: Path, bias: str) -> ModelConfig:
    folder.mkdir()  # transformers keeps foreign modules by folder name: never one name twice
    auto = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModel": "modeling_toy.ToyModel"}
    config = {"model_type": "toy", "architectures": ["ToyModel"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 8}))
    (folder / "configuration_toy.py").write_text(_CONFIG)
    (folder / "modeling_toy.py").write_text(_MODEL.replace("BIAS", bias))
    torch.manual_seed(0)
    weights = {
        "embed.weight": torch.randn(30, 8),
        "q_proj.weight": torch.randn(8, 8),
        "q_proj.bias": torch.randn(8),
    }
    torch.save(weights, folder / "pytorch_model.bin")
    return ModelConfig(
        path=str(folder), dtype="float32", trust_remote_code=True, revision="abc", normalize=False
    )


@pytest.fixture(autouse=True, scope="module")
def modules_of_these_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Foreign code is copied somewhere before it runs; not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, targets=("q_proj",))])
def test_foreign_code_gives_the_vectors_of_its_own_forward(tmp_path: Path, lora: Any) -> None:
    config = dataclasses.replace(write(tmp_path / "toy", HONEST), lora=lora)
    encoder = build_encoder(config)
    ids, lengths = torch.arange(1, 12), torch.tensor([3, 8])
    inner = encoder.layers[0].inner
    rows = [inner.embed(row)[None] for row in ids.split([3, 8])]
    wanted = [inner(row, torch.ones(row.shape[:2])).last_hidden_state.mean(1) for row in rows]
    vectors = encoder(ids, lengths)
    torch.testing.assert_close(vectors, torch.cat(wanted), atol=1e-6, rtol=0)
    vectors.sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == (lora is None or "lora_" in name), name
    meta = build_encoder(config, meta=True)
    assert [n for n, _ in meta.named_parameters()] == [n for n, _ in encoder.named_parameters()]


def test_what_an_adapter_was_merged_into_trains_whole(tmp_path: Path) -> None:
    config = write(tmp_path / "toy", HONEST)
    backbone: Any = load_backbone(config, placement=Placement())[0]
    toy = backbone.layers[0].inner
    adapted = peft.get_peft_model(backbone, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    torch.nn.init.ones_(toy.q_proj.lora_B["default"].weight)
    adapted.save_pretrained(tmp_path / "adapter")
    ids, lengths = torch.arange(1, 12), torch.tensor([3, 8])
    merged = build_encoder(dataclasses.replace(config, adapter=str(tmp_path / "adapter")))
    rows = [toy(toy.embed(row)[None], torch.ones(1, len(row))) for row in ids.split([3, 8])]
    wanted = torch.cat([row.last_hidden_state.mean(1) for row in rows])
    torch.testing.assert_close(merged(ids, lengths), wanted, atol=1e-5, rtol=0)
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_padding_that_leaks_into_vectors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="padding changes the vectors"):
        build_encoder(write(tmp_path / "leaky", ADDITIVE))


def test_code_that_does_not_attend_as_configured_is_refused(tmp_path: Path) -> None:
    causal = write(tmp_path / "causal", CAUSAL)
    with pytest.raises(UserError, match="is causal"):
        build_encoder(causal)
    build_encoder(dataclasses.replace(causal, attention="causal"))
    full = write(tmp_path / "full", HONEST)
    with pytest.raises(UserError, match="is bidirectional"):
        build_encoder(dataclasses.replace(full, attention="causal"))


def test_foreign_code_does_not_run_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(write(tmp_path / "toy", HONEST), trust_remote_code=False)
    (tmp_path / "toy" / "configuration_toy.py").write_text("raise SystemExit('it ran')")

    def answer(*_: object) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", answer)
    with pytest.raises(UserError, match=r"toy.*model\.trust_remote_code and model\.revision"):
        build_encoder(config)


@pytest.mark.parametrize("content", ['"text"', '"   "', "[]", "3", "{}", '{"model_type": 3}'])
def test_a_config_without_a_model_type_is_refused_by_its_folder(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.path: .*config\.json"):
        build_encoder(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsand"),
        ("quantization_config", {"bits": 4}, "unknown"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_quantized_weights_are_refused_before_they_are_read(
    tmp_path: Path, key: str, value: dict[str, Any], shown: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", key: value}))
    with pytest.raises(
        UserError, match=rf"{key}: quantized weights \({shown}.* fix: give the model"
    ):
        read_config(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", key: None}))
    assert read_config(ModelConfig(path=str(tmp_path)))["model_type"] == "qwen2"
