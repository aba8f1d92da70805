"""A starter has Dream's layout, comes out the same from a seed, and replaces only a starter."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Config

from pipeline.config import ModelConfig, StarterConfig
from pipeline.errors import UserError
from pipeline.model.encoder import build_encoder
from pipeline.model.starter import build_starter
from tests.model.conftest import CORPUS


def test_starter_has_the_layout_of_a_published_dream_checkpoint(starter: Path) -> None:
    config = json.loads((starter / "config.json").read_text())
    assert config["model_type"] == "Dream"
    assert config["mask_token_id"] == 399
    names = set(load_file(starter / "model.safetensors"))
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= names
    assert {
        f"model.layers.1.self_attn.{part}"
        for part in ("q_proj.bias", "q_proj.weight", "o_proj.weight")
    } <= names
    assert "model.layers.1.self_attn.o_proj.bias" not in names


def test_tokenizer_survives_a_reload_under_a_qwen2_config(starter: Path, tmp_path: Path) -> None:
    first = AutoTokenizer.from_pretrained(starter)
    Qwen2Config().save_pretrained(tmp_path)
    first.save_pretrained(tmp_path)
    second = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*CORPUS, "  two  spaces\n\nand 你好 🙂 lines"]:
        ids = first(text)["input_ids"]
        assert ids == second(text)["input_ids"]
        assert first.decode(ids) == text
    # Words of the corpus became tokens: this is the trained vocabulary, not bytes.
    assert len(first("gradient loss")["input_ids"]) < len("gradient loss") / 2


def test_same_seed_gives_the_same_weights_and_another_seed_others(
    starter: Path, corpus: Path, tmp_path: Path
) -> None:
    config = StarterConfig(
        output_dir=tmp_path / "a",
        corpus=(corpus,),
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
    )
    again = build_starter(config)
    other = build_starter(dataclasses.replace(config, output_dir=tmp_path / "b", seed=1))
    bytes_of = [(path / "model.safetensors").read_bytes() for path in (starter, again, other)]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


def test_text_in_jsonl_rows_is_found_wherever_it_stands(tmp_path: Path) -> None:
    row = {"n": 1, "user_query": "zebra zebra", "nested": [{"text": "quokka quokka"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = StarterConfig(
        output_dir=tmp_path / "m", corpus=(tmp_path / "rows.jsonl",), vocab_size=300
    )
    tokenizer = AutoTokenizer.from_pretrained(build_starter(config))
    assert len(tokenizer("zebra")["input_ids"]) == len(tokenizer("quokka")["input_ids"]) == 1


def test_faults_of_the_config_are_named(corpus: Path, tmp_path: Path) -> None:
    good = StarterConfig(output_dir=tmp_path, corpus=(corpus,))
    for change, word in [
        ({"corpus": (tmp_path / "none.jsonl",)}, "none.jsonl"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
    ]:
        with pytest.raises(UserError, match=word):
            build_starter(dataclasses.replace(good, **change))


@pytest.mark.parametrize("found", ["thesis.tex", "other sizes", "published code", "a notebook"])
def test_a_starter_replaces_nothing_but_a_starter(
    starter: Path, corpus: Path, tmp_path: Path, found: str
) -> None:
    shutil.copytree(starter, tmp_path / "m")
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64}
    config = StarterConfig(output_dir=tmp_path / "m", corpus=(corpus,), **sizes)
    build_starter(config)
    if found == "thesis.tex":
        shutil.rmtree(tmp_path / "m")
        (tmp_path / "m").mkdir()
        (tmp_path / "m/thesis.tex").touch()
    elif found == "other sizes":
        config = dataclasses.replace(config, intermediate_size=32)
    elif found == "published code":
        path = tmp_path / "m/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {}}))
    else:
        (tmp_path / "m/notes.ipynb").touch()
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    with pytest.raises(UserError, match="not empty and not a starter of these sizes"):
        build_starter(config)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_corpus_is_read(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    config = StarterConfig(output_dir=tmp_path / "file/m", corpus=(tmp_path / "file",))
    with pytest.raises(UserError, match=r"output_dir: .*File exists"):
        build_starter(config)


def test_a_damaged_checkpoint_is_refused(starter: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(starter / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((starter / "config.json").read_text())
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        build_encoder(ModelConfig(path=str(tmp_path), dtype="float32"))
