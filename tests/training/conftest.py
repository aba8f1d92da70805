"""A tiny model and a tiny recipe that the trainer's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen2Model

from tests.support import share_folder
from tests.tiny_models import save_lifted
from tests.training.tiny_recipe import make_recipe


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of 6 steps over 24 examples, with dropout and a learned temperature."""
    return share_folder(tmp_path_factory, "recipe", make_recipe) / "train.yaml"


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lifted(tmp_path_factory.mktemp("model"), Qwen2Model, num_hidden_layers=3)
