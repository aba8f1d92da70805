"""Adapters that are added fresh, continued, or merged below others."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from pipeline.config import LoraConfig, ModelConfig, build_config
from pipeline.errors import UserError
from pipeline.model.adapters import FusedLoraLinear, add_lora
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


class Stack(torch.nn.Module):
    """Two linear layers, with and without bias, and a state between them that others may read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(12, 20)
        self.second = torch.nn.Linear(20, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def fused_and_plain(dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[Any, Any]:
    """Layers as they are trained, and the same ones with peft's own forward."""
    torch.manual_seed(3)
    config = LoraConfig(**{"rank": 4, "dropout": 0.0, "targets": "all-linear", **changes})
    fused = add_lora(Stack().to(dtype), config).to(dtype)
    for name, parameter in fused.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    plain = copy.deepcopy(fused)
    for module in plain.modules():
        if isinstance(module, FusedLoraLinear):
            module.__class__ = peft.tuners.lora.Linear
    return fused, plain


def inner(model: Any) -> Any:
    """The adapted layers; peft's wrapper takes token ids."""
    return model.get_base_model()


def gradients(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of a model, with the dropout masks of one seed."""
    x = x.clone().requires_grad_()
    torch.manual_seed(4)
    out = inner(model)(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("shape", [(5, 12), (1, 5, 12), (2, 3, 12), (0, 12)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_fused_sum_is_the_sum_of_peft(
    shape: tuple[int, ...], dropout: float, rslora: bool
) -> None:
    fused, plain = fused_and_plain(rank=3, alpha=5, dropout=dropout, rslora=rslora)
    assert sum(isinstance(module, FusedLoraLinear) for module in fused.modules()) == 2
    fused.train(), plain.train()
    x = torch.randn(shape, dtype=torch.float64)
    found, wanted = gradients(fused, x), gradients(plain, x)
    assert found.keys() == wanted.keys() and len(found) == 6
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-13, rtol=1e-13)


def test_a_fused_sum_is_rounded_once_in_bfloat16() -> None:
    fused, plain = fused_and_plain(torch.bfloat16)
    exact = copy.deepcopy(plain).double()
    x = torch.randn(400, 12, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = inner(exact)(x.double())
        errors = [float((inner(model)(x).double() - wanted).norm()) for model in (fused, plain)]
    assert errors[0] < errors[1]


def test_float32_adapters_of_a_bfloat16_model_compute_as_in_peft() -> None:
    fused, plain = fused_and_plain(torch.bfloat16)
    for model in (fused, plain):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    found, wanted = gradients(fused, x), gradients(plain, x)
    assert found["out"].dtype == torch.bfloat16
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_fused_layers_are_disabled_and_merged_by_peft() -> None:
    fused, _ = fused_and_plain()
    x = torch.randn(3, 12, dtype=torch.float64)
    adapted = inner(fused)(x)
    with fused.disable_adapter():
        assert not torch.allclose(inner(fused)(x), adapted)
    torch.testing.assert_close(fused.merge_and_unload()(x), adapted)


def test_of_several_adapters_those_that_are_on_are_added_where_they_exist() -> None:
    fused, plain = fused_and_plain()
    for model in (fused, plain):
        torch.manual_seed(7)
        other = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
        model.add_adapter("other", other)
        model.double()
    x = torch.randn(3, 12, dtype=torch.float64)
    for chosen in ("default", "other", ["default", "other"], []):
        for model in (fused, plain):
            model.base_model.set_adapter(chosen)
        torch.testing.assert_close(inner(fused)(x), inner(plain)(x))


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_a_continued_adapter_of_another_kind_computes_as_in_peft(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    hf.LlamaForCausalLM(llama(attention_bias=True)).save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **changes),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    config = ModelConfig(
        path=str(tmp_path / "base"), dtype="float32", attention="causal", normalize=False,
        adapter=str(tmp_path / "adapter"), adapter_use="continue",
    )  # fmt: skip
    encoder = build_encoder(config)
    torch.testing.assert_close(encoder(IDS, LENGTHS), reference(adapted.eval()), atol=1e-5, rtol=0)
