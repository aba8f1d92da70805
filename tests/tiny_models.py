"""Very small models with their tokenizers, and exports of them, for tests that need real ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config

from pipeline.config import ModelConfig, PrepareConfig, SourceConfig, StarterConfig, Template
from pipeline.data.prepare import prepare
from pipeline.model.encoder import Encoder, build_encoder
from pipeline.model.export import export_encoder
from pipeline.model.starter import build_starter


def tiny_starter(folder: Path, corpus: Path, **changes: Any) -> Path:
    """A Dream-layout folder of random weights, with a tokenizer trained on the corpus."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2}
    return build_starter(StarterConfig(output_dir=folder, corpus=(corpus,), **{**sizes, **changes}))


def prepare_tiny(folder: Path, num_rows: int = 16) -> PrepareConfig:
    """A model in `folder/model` and shards of a few rows by its tokenizer, in `folder/shards`."""
    rows = [{"query": f"question {i}", "positives": [f"answer {i}"]} for i in range(num_rows)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrepareConfig(
        output_dir=folder / "shards",
        tokenizer=str(tiny_starter(folder / "model", path, num_layers=1)),
        sources=(SourceConfig(name="rows", format="columns", path=str(path)),),
        max_query_length=16,
        max_document_length=16,
    )
    prepare(config, num_workers=1)
    return config


@dataclasses.dataclass(frozen=True)
class TokenizerSource:
    """The tokenizer of a dataset, as an export needs it."""

    path: str
    append_eos: bool = False


def export_tiny(
    config: ModelConfig, output: Path, *, encoder: Encoder | None = None, **changes: Any
) -> Path:
    """An export of the config's model, or of an encoder made of it, with its tokenizer."""
    settings = {
        "tokenizer": TokenizerSource(config.path),
        "template": Template(),
        "max_length": 64,
        "card": {"step": 0, "recipe": ""},
    }
    return export_encoder(
        encoder or build_encoder(config),
        config=config,
        output_dir=output,
        **{**settings, **changes},
    )


def save_lifted(folder: Path, kind: Any, **changes: Any) -> Path:
    """A random Qwen2 of transformers' class `kind` whose gradients lie far above rounding."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 500,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    model = kind(Qwen2Config(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    return folder
