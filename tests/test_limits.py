"""A model's limits by its files, and every command that holds texts against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from pipeline.config import ModelConfig, Template, build_config
from pipeline.errors import UserError
from pipeline.model.encoder import build_encoder
from pipeline.tokenizer import ModelLimits, limits_of, read_limits, warn_of_declared

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
ABSOLUTE: list[tuple[Any, int]] = [
    (hf.BertConfig(**SIZES, max_position_embeddings=32), 32),
    (hf.RobertaConfig(**SIZES, max_position_embeddings=34, pad_token_id=1), 32),
    (hf.RobertaConfig(**SIZES, max_position_embeddings=34, pad_token_id=0), 33),
    (hf.XLMRobertaConfig(**SIZES, max_position_embeddings=34, pad_token_id=1), 32),
    (hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32), 32),
]


@pytest.mark.parametrize(("config", "longest"), ABSOLUTE)
def test_the_longest_text_is_the_longest_that_the_model_embeds(
    tmp_path: Path, config: Any, longest: int
) -> None:
    hf.AutoModel.from_config(config).save_pretrained(tmp_path)
    limits = read_limits(str(tmp_path))
    assert (limits.positions, limits.tokens) == (longest, 50)
    encoder = build_encoder(ModelConfig(path=str(tmp_path), dtype="float32"))
    encoder(torch.arange(3, 3 + longest), torch.tensor([longest]))
    with pytest.raises(UserError, match=f"{longest + 1} tokens, but .* {longest} positions"):
        encoder(torch.arange(3, 4 + longest), torch.tensor([longest + 1]))


def test_rotary_positions_have_no_end_but_a_trained_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "max_position_embeddings": 64, "vocab_size": 50})
    )
    limits = read_limits(str(tmp_path), factor=2.0)
    assert (limits.positions, limits.trained) == (None, 128)
    limits.require_length({"max_document_length": 4096}, fix="")
    limits.warn_of_length({"max_document_length": 128})
    assert capsys.readouterr().err == ""
    limits.warn_of_length({"max_document_length": 129})
    assert "129 tokens, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tree", "tokens"),
    [
        ({"vocab_size": 50, "embedding_size": 64}, 64),  # LLaDA's padded rows
        ({"text_config": {"vocab_size": 50}, "vocab_size": 7}, 50),  # Gemma 3 with images
        ({"vocab_size": "many"}, None),
        ({}, None),
    ],
)
def test_the_number_of_tokens_is_read_from_every_form_of_config(
    tree: dict[str, Any], tokens: int | None
) -> None:
    assert limits_of(tree, "m").tokens == tokens


def test_rows_are_counted_in_the_weights_where_they_are_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 50}')
    save_file({"embed_tokens.weight": torch.ones(51, 4)}, tmp_path / "part.safetensors")
    index = {"weight_map": {"embed_tokens.weight": "part.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_limits(str(tmp_path)).tokens == 51
    (tmp_path / "part.safetensors").write_bytes(b"\xff" * 20)
    assert read_limits(str(tmp_path)).tokens == 50
    assert read_limits(str(tmp_path / "none")) == ModelLimits(path=str(tmp_path / "none"))


def declare(folder: Path, pooling: dict[str, Any], *, normalize: bool = True) -> str:
    """Write the files of a sentence-transformers folder that say how its vectors are made."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"path": f"{number}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    prompts = {"prompts": {"query": "query: ", "document": ""}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return str(folder)


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [
        ({"pooling_mode": "cls"}, "first_token"),
        ({"pooling_mode": "lasttoken"}, "last_token"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first_token"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
    ],
)
def test_a_run_that_names_no_pooling_takes_the_one_that_its_model_was_made_with(
    tmp_path: Path, pooling: dict[str, Any], wanted: str
) -> None:
    path = declare(tmp_path, pooling)
    assert ModelConfig(path=path).pooling == wanted
    assert build_config(ModelConfig, {"path": path}, origin="t").pooling == wanted
    assert ModelConfig(path=path, pooling="mean").pooling == "mean"
    assert ModelConfig(path=str(tmp_path / "plain")).pooling == "mean"


def test_a_pooling_that_does_not_exist_here_has_to_be_replaced_in_the_config(
    tmp_path: Path,
) -> None:
    path = declare(tmp_path, {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True})
    with pytest.raises(UserError, match=r"model\.pooling: none.*max\+mean"):
        ModelConfig(path=path)
    assert ModelConfig(path=path, pooling="mean").pooling == "mean"


def test_what_a_run_does_unlike_its_model_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = declare(tmp_path, {"pooling_mode": "cls"}, normalize=False)
    warn_of_declared(ModelConfig(path=path, pooling="mean"), Template())
    told = capsys.readouterr().err
    assert "model.pooling: mean" in told and "without normalisation" in told
    assert "'query: '" in told
    fitting = Template(query="query: {text}", document="passage: {text}")
    warn_of_declared(ModelConfig(path=path, normalize=False), fitting)
    assert capsys.readouterr().err == ""
