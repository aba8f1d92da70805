"""A tiny model and a tiny recipe that the trainer's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from tests.training.tiny_recipe import make_recipe


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of 6 steps over 24 examples, with dropout and a learned temperature."""
    return make_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = Qwen2Model(
        Qwen2Config(
            vocab_size=500,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    with torch.no_grad():  # lifts gradients far above rounding
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(path)
    return path
