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
CASES = [(world_size, name) for world_size in (2, 3) for name in list_cases(world_size)]
on_all_ranks = pytest.mark.parametrize(("world_size", "name"), CASES)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, Any]]:
    """Return the results of all cases, by ranks and name; one launch per number of ranks."""
    models = [
        save_lifted(tmp_path_factory.mktemp("model"), Qwen2ForCausalLM, tie_word_embeddings=tied)
        for tied in (False, True)
    ]
    found = {}
    for world_size in (2, 3):
        printed = launch_ranks(world_size, WORKER, *map(str, models))
        results = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        found.update({(world_size, result["case"]): result for result in results})
    return found


@on_all_ranks
def test_token_gradients_equal_those_of_plain_transformers(
    cases: dict[tuple[int, str], dict[str, Any]], world_size: int, name: str
) -> None:
    case = cases[world_size, name]
    assert case["error"] < 1e-5, case["worst"]


@on_all_ranks
def test_the_loss_is_that_of_plain_transformers(
    cases: dict[tuple[int, str], dict[str, Any]], world_size: int, name: str
) -> None:
    case = cases[world_size, name]
    assert case["loss"] == pytest.approx(case["reference_loss"], rel=1e-5)
    assert case["accuracy"] == pytest.approx(case["reference_accuracy"])


def test_some_predictions_are_right(cases: dict[tuple[int, str], dict[str, Any]]) -> None:
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
