"""Exports of adapters, merged and alone, give the vectors of the adapted encoder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoTokenizer

from pipeline.config import LoraConfig, ModelConfig
from pipeline.errors import UserError
from pipeline.model.encoder import build_encoder
from pipeline.model.export_check import OutsideProcess
from pipeline.model.load_export import load_export
from tests.model.conftest import CORPUS
from tests.model.export_support import card_of, export, make, run_card
from tests.tiny_models import TokenizerSource


def test_merged_adapters_give_the_vectors_of_the_adapted_encoder(
    starter: Path, tmp_path: Path
) -> None:
    encoder, config = make(starter, lora=LoraConfig(rank=4))
    ids, lengths = torch.arange(9, 29), torch.tensor([7, 13])
    plain = build_encoder(dataclasses.replace(config, lora=None))
    with torch.no_grad():
        before = encoder(ids, lengths)
        folder = export(encoder, config, starter, tmp_path / "export")
        after = load_export(folder).encoder(ids, lengths)
        assert (before - plain(ids, lengths)).abs().max() > 0.1
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert not list(folder.glob("adapter*"))


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_an_adapter_alone_gives_the_vectors_of_the_adapted_encoder(
    starter: Path, tmp_path: Path, attention: Any, outside: OutsideProcess
) -> None:
    # The base must be one that transformers knows, for the card's own code.
    plain, _ = make(starter)
    plain.save_backbone(tmp_path / "base")
    encoder, config = make(tmp_path / "base", attention=attention, lora=LoraConfig(rank=4))
    with torch.no_grad():  # base weights as on disk, only the adapter trained
        disk = dict(plain.model.named_parameters())
        for name, parameter in encoder.model.named_parameters():
            if "lora_" not in name:
                parameter.copy_(disk[name.replace(".base_layer", "")])
    folder = export(
        encoder, config, starter, tmp_path / "export", adapter_only=True, outside=outside
    )
    assert "transformers: version" in card_of(folder)
    assert not (folder / "model.safetensors").exists()
    loaded = load_export(folder)
    assert loaded.max_length == 64
    tokenizer = AutoTokenizer.from_pretrained(starter)
    ids = [tokenizer(text)["input_ids"] for text in CORPUS]
    lengths = torch.tensor([len(row) for row in ids])
    with torch.no_grad():
        ours = encoder(torch.tensor([token for row in ids for token in row]), lengths).numpy()
    np.testing.assert_allclose(loaded.encode_texts(CORPUS), ours, atol=1e-5)
    np.testing.assert_allclose(run_card(folder, CORPUS), ours, atol=1e-5)


def test_an_adapter_alone_lower_cases_texts_where_its_base_does(
    starter: Path, tmp_path: Path, outside: OutsideProcess
) -> None:
    base = tmp_path / "base"
    make(starter)[0].save_backbone(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(starter / name, base)
    (base / "modules.json").write_text("[]")
    (base / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    config = ModelConfig(path=str(base), dtype="float32", lora=LoraConfig(rank=2))
    encoder = build_encoder(config)
    folder = export(
        encoder, config, starter, tmp_path / "export",
        adapter_only=True, outside=outside, tokenizer=TokenizerSource(config.path),
    )  # fmt: skip
    upper, lower = ([change(text) for text in CORPUS] for change in (str.upper, str.lower))
    ours = load_export(folder).encode_texts(lower)
    np.testing.assert_allclose(load_export(folder).encode_texts(upper), ours, atol=1e-6)
    np.testing.assert_allclose(run_card(folder, upper), ours, atol=1e-5)


def test_an_adapter_alone_names_the_revision_of_its_base(starter: Path, tmp_path: Path) -> None:
    base, _ = make(starter)
    base.save_backbone(tmp_path / "base")
    for revision in ("f00d" * 10, None):
        encoder, config = make(tmp_path / "base", revision=revision, lora=LoraConfig(rank=2))
        out = tmp_path / f"export {revision}"
        folder = export(encoder, config, starter, out, adapter_only=True)
        # By which peft finds the base itself.
        assert peft.PeftConfig.from_pretrained(folder).revision == revision
        assert card_of(folder).count(f"revision='{'f00d' * 10}')") == 2 * bool(revision)
        assert run_card(folder, CORPUS).shape == (len(CORPUS), 32)


def test_an_adapter_on_merged_ones_is_loaded_on_top_of_them(starter: Path, tmp_path: Path) -> None:
    """SimCSE after MNTP: the second adapter alone does not complete the base model."""
    first, _ = make(starter, lora=LoraConfig(rank=2))
    first.save_adapter(tmp_path / "first")
    config = ModelConfig(
        path=str(starter), dtype="float32", adapter=str(tmp_path / "first"), lora=LoraConfig(rank=4)
    )
    encoder = build_encoder(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    folder = export(encoder, config, starter, tmp_path / "export", adapter_only=True)
    assert "The base model and `diffembed`" in card_of(folder)
    ids = AutoTokenizer.from_pretrained(starter)(CORPUS[0])["input_ids"]
    with torch.no_grad():
        ours = encoder(torch.tensor(ids), torch.tensor([len(ids)])).numpy()
    np.testing.assert_allclose(load_export(folder).encode_texts(CORPUS[:1]), ours, atol=1e-5)
    code = card_of(folder).split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace('"PATH"', repr(str(folder))).replace('"..."', repr(CORPUS[0])), scope)
    assert scope["scores"].shape == (1, 1)


def test_a_run_without_adapter_has_none_to_export(starter: Path, tmp_path: Path) -> None:
    encoder, config = make(starter)
    with pytest.raises(UserError, match="adapter-only export"):
        export(encoder, config, starter, tmp_path / "export", adapter_only=True)
    assert not (tmp_path / "export").exists()
