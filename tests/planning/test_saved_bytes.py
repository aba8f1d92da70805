"""The plan's bytes of a layer against what autograd keeps for the backward of the real layer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks

from pipeline.config import LoraConfig, ModelConfig
from pipeline.model import attention
from pipeline.model.encoder import Encoder, build_encoder
from pipeline.planning.shape import (
    ModelShape,
    saved_by_layer,
    saved_outside,
    spared_by_first_layer,
)

TOKENS = 64
_SIZES = {"vocab_size": 100, "hidden_size": 256, "intermediate_size": 720, "num_hidden_layers": 2}
_HEADS = {**_SIZES, "num_attention_heads": 8}
_GROUPS = {**_HEADS, "num_key_value_heads": 2, "pad_token_id": 0}
_WIDE = {**_GROUPS, "head_dim": 48}  # heads that together are wider than the hidden states
_PLAIN_SCORES = {"attn_logit_softcapping": None}  # in fp32, capped ones are L x L
_LLADA = {
    "model_type": "llada",
    "d_model": 256,
    "n_heads": 8,
    "n_kv_heads": 8,
    "n_layers": 2,
    "mlp_hidden_size": 720,
    "vocab_size": 100,
    "embedding_size": 104,
    "max_sequence_length": 64,
}
FAMILIES: dict[str, Any] = {
    "qwen2": transformers.Qwen2Config(**_GROUPS),
    "qwen3": transformers.Qwen3Config(**_WIDE),
    "llama": transformers.LlamaConfig(**_GROUPS, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(**_WIDE, sliding_window=16),
    "gemma": transformers.GemmaConfig(**_WIDE),
    "gemma2": transformers.Gemma2Config(**_WIDE, sliding_window=16, **_PLAIN_SCORES),
    "gemma3": transformers.Gemma3TextConfig(**_WIDE, sliding_window=16),
    "olmo2": transformers.Olmo2Config(**_GROUPS, eos_token_id=1),
    "phi3": transformers.Phi3Config(**_GROUPS),
    "smollm3": transformers.SmolLM3Config(**_GROUPS),
    "gpt2": transformers.GPT2Config(vocab_size=100, n_embd=256, n_layer=2, n_head=8),
    "bert": transformers.BertConfig(**_HEADS),
    "roberta": transformers.RobertaConfig(**_HEADS),
    "xlm-roberta": transformers.XLMRobertaConfig(**_HEADS),
    "eurobert": transformers.EuroBertConfig(**_GROUPS, mask_token_id=1),
    "modernbert": transformers.ModernBertConfig(**_HEADS, pad_token_id=0),
    "dream": {**transformers.Qwen2Config(**_GROUPS).to_dict(), "model_type": "Dream"},
    "llada": _LLADA,
}
DROPPED = {"lora": LoraConfig(targets="all-linear")}
UNDROPPED = {"lora": LoraConfig(dropout=0.0, targets="all-linear")}
# Layouts that differ in what adapters and fp32 change.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *((f, DROPPED) for f in ("qwen3", "gemma2", "olmo2", "phi3", "gpt2", "modernbert", "llada")),
    *((family, UNDROPPED) for family in ("qwen2", "phi3", "bert")),
    ("dream", {"lora": LoraConfig(targets=("q_proj", "down_proj"))}),
    *((family, {"dtype": "float32"}) for family in ("qwen3", "phi3", "gpt2", "bert")),
    *((family, {"dtype": "float32", **DROPPED}) for family in ("mistral", "gemma2")),
]


@dataclasses.dataclass
class Saved:
    """Bytes of distinct storages that autograd has saved since `take` was last called."""

    ignored: set[int]
    new: int = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.ignored:
            self.ignored.add(storage._cdata)
            self.new += storage.nbytes()
        return tensor  # which keeps the storage, and with it its number

    def take(self) -> float:
        """Bytes for one token."""
        taken, self.new = self.new / TOKENS, 0
        return taken


@pytest.fixture(autouse=True)
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose as on a GPU: the variable-length kernel in 16 bits, and fused dropout."""
    kernel = attention.torch_varlen()
    assert kernel is not None

    def attend(*tensors: Any, dropout: float, softcap: float | None, **more: Any) -> Any:
        return kernel.attend(*tensors, dropout=0.0, softcap=None, **more)

    pretended = dataclasses.replace(kernel, attend=attend)

    def choose(device: Any, dtype: torch.dtype, *_: Any, **__: Any) -> Any:
        return None if dtype == torch.float32 else pretended

    def dropout(x: torch.Tensor, p: float, training: bool = True, inplace: bool = False) -> Any:
        return torch.native_dropout(x, p, True)[0] if training and p else x

    monkeypatch.setattr(attention, "choose_kernel", choose)
    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)


def build(folder: Path, family: str, **changes: Any) -> tuple[Encoder, ModelConfig]:
    """An encoder without storage, or with it where rows are attended to one by one."""
    folder.mkdir(exist_ok=True)
    tree = FAMILIES[family]
    if isinstance(tree, dict):
        (folder / "config.json").write_text(json.dumps(tree))
    else:
        tree.save_pretrained(folder)
    config = ModelConfig(path=str(folder), attention_dropout=0.0, **changes)
    encoder = build_encoder(config, meta=True).train()
    if config.dtype == "float32":
        encoder.to_empty(device="cpu")
        for buffer in encoder.buffers():  # types and positions, of which some are looked up
            buffer.zero_()
    else:
        encoder.to(torch.bfloat16)  # the adapters too, as the trainer has them
    return encoder, config


def measure(encoder: Encoder) -> tuple[float, float]:
    """Bytes a token of the second layer, and of everything."""
    own = [*encoder.parameters(), *encoder.buffers()]
    saved = Saved({tensor.untyped_storage()._cdata for tensor in own})
    ids = torch.zeros(TOKENS, dtype=torch.long, device=own[0].device)
    with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        hidden, context = encoder.embed(ids, torch.tensor([20, TOKENS - 20]))
        hidden = encoder.run_layer(0, hidden, context)
        before = saved.take()
        hidden = encoder.run_layer(1, hidden, context)
        layer = saved.take()
        vectors = encoder.finish(hidden, context)
    assert vectors.requires_grad
    return layer, before + layer + saved.take()


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_a_layer_saves_what_the_plan_says(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    encoder, config = build(tmp_path / "model", family, **changes)
    layer, whole = measure(encoder)
    shape, width = ModelShape.of(encoder, config), 4 if config.dtype == "float32" else 2
    planned = saved_by_layer(shape, width)
    print(f"{family} {changes}: {layer:,.1f} saved, {planned:,.1f} planned")
    assert planned == pytest.approx(layer, rel=0.015)
    # Texts of 20 and 44 tokens: what is saved for each text counts for more than in a real batch.
    planned = saved_outside(shape, width) + 2 * planned - spared_by_first_layer(shape, width)
    assert planned == pytest.approx(whole, rel=0.0075)
    tree = json.loads((tmp_path / "model" / "config.json").read_text())
    assert ModelShape.planned(tree, config) == shape, "counted from config.json alone"


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "bert"])
def test_checkpointed_layers_save_their_input(family: str, tmp_path: Path) -> None:
    encoder, _ = build(tmp_path / "model", family, gradient_checkpointing=True)

    assert measure(encoder)[0] == 2 * 256
