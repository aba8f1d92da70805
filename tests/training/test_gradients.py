"""The merge gate: gradients through caching, chunking and ZeRO equal plain autograd's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from tests.support import launch_ranks

WORKER = Path(__file__).with_name("parity_worker.py")


@pytest.fixture(scope="module")
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


@pytest.mark.parametrize("world_size", [1, 2])
def test_cached_sharded_gradients_equal_plain_gradients(model_path: Path, world_size: int) -> None:
    output = launch_ranks(world_size, WORKER, str(model_path), timeout=280)
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(results) == 3 * 8 * 2
    for result in results:
        assert result["error"] <= 1e-5, result
        assert result["loss"] == pytest.approx(result["reference_loss"], rel=1e-6), result
