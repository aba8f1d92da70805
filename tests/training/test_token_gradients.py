"""Gradients of token prediction at two ranks equal those of transformers' models in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.support import launch_ranks

WORKER = Path(__file__).with_name("token_parity_worker.py")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    paths = []
    for tied in (False, True):
        path = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=500,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                tie_word_embeddings=tied,
            )
        )
        with torch.no_grad():  # lifts gradients far above rounding
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3)
        model.save_pretrained(path)
        paths.append(str(path))
    printed = launch_ranks(2, WORKER, *paths, timeout=280)
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def test_token_gradients_equal_those_of_plain_transformers(cases: list[dict[str, Any]]) -> None:
    assert len(cases) == 3 * 6
    for case in cases:
        assert case["error"] < 1e-5, case


def test_the_loss_is_that_of_plain_transformers(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        assert case["loss"] == pytest.approx(case["reference_loss"], rel=1e-5), case
