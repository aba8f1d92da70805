"""Adapters of every kind that peft writes: merged as peft merges them, or refused by kind."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import KasaConfig, MontecloraConfig
from peft.utils.peft_types import PeftType

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model.encoder import build_encoder

LAYERS = "model.layers.0.self_attn"
IDS, LENGTHS = torch.arange(3, 20), torch.tensor([12, 5])
TASKS: dict[str | None, Any] = {
    "CAUSAL_LM": hf.AutoModelForCausalLM,
    "SEQ_CLS": hf.AutoModelForSequenceClassification,
    "FEATURE_EXTRACTION": hf.AutoModel,
    None: hf.AutoModelForCausalLM,
}
# LoRA as users configure it; a full name starts with the backbone's name.
LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha by full name": {"alpha_pattern": {f"{LAYERS}.q_proj": 64}},
    "alpha by the end of a name": {"alpha_pattern": {"layers.0.self_attn.q_proj": 64}},
    "alpha by expression": {"alpha_pattern": {r"^model\.layers\.\d+\.self_attn\.q_proj": 64}},
    "rank by full name": {"rank_pattern": {f"{LAYERS}.q_proj": 8}},
    "excluded by full name": {"exclude_modules": [f"{LAYERS}.q_proj"]},
    "excluded by expression": {"exclude_modules": r"model\.layers\.0\..*"},
    "targets by expression": {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
    "targets by full name": {"target_modules": [f"{LAYERS}.q_proj", f"{LAYERS}.v_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1]},
    "one layer by pattern": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
    "all biases": {"bias": "all"},
    "biases of its layers": {"bias": "lora_only"},
    "own bias": {"lora_bias": True},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "trainable tokens": {"trainable_token_indices": [5, 6]},
    "saved norms": {"modules_to_save": ["input_layernorm"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
# Only in a model with a head that predicts tokens.
HEADS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved head": {"modules_to_save": ["lm_head"]},
}
# Settings that other kinds need in addition to their layers.
NEEDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 6]},
    "VBLORA": {"num_vectors": 16, "vector_length": 4, "r": 2},
    "WAVEFT": {"n_frequency": 20},
}
REFUSED = {
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "P_TUNING"),
    *("POLY", "PREFIX_TUNING", "PROMPT_TUNING", "SHADOW", "XLORA"),
}


def lora(**changes: Any) -> peft.LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return peft.LoraConfig(**{**settings, "init_lora_weights": False, **changes})


def other(kind: PeftType) -> peft.PeftConfig:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    names = inspect.signature(config).parameters
    targets = {"target_modules": ["q_proj", "o_proj"]} if "target_modules" in names else {}
    return config(**{**targets, **NEEDS.get(kind.value, {})})


def cases() -> Iterator[Any]:
    for name, changes in LORA.items():
        for task in TASKS:
            own = changes
            if task == "FEATURE_EXTRACTION":  # trained on the backbone alone
                if "layers_to_transform" in changes:  # peft needs a name before `layers`
                    continue
                text = json.dumps(changes).replace("model.", "")
                own = json.loads(text.replace(r"model\\.", ""))
            yield pytest.param(task, lora(**own), id=f"{name}-{task}")
    for name, changes in HEADS.items():
        yield pytest.param("CAUSAL_LM", lora(**changes), id=name)
    for kind in PeftType:
        if kind.value not in {"LORA", *REFUSED}:
            yield pytest.param("CAUSAL_LM", other(kind), id=kind.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model's folder, with biases."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(
        **sizes, **depth, attention_bias=True, initializer_range=0.3, pad_token_id=0
    )
    hf.LlamaForCausalLM(config).save_pretrained(path)
    return path


@functools.cache
def _kept(base: Path, task: str | None) -> Any:
    torch.manual_seed(3)  # a classifier's head is new
    return TASKS[task].from_pretrained(base)


def load_base(base: Path, task: str | None) -> Any:
    return copy.deepcopy(_kept(base, task))


def write_adapter(base: Path, folder: Path, task: str | None, config: peft.PeftConfig) -> None:
    config.task_type = task
    adapted = peft.get_peft_model(load_base(base, task), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)


def merged_by_peft(base: Path, folder: Path, task: str | None) -> dict[str, torch.Tensor]:
    """The backbone's weights after peft's own merge."""
    merged = peft.PeftModel.from_pretrained(load_base(base, task), folder).merge_and_unload()
    backbone = merged if task == "FEATURE_EXTRACTION" else merged.model
    return dict(backbone.state_dict())


def config_of(base: Path, folder: Path, **changes: Any) -> ModelConfig:
    settings = {"path": str(base), "dtype": "float32", "attention": "causal"}
    return ModelConfig(**{**settings, "adapter": str(folder), **changes})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "config"), cases())
def test_an_adapter_is_merged_as_peft_merges_it(
    base: Path, tmp_path: Path, task: str | None, config: Any
) -> None:
    write_adapter(base, tmp_path, task, config)
    wanted = merged_by_peft(base, tmp_path, task)
    before = load_base(base, "FEATURE_EXTRACTION").state_dict()
    encoder = build_encoder(config_of(base, tmp_path))
    found = dict(encoder.backbone.state_dict())
    assert found.keys() == wanted.keys()
    assert any((wanted[name] - before[name]).abs().max() > 1e-3 for name in wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_every_kind_of_adapter_is_either_merged_or_refused() -> None:
    assert {kind.value for kind in PeftType} > REFUSED


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_an_adapter_that_cannot_be_merged_is_refused_by_kind(
    base: Path, tmp_path: Path, kind: str
) -> None:
    tree = {"peft_type": kind, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=f"is {kind}, which cannot be merged"):
        build_encoder(config_of(base, tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alora_invocation_tokens": [3, 4]}, "is LORA with alora_invocation_tokens, which cannot"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication"),
        ({"target_modules": ["lm_head"]}, "adapts none of its layers"),
    ],
)
def test_lora_that_is_no_change_of_the_backbones_weights_is_refused(
    base: Path, tmp_path: Path, changes: Any, words: str
) -> None:
    write_adapter(base, tmp_path, "CAUSAL_LM", lora(**changes))
    for use in ("merge", "continue"):
        with pytest.raises(UserError, match=words):
            build_encoder(config_of(base, tmp_path, adapter_use=use))


@pytest.mark.parametrize("use", ["merge", "continue"])
def test_a_bias_for_a_layer_without_one_is_refused_by_name(
    base: Path, tmp_path: Path, use: str
) -> None:
    write_adapter(base, tmp_path, "CAUSAL_LM", lora(lora_bias=True, target_modules=["down_proj"]))
    with pytest.raises(UserError, match=r"lora_bias\) for .*layers\.0\.mlp\.down_proj, a layer"):
        build_encoder(config_of(base, tmp_path, adapter_use=use))


def test_a_folder_of_adapters_is_refused_with_the_names_of_the_adapters_in_it(
    base: Path, tmp_path: Path
) -> None:
    write_adapter(base, tmp_path / "query", "CAUSAL_LM", lora())
    with pytest.raises(UserError, match="cannot read an adapter") as caught:
        build_encoder(config_of(base, tmp_path))
    assert caught.value.fix == f"give {tmp_path / 'query'}"


def test_an_adapter_with_added_tokens_is_refused_and_one_with_as_many_is_taken(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("same", 50), ("more", 58)):
        model = load_base(base, "CAUSAL_LM")
        model.resize_token_embeddings(size)
        adapted = peft.get_peft_model(model, lora(task_type="CAUSAL_LM"))
        with torch.no_grad():
            adapted.get_input_embeddings().weight.add_(0.1)
        adapted.save_pretrained(tmp_path / name, save_embedding_layers=True)
    encoder = build_encoder(config_of(base, tmp_path / "same"))
    wanted = merged_by_peft(base, tmp_path / "same", "CAUSAL_LM")["embed_tokens.weight"]
    torch.testing.assert_close(encoder.model.embed_tokens.weight, wanted)
    assert "tensors outside of the backbone are not used (1, such as" in capsys.readouterr().err
    with pytest.raises(UserError, match="size mismatch"):
        build_encoder(config_of(base, tmp_path / "more"))


def test_the_second_of_two_adapters_is_merged_into_what_the_first_made(
    base: Path, tmp_path: Path
) -> None:
    write_adapter(base, tmp_path / "first", "CAUSAL_LM", lora())
    half_way = tmp_path / "half"
    peft.PeftModel.from_pretrained(
        load_base(base, "CAUSAL_LM"), tmp_path / "first"
    ).merge_and_unload().save_pretrained(half_way)
    # Its start takes the largest directions out of the weights below it.
    write_adapter(half_way, tmp_path / "second", "CAUSAL_LM", lora(init_lora_weights="pissa"))
    wanted = merged_by_peft(half_way, tmp_path / "second", "CAUSAL_LM")
    config = config_of(base, tmp_path / "second", merged_adapters=(str(tmp_path / "first"),))
    for name, value in build_encoder(config).backbone.state_dict().items():
        torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=0)


def test_merging_leaves_the_runs_random_numbers_alone(base: Path, tmp_path: Path) -> None:
    write_adapter(base, tmp_path, "CAUSAL_LM", lora(modules_to_save=["input_layernorm"]))
    torch.manual_seed(7)
    build_encoder(config_of(base, tmp_path))
    drawn = torch.rand(1)
    torch.manual_seed(7)
    build_encoder(config_of(base, tmp_path, adapter=None))
    assert drawn == torch.rand(1)


def test_an_adapter_with_an_embedding_of_its_own_is_not_continued(
    base: Path, tmp_path: Path
) -> None:
    adapted = peft.get_peft_model(load_base(base, "CAUSAL_LM"), lora(task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(UserError, match=r"continue, but .*\(a saved embed_tokens"):
        build_encoder(config_of(base, tmp_path, adapter_use="continue"))


CONTINUED = [
    "embedding",
    *("alpha by full name", "alpha by expression", "rank by full name", "excluded by full name"),
    *("targets by expression", "one layer", "dora", "all linear layers"),
]


@pytest.mark.parametrize("name", CONTINUED)
def test_an_adapter_of_a_causal_model_is_continued_with_its_own_scales(
    base: Path, tmp_path: Path, name: str
) -> None:
    write_adapter(base, tmp_path / "a", "CAUSAL_LM", lora(**LORA[name]))
    encoder = build_encoder(config_of(base, tmp_path / "a", adapter_use="continue"))
    assert all(
        ("lora_" in name) == parameter.requires_grad
        for name, parameter in encoder.named_parameters()
    )
    # It is saved as the same adapter, under the names of the backbone alone.
    encoder.save_adapter(tmp_path / "b")
    wanted = merged_by_peft(base, tmp_path / "a", "CAUSAL_LM")
    again = merged_by_peft(base, tmp_path / "b", "FEATURE_EXTRACTION")
    encoder.merge_adapters()
    for found in (again, encoder.backbone.state_dict()):
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["IA3", "LOHA", "OFT"])
def test_an_adapter_of_another_kind_is_continued_and_saved_as_itself(
    base: Path, tmp_path: Path, kind: str
) -> None:
    write_adapter(base, tmp_path / "a", "CAUSAL_LM", other(PeftType[kind]))
    encoder = build_encoder(config_of(base, tmp_path / "a", adapter_use="continue"))
    encoder.save_adapter(tmp_path / "b")
    wanted = merged_by_peft(base, tmp_path / "a", "CAUSAL_LM")
    for key, value in merged_by_peft(base, tmp_path / "b", "FEATURE_EXTRACTION").items():
        torch.testing.assert_close(value, wanted[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("key", ["kasa_config", "monteclora_config"])
def test_lora_that_trains_by_rules_of_its_own_is_not_continued(
    base: Path, tmp_path: Path, key: str
) -> None:
    kind = {"kasa_config": KasaConfig, "monteclora_config": MontecloraConfig}[key]
    write_adapter(base, tmp_path, "CAUSAL_LM", lora(**{key: kind()}))
    with pytest.raises(UserError, match=f"adapter_use: continue.*{key}"):
        build_encoder(config_of(base, tmp_path, adapter_use="continue"))


@pytest.mark.parametrize("name", ["all biases", "saved norms", "pissa"])
def test_an_adapter_that_changes_weights_below_it_is_not_continued(
    base: Path, tmp_path: Path, name: str
) -> None:
    write_adapter(base, tmp_path, "CAUSAL_LM", lora(**LORA[name]))
    with pytest.raises(UserError, match="adapter_use: continue"):
        build_encoder(config_of(base, tmp_path, adapter_use="continue"))


def test_an_adapter_of_an_encoder_with_a_head_is_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    model = hf.BertForSequenceClassification(hf.BertConfig(**sizes, **depth))
    model.save_pretrained(tmp_path / "base")
    config = lora(
        task_type="SEQ_CLS",
        target_modules=["query", "dense"],
        alpha_pattern={"bert.encoder.layer.0.attention.self.query": 64},
    )
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = adapted.merge_and_unload().bert.state_dict()
    merged = config_of(tmp_path / "base", tmp_path / "adapter", attention="bidirectional")
    for name, value in build_encoder(merged).backbone.state_dict().items():
        torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=0)
