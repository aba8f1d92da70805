"""Gradients of token prediction on two ranks equal transformers' own in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, Qwen2ForCausalLM

from pipeline.config import DataConfig, MntpConfig, ModelConfig, ObjectiveConfig, TrainConfig
from pipeline.data.shards import Dataset
from pipeline.training.token_step import TokenPrediction
from tests.support import launch_ranks
from tests.tiny_models import save_lifted
from tests.training.token_parity_worker import list_cases

WORKER = Path(__file__).with_name("token_parity_worker.py")
CASES = tuple(list_cases())


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What all cases gave, by their names; one launch of two ranks does them all."""
    models = [
        save_lifted(tmp_path_factory.mktemp("model"), Qwen2ForCausalLM, tie_word_embeddings=tied)
        for tied in (False, True)
    ]
    printed = launch_ranks(2, WORKER, *map(str, models))
    results = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return {result["case"]: result for result in results}


@pytest.mark.parametrize("name", CASES)
def test_token_gradients_equal_those_of_plain_transformers(
    cases: dict[str, dict[str, Any]], name: str
) -> None:
    assert cases[name]["error"] < 1e-5, cases[name]["worst"]


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_plain_transformers(
    cases: dict[str, dict[str, Any]], name: str
) -> None:
    case = cases[name]
    assert case["loss"] == pytest.approx(case["reference_loss"], rel=1e-5)
    assert case["accuracy"] == pytest.approx(case["reference_accuracy"])


def test_some_predictions_are_right(cases: dict[str, dict[str, Any]]) -> None:
    """Equal accuracies would otherwise show nothing."""
    assert any(case["accuracy"] > 0 for case in cases.values())


def test_the_tokenizers_special_tokens_are_never_hidden_nor_anything_but_the_chosen_mask(
    recipe: Path,
) -> None:
    model = ModelConfig(path=str(recipe.parent / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    config = TrainConfig(
        output_dir=Path("unused"),
        num_steps=1,
        model=model,
        data=DataConfig(path=recipe.parent / "shards"),
        objective=ObjectiveConfig(mntp=MntpConfig(mask_token="a")),
    )
    dataset = Dataset.open(config.data.path)
    vocabulary = TokenPrediction(config, dataset)._vocabulary
    assert tokenizer.all_special_ids
    assert vocabulary.special == set(tokenizer.all_special_ids)
    assert vocabulary.mask == tokenizer.convert_tokens_to_ids("a")
    assert vocabulary.size == len(tokenizer)
