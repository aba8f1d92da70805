"""Gradients of token prediction at two ranks equal those of transformers' models in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2ForCausalLM

from tests.support import launch_ranks
from tests.tiny_models import save_lifted

WORKER = Path(__file__).with_name("token_parity_worker.py")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    models = [
        save_lifted(tmp_path_factory.mktemp("model"), Qwen2ForCausalLM, tie_word_embeddings=tied)
        for tied in (False, True)
    ]
    printed = launch_ranks(2, WORKER, *map(str, models))
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def test_token_gradients_equal_those_of_plain_transformers(cases: list[dict[str, Any]]) -> None:
    assert len(cases) == 3 * 6
    for case in cases:
        assert case["error"] < 1e-5, case


def test_the_loss_is_that_of_plain_transformers(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        assert case["loss"] == pytest.approx(case["reference_loss"], rel=1e-5), case
