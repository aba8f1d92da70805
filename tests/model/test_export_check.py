"""Exports as other libraries load them, and the results of the check of an export."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf
from tokenizers import Tokenizer

from pipeline.config import ModelConfig, Template
from pipeline.errors import UserError
from pipeline.model.encoder import build_encoder
from pipeline.model.export_check import OutsideProcess
from pipeline.model.export_folder import TrainedTexts
from pipeline.model.load_export import load_export
from tests.model.conftest import CORPUS
from tests.model.export_support import TEMPLATE, card_of, export, make
from tests.tiny_models import TokenizerSource

RESERVED = "<|finetune_right_pad_id|>"  # Llama 3.1's
ONE = TrainedTexts(instructions={"Find the law": 9})


def save_tokenizer(starter: Path, folder: Path, kind: str) -> Path:
    """The starter's tokenizer as models without a padding token have theirs."""
    known = hf.AutoTokenizer.from_pretrained(starter, trust_remote_code=False)
    rules = known.backend_tokenizer.to_str()
    if kind == "reserved":
        rules = rules.replace(known.mask_token, RESERVED)
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(rules), eos_token=known.eos_token
    )
    if kind == "beyond the embedding":
        tokenizer.add_tokens([f"<{number}>" for number in range(400)])
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["end of text", "reserved", "beyond the embedding"])
def test_a_tokenizer_that_cannot_pad_gets_a_token_that_changes_no_text(
    starter: Path, tmp_path: Path, outside: OutsideProcess, kind: str
) -> None:
    source = TokenizerSource(str(save_tokenizer(starter, tmp_path / "tokenizer", kind)))
    encoder, config = make(starter)
    # Checked by ragged batches in sentence-transformers and transformers.
    folder = export(encoder, config, starter, tmp_path / "e", tokenizer=source, outside=outside)
    before, after = (
        hf.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        for path in (source.path, folder)
    )
    assert after.pad_token == (RESERVED if kind == "reserved" else "<|endoftext|>")
    assert len(after) == len(before) and after.pad_token_id < encoder.model.config.vocab_size
    for text in (*CORPUS, f"a{after.pad_token} b", "<|endoftext|><7>"):
        assert after(text)["input_ids"] == before(text)["input_ids"]


def test_a_tokenizer_without_any_special_token_is_refused(starter: Path, tmp_path: Path) -> None:
    known = hf.AutoTokenizer.from_pretrained(starter, trust_remote_code=False)
    tree = json.loads(known.backend_tokenizer.to_str()) | {"added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    hf.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).save_pretrained(
        tmp_path / "bare"
    )
    with pytest.raises(UserError, match="no special token to pad a batch with"):
        source = TokenizerSource(str(tmp_path / "bare"))
        export(*make(starter), starter, tmp_path / "export", tokenizer=source)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_an_export_never_promises_more_tokens_than_its_model_has_positions_for(
    starter: Path, tmp_path: Path, outside: OutsideProcess, kind: str, capsys: Any
) -> None:
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 34, "pad_token_id": 1}
    kinds = {
        "bert": hf.BertConfig(**sizes),
        "roberta": hf.RobertaConfig(**sizes),
        "gpt2": hf.GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2, n_positions=34),
    }
    positions = 32 if kind == "roberta" else 34
    hf.AutoModel.from_config(kinds[kind]).save_pretrained(tmp_path / "model")
    encoder, config = make(tmp_path / "model")
    folder = export(encoder, config, starter, tmp_path / "export", outside=outside, max_length=64)
    assert f"cut at {positions} tokens" in capsys.readouterr().err
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    assert settings["max_seq_length"] == load_export(folder).max_length == positions
    # A folder that promises more is cut, too, with a warning.
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    loaded = load_export(folder)
    assert f"texts are cut at {positions}" in capsys.readouterr().err
    assert loaded.encode_texts(["stone " * 99]).shape == (1, 32)
    assert loaded.with_max_length(positions, key="--max-length").max_length == positions
    with pytest.raises(UserError, match=f"--max-length: 64 tokens.*allowed: at most {positions}"):
        loaded.with_max_length(64, key="--max-length")


def test_an_export_asks_for_no_code_also_where_code_is_trusted(
    starter: Path, tmp_path: Path, outside: OutsideProcess
) -> None:
    base = tmp_path / "base"
    shutil.copytree(starter, base)
    code = {"config.json": "AutoConfig", "tokenizer_config.json": "AutoTokenizer"}
    for name, kind in code.items():
        tree = json.loads((base / name).read_text())
        tree["auto_map"] = {kind: ["nowhere.Class", None] if "token" in name else "nowhere.Class"}
        (base / name).write_text(json.dumps(tree))
    encoder, config = make(base)
    encoder.model.config.auto_map = {"AutoModel": "nowhere.Class"}  # as plain layouts keep it
    source = TokenizerSource(str(base))
    # Its sentence-transformers trusts code, its transformers does not.
    folder = export(encoder, config, base, tmp_path / "e", tokenizer=source, outside=outside)
    for path in folder.glob("*.json"):
        assert "auto_map" not in path.read_text(), path
    for trust in (True, False):
        hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        hf.AutoConfig.from_pretrained(folder, trust_remote_code=trust)


