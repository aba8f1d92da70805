"""The statements of a model card are true, its header can be read, and its code runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from huggingface_hub import EvalResult, ModelCard

from pipeline.model.card import add_evaluation
from pipeline.model.load_export import load_export
from tests.model.conftest import CORPUS
from tests.model.export_support import card_of, export, make, run_card


def test_card_code_for_transformers_alone_gives_the_same_vectors(
    starter: Path, tmp_path: Path
) -> None:
    for pooling in ("mean", "weighted_mean", "last_token", "first_token"):
        encoder, config = make(starter, pooling=pooling, dimensions=20)
        folder = export(encoder, config, starter, tmp_path / pooling)
        card = card_of(folder)
        ours = load_export(folder).encode_texts(CORPUS)
        np.testing.assert_allclose(run_card(folder, CORPUS), ours, atol=1e-5)
        assert "num_steps: 3" in card and "| source | rows |" in card


def test_the_hub_reads_a_card_with_and_without_scores(starter: Path, tmp_path: Path) -> None:
    folder = export(*make(starter), starter, tmp_path / "export")
    before = ModelCard.load(folder / "README.md")
    scores = [
        EvalResult(
            task_type="Retrieval",
            dataset_type=task,
            dataset_name=task,
            metric_type="ndcg_at_10",
            metric_value=score,
            metric_args={"max_length": 64},
        )
        for task, score in (("Letters", 0.25), ("Laws", 0.5))
    ]
    for _ in range(2):  # new scores replace old ones
        add_evaluation(folder, "| task | score |", name="tiny", results=scores)
    after = ModelCard.load(folder / "README.md")
    assert before.data.library_name == after.data.library_name == "sentence-transformers"
    assert before.data.tags == ["sentence-transformers", "feature-extraction", "diffembed"]
    assert (before.data.eval_results, after.data.eval_results) == (None, scores)
    assert after.data.model_name == "tiny"
    assert after.text == before.text.replace("Not evaluated yet.", "| task | score |")


def test_the_card_says_what_is_needed_and_under_which_licence(
    starter: Path, tmp_path: Path
) -> None:
    encoder, config = make(starter, pool_instruction=False)
    assert "was not available, so its licence is not known" in card_of(
        export(encoder, config, starter, tmp_path / "a")
    )
    base = tmp_path / "base"
    shutil.copytree(starter, base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    for attention, needs in (("bidirectional", "flash_attention_2"), ("causal", "Any version")):
        encoder, config = make(base, attention=attention, pool_instruction=False)
        card = card_of(export(encoder, config, starter, tmp_path / attention))
        assert "license: apache-2.0" in card.split("---")[1]
        assert "is under `apache-2.0`" in card
        assert needs in card.split("## Needs")[1].split("##")[0]
        # The space behind the prompt is the text's.
        assert (
            "queries = model.encode(['...'])\ndocuments = model.encode([' ...'], prompt='D:')"
            in card
        )
    assert str(base) not in card.split("## Recipe")[0].split("---")[1]
