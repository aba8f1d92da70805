"""Shards held against the model that is to learn from them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_support import ConfigMaker, write_jsonl

from pipeline.config import ModelConfig, SourceConfig
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.errors import UserError


def model_of(folder: Path, **config: Any) -> ModelConfig:
    """A model of which there is only a config."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig(path=str(folder))


def test_shards_with_a_longer_text_than_the_model_has_positions_are_refused(
    dataset: Dataset, tmp_path: Path
) -> None:
    longest = dataset.manifest.document_lengths.longest
    fitting = {"model_type": "bert", "vocab_size": 10**6, "max_position_embeddings": longest}
    dataset.require_model(model_of(tmp_path / "bert", **fitting))
    shorter = {**fitting, "max_position_embeddings": longest - 1}
    with pytest.raises(UserError, match=f"longest document: {longest} tokens, but"):
        dataset.require_model(model_of(tmp_path / "bert", **shorter))


def test_only_tokens_that_a_text_has_need_a_row_of_the_embedding(
    dataset: Dataset, tmp_path: Path
) -> None:
    largest = dataset.largest_token()
    more = dataclasses.replace(dataset.tokenizer, vocab_size=largest + 9)
    dataset = Dataset(dataset.folder, dataclasses.replace(dataset.manifest, tokenizer=more))
    dataset.require_model(model_of(tmp_path / "m", model_type="qwen2", vocab_size=largest + 1))
    with pytest.raises(UserError, match=f"token {largest}, but the embedding .* {largest} rows"):
        dataset.require_model(model_of(tmp_path / "m", model_type="qwen2", vocab_size=largest))


def test_prepare_refuses_texts_longer_than_the_tokenizers_model_has_positions(
    make_config: ConfigMaker, tmp_path: Path, tokenizer_path: Path
) -> None:
    folder = Path(shutil.copytree(tokenizer_path, tmp_path / "bert"))
    tree = {"model_type": "bert", "max_position_embeddings": 32, "vocab_size": 10**6}
    (folder / "config.json").write_text(json.dumps(tree))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"query": "q", "positives": ["d"]}])
    source = SourceConfig(name="s", format="columns", path=str(path))
    config = make_config(source, tokenizer=str(folder), max_query_length=32)
    with pytest.raises(UserError, match=r"max_document_length: \d+ tokens.*allowed: at most 32"):
        prepare(config, num_workers=1)
