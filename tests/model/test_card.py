"""The statements of a model card are true, its header can be read, and its code runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard

from pipeline.config import ModelConfig
from pipeline.model.card import add_evaluation, licence_keys
from pipeline.model.load_export import load_export
from pipeline.model.servers import Windows, serving_table
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


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({"license": "Apache 2.0"}, {"license": "apache-2.0"}),
        ({"license": ["mit", "apache-2.0"]}, {"license": ["mit", "apache-2.0"]}),
        ({"license": ["mit"]}, {"license": "mit"}),
        (
            {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"},
            {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"},
        ),
        ({"license": "my own terms"}, {"license": "other", "license_name": "my-own-terms"}),
        ({"license": ["mit", "mine"]}, {"license": "other", "license_name": "mit-mine"}),
        ({"license_name": "mine"}, {"license": "other", "license_name": "mine"}),
        ({"license": None}, {}),
        ({}, {}),
    ],
)
def test_a_card_names_licences_that_the_hub_accepts(found: Any, wanted: Any) -> None:
    assert licence_keys(found) == wanted


@pytest.mark.parametrize(
    "content", [b"---\nlicense: [mit\n---\n", b"\xff\xfe\x00", b"---\n- a\n- b\n---\n"]
)
def test_a_damaged_card_of_the_base_is_said_and_costs_no_export(
    starter: Path, tmp_path: Path, content: bytes, capsys: Any
) -> None:
    model = make(starter)
    (starter / "README.md").write_bytes(content)
    try:
        folder = export(*model, starter, tmp_path / "export")
    finally:
        (starter / "README.md").unlink()
    assert "WARNING: the model card of" in capsys.readouterr().err
    assert "license:" not in card_of(folder)


NO_WINDOWS = Windows()


@pytest.mark.parametrize(
    ("hf_config", "windows"),
    [
        ({}, NO_WINDOWS),
        ({"sliding_window": None}, NO_WINDOWS),
        ({"sliding_window": 8}, Windows(size=8)),
        ({"sliding_window": 8, "layer_types": ["full_attention"] * 2}, NO_WINDOWS),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"] * 2}, Windows(size=8)),
        (
            {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
            Windows(size=8, mixed=True),
        ),
    ],
)
def test_windows_are_those_of_the_layers(hf_config: dict[str, Any], windows: Windows) -> None:
    assert Windows.of(hf_config) == windows


def test_a_card_tells_which_servers_would_mask_a_bidirectional_decoder() -> None:
    def table(
        family: str, decoder: bool = True, windows: Windows = NO_WINDOWS, **changes: Any
    ) -> dict[str, str]:
        config = ModelConfig(path="m", **changes)
        text = serving_table(
            config, family=family, decoder=decoder, similarity="dot", windows=windows
        )
        rows = [line.split(" | ", 1) for line in text.splitlines() if line.startswith("| ")]
        assert text.startswith("This decoder attends in both directions") == (
            decoder and config.attention == "bidirectional"
        )
        return {name.removeprefix("| "): rest for name, rest in rows}

    assert "honours `is_causal: false`" in table("qwen2")["vLLM"]
    assert table("gemma2")["vLLM"].startswith("**no**")
    assert "attention `eager`" in table("gemma2")["transformers"]
    assert "use_bidirectional_attention" in table("llama")["text-embeddings-inference"]
    assert table("qwen2")["infinity"].startswith("**no**")
    causal = table("gemma2", attention="causal", normalize=False)
    assert causal["vLLM"].startswith("yes") and causal["infinity"].startswith("**no**")
    encoder = table("bert", decoder=False)
    assert all(rest.startswith("yes") for name, rest in encoder.items() if name in ("vLLM",))
    assert table("qwen2", pooling="weighted_mean")["vLLM"].startswith("**no**")
    # vLLM 0.32 gave the vectors of these exports with such config.json files, others without.
    gemma = table("gemma3_text", windows=Windows(size=512, mixed=True))["vLLM"]
    assert '"use_bidirectional_attention": true` and `"sliding_window": 1024`' in gemma
    assert "is_causal" not in gemma
    assert '"sliding_window": 4097' in table("mistral", windows=Windows(size=4096))["vLLM"]
    assert "sliding_window" not in table("mistral")["vLLM"]
    near = table("mistral", windows=Windows(size=4096), attention="causal")["vLLM"]
    assert near.startswith("yes") and "sliding_window" not in near
    for attention in ("causal", "bidirectional"):
        mixed = table("qwen3", windows=Windows(size=64, mixed=True), attention=attention)["vLLM"]
        assert mixed.startswith("**no** | it refuses Qwen with a window")
