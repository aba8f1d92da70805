"""What servers read in an export, by the rules of their own readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model.card import licence_keys, serving_table
from pipeline.model.export import check_output
from pipeline.model.load_export import load_export
from tests.model.export_support import card_of, export, make


def pooling_of_tei(settings: dict[str, Any]) -> str | None:
    """text-embeddings-inference: two booleans must be there, a third may be."""
    cls, mean = settings["pooling_mode_cls_token"], settings["pooling_mode_mean_tokens"]
    last = settings.get("pooling_mode_lasttoken", False)
    assert all(isinstance(flag, bool) for flag in (cls, mean, last))
    return "cls" if cls else "mean" if mean else "last_token" if last else None


def pooling_of_old_vllm(settings: dict[str, Any]) -> str:
    """vLLM before it knew `pooling_mode`: the name of the first key that is true."""
    return next(key for key, value in settings.items() if value is True)


@pytest.mark.parametrize(
    ("pooling", "tei", "flag"),
    [
        ("mean", "mean", "pooling_mode_mean_tokens"),
        ("first_token", "cls", "pooling_mode_cls_token"),
        ("last_token", "last_token", "pooling_mode_lasttoken"),
        ("weighted_mean", None, "pooling_mode_weightedmean_tokens"),
    ],
)
def test_servers_old_and_new_read_the_same_pooling(
    starter: Path, tmp_path: Path, pooling: Any, tei: str | None, flag: str
) -> None:
    folder = export(*make(starter, pooling=pooling), starter, tmp_path / "export")
    settings = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling_of_tei(settings) == tei  # what it lacks it refuses
    assert pooling_of_old_vllm(settings) == flag
    assert settings["word_embedding_dimension"] == 32 and settings["include_prompt"] is True
    # The new form is left out by readers of the old one, and the other way round.
    old = {key: value for key, value in settings.items() if key != "pooling_mode"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    assert load_export(folder).encoder.config.pooling == pooling


def test_vectors_are_compared_as_in_training(starter: Path, tmp_path: Path) -> None:
    for normalize, trained, wanted in (
        (False, "dot", "dot"),
        (False, "cosine", "cosine"),
        (True, "dot", "cosine"),  # equal for unit vectors
    ):
        model = make(starter, normalize=normalize)
        folder = export(*model, starter, tmp_path / f"{normalize}-{trained}", similarity=trained)
        settings = json.loads((folder / "config_sentence_transformers.json").read_text())
        assert settings["similarity_fn_name"] == wanted
        assert ("Normalize" in (folder / "modules.json").read_text()) == normalize


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


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file"):
        check_output(tmp_path / "file")
    with pytest.raises(UserError, match="--output"):
        check_output(tmp_path / "file" / "export")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty and not an export"):
        check_output(tmp_path / "full")
    check_output(tmp_path / "new" / "export")
    assert not (tmp_path / "new" / "export").exists()


def test_a_card_tells_which_servers_would_mask_a_bidirectional_decoder() -> None:
    def table(family: str, decoder: bool = True, **changes: Any) -> dict[str, str]:
        config = ModelConfig(path="m", **changes)
        text = serving_table(config, family=family, decoder=decoder, similarity="dot")
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