def test_a_stored_prompt_is_the_one_instruction_of_training(
    starter: Path, tmp_path: Path, outside: OutsideProcess
) -> None:
    cases = {
        "one": (ONE, TEMPLATE.query_prefix("Find the law"), "D: "),
        "none": (TrainedTexts(instructions={"": 4}), "", "D: "),
        "several": (TrainedTexts(instructions={"Find the law": 1_200, "a | b": 3}), "", "D: "),
        "symmetric": (
            TrainedTexts(
                instructions={"Same": 4}, document_prefixes={TEMPLATE.query_prefix("Same"): 8}
            ),
            TEMPLATE.query_prefix("Same"),
            TEMPLATE.query_prefix("Same"),
        ),
    }
    for name, (texts, query, document) in cases.items():
        folder = export(*make(starter), starter, tmp_path / name, texts=texts)
        stored = json.loads((folder / "config_sentence_transformers.json").read_text())
        assert stored["prompts"] == {"query": query, "document": document}
        loaded = load_export(folder)
        for role, prefix in (("query", query), ("document", document)):
            [theirs] = outside.embed(
                folder, "sentence-transformers", [{"texts": CORPUS, "prompt_name": role}]
            )
            np.testing.assert_allclose(loaded.encode_texts(CORPUS, prefix), theirs, atol=1e-5)
    cards = {name: card_of(tmp_path / name) for name in cases}
    assert "model.encode(['...'], prompt='Task: Find the law\\nQ: ')" in cards["one"]
    assert (
        "All queries started with 'Task: Find the law\\nQ: ' in training. `encode_query`"
        in (cards["one"])
    )
    assert "queries = model.encode(['...'])" in cards["none"]
    assert "| Find the law | 1,200 |\n| a \\| b | 3 |" in cards["several"]
    assert "Documents started with 'Task: Same\\nQ: '" in cards["symmetric"]


def test_text_behind_a_text_is_part_of_the_card_and_of_the_check(
    starter: Path, tmp_path: Path, outside: OutsideProcess
) -> None:
    template = Template(query="[INST] {instruction}; {text} [/INST]", document="({text})")
    encoder, config = make(starter)
    folder = export(
        encoder, config, starter, tmp_path / "e", texts=ONE, template=template, outside=outside
    )
    card = card_of(folder)
    assert "model.encode(['... [/INST]'], prompt='[INST] Find the law; ')" in card
    assert "model.encode(['...)'], prompt='(')" in card and "cuts them off" in card


def test_an_export_that_others_would_read_as_another_model_is_not_written(
    starter: Path, tmp_path: Path, outside: OutsideProcess
) -> None:
    encoder, config = make(starter)
    folder = export(encoder, config, starter, tmp_path / "export", outside=outside)
    card = card_of(folder)
    assert "sentence-transformers: version" in card and "not checked" not in card
    changed = dataclasses.replace(config, pooling="last_token")
    with pytest.raises(UserError, match="transformers gives other vectors for a query than the"):
        export(encoder, changed, starter, folder, outside=outside)
    assert card_of(folder) == card
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_check_without_an_answer_is_said_and_no_reason_to_lose_the_export(
    starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OutsideProcess(patience=0.1) as hurried:
        folder = export(*make(starter), starter, tmp_path / "late", outside=hurried)
    assert "- transformers: not checked: no answer in 0 s." in card_of(folder)
    monkeypatch.setattr("pipeline.model.export.available_bytes", lambda: 10**6)
    with OutsideProcess() as idle:
        folder = export(*make(starter), starter, tmp_path / "large", outside=idle)
    assert "transformers: not checked: 1 GiB of memory needed, 0 free" in card_of(folder)


def test_a_folder_that_a_library_cannot_load_is_one_line(
    tmp_path: Path, outside: OutsideProcess
) -> None:
    with pytest.raises(UserError, match="sentence-transformers cannot load the export"):
        outside.embed(tmp_path, "sentence-transformers", [{"texts": ["a"]}])


def test_weights_in_bfloat16_are_checked_as_they_are_stored(
    starter: Path, tmp_path: Path, outside: OutsideProcess
) -> None:
    config = ModelConfig(path=str(starter), dtype="bfloat16")
    folder = export(build_encoder(config), config, starter, tmp_path / "half", outside=outside)
    assert "transformers: version" in card_of(folder)
