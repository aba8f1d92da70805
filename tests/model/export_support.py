"""Exports of small models with weights that matter, and their cards read and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import ModelConfig, Template
from pipeline.model.encoder import Encoder, build_encoder
from pipeline.model.export import export_encoder
from tests.tiny_models import TokenizerSource

TEMPLATE = Template(query="Task: {instruction}\nQ: {text}", document="D: {text}")


def make(starter: Path, seed: int = 0, **changes: Any) -> tuple[Encoder, ModelConfig]:
    """An encoder of the starter's shape with weights large enough that attention matters."""
    config = ModelConfig(path=str(starter), dtype="float32", **changes)
    encoder = build_encoder(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return encoder, config


def export(encoder: Encoder, config: ModelConfig, starter: Path, out: Path, **changes: Any) -> Path:
    arguments = {
        "config": config,
        "tokenizer": TokenizerSource(str(starter)),
        "template": TEMPLATE,
        "max_length": 64,
        "output_dir": out,
        "card": {"step": 3, "recipe": "num_steps: 3\n", "data": "| source | rows |"},
    }
    return export_encoder(encoder, **{**arguments, **changes})


def card_of(folder: Path) -> str:
    """The text of the model card."""
    return (folder / "README.md").read_text()


def run_card(folder: Path, texts: list[str], prompt: str = "") -> np.ndarray:
    """Run the code of the model card that uses transformers, on `texts`."""
    code = card_of(folder).split("```python\nimport torch")[1].split("```")[0]
    line = next(line for line in code.splitlines() if line.startswith("prompt, texts = "))
    code = code.replace('"PATH"', repr(str(folder)))
    code = code.replace(line, f"prompt, texts = {prompt!r}, {texts!r}")
    scope: dict[str, Any] = {}
    exec("import torch" + code, scope)
    return scope["vectors"].detach().numpy()
