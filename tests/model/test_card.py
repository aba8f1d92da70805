"""What a model card says is true, and the code on it runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

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


def test_the_card_says_what_is_needed_and_under_which_licence(
    starter: Path, tmp_path: Path
) -> None:
    encoder, config = make(starter, pool_instruction=False)
    assert "whose card was not at hand" in card_of(export(encoder, config, starter, tmp_path / "a"))
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
