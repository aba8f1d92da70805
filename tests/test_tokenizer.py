"""Tokenizers load without their own code, count tokens exactly, and know the model's limits."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from pipeline.config import ModelConfig, Template, build_config
from pipeline.errors import UserError
from pipeline.model.encoder import build_encoder
from pipeline.model_limits import ModelLimits, limits_of, read_limits, warn_if_unlike_base
from pipeline.tokenizer import (
    TextTokenizer,
    load_fast_tokenizer,
    load_model_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    tokens_within,
)
from tests.tiny_models import tiny_starter

TEXT = "Hello wörld,  3.14 <|mask|> don't\n"


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starter")
    (folder / "corpus.txt").write_text("Hello world, 3.14 and don't say hello again.\n" * 9)
    return tiny_starter(folder / "m", folder / "corpus.txt")


def test_dreams_published_files_tokenise_without_their_code(starter: Path, tmp_path: Path) -> None:
    """Dream publishes vocab.json, merges.txt and added tokens, and a tokenizer class for them."""
    ours = hf.AutoTokenizer.from_pretrained(starter)
    model = json.loads(ours.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    added = {
        str(number): {"content": token, "special": True}
        for token, number in (
            ("<|endoftext|>", ours.eos_token_id),
            ("<|mask|>", ours.mask_token_id),
        )
    }
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "DreamTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
                "added_tokens_decoder": added,
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "mask_token": "<|mask|>",
            }
        )
    )
    (tmp_path / "tokenization_dream.py").write_text("raise SystemExit('it ran')")
    (tmp_path / "config.json").write_text((starter / "config.json").read_text())
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(TEXT)["input_ids"] == ours(TEXT)["input_ids"]
    assert loaded.mask_token_id == ours.mask_token_id
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(ours)


def test_a_starter_a_bare_tokenizer_and_an_unknown_model_type_load(
    starter: Path, tmp_path: Path
) -> None:
    wanted = hf.AutoTokenizer.from_pretrained(starter)
    wanted.save_pretrained(tmp_path)
    assert load_tokenizer(str(starter))(TEXT) == wanted(TEXT)
    assert load_tokenizer(str(tmp_path))(TEXT) == wanted(TEXT)
    (tmp_path / "config.json").write_text('{"model_type": "llada"}')
    assert load_tokenizer(str(tmp_path))(TEXT) == wanted(TEXT)


def test_a_tokenizer_that_needs_its_own_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}})
    )
    (tmp_path / "tokenization_x.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match=r"cannot load the tokenizer .*its own code is never run"):
        load_tokenizer(str(tmp_path))


def test_the_cure_for_a_tokenizer_with_code_works(starter: Path, tmp_path: Path) -> None:
    wanted = hf.AutoTokenizer.from_pretrained(starter)
    wanted.save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    tree = {**json.loads(settings.read_text()), "tokenizer_class": "X"}
    settings.write_text(json.dumps({**tree, "auto_map": {"AutoTokenizer": ["x.X", None]}}))
    with pytest.raises(UserError, match=r"remove auto_map from its tokenizer_config\.json"):
        load_tokenizer(str(tmp_path))
    settings.write_text(json.dumps(tree))
    assert load_tokenizer(str(tmp_path))(TEXT) == wanted(TEXT)


def test_files_that_git_lfs_has_not_fetched_are_named_as_such(
    starter: Path, tmp_path: Path
) -> None:
    shutil.copytree(starter, folder := tmp_path / "m")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_text(pointer)
        with pytest.raises(UserError, match=f"fix: run `git lfs pull` in {folder}"):
            load_tokenizer(str(folder))


@pytest.mark.parametrize("length", ["512", True, None, 0, [512]])
def test_a_longest_text_that_is_no_number_is_refused(
    starter: Path, tmp_path: Path, length: object
) -> None:
    folder = shutil.copytree(starter, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    if length is None:  # transformers takes its default
        load_tokenizer(str(folder))
        return
    with pytest.raises(UserError, match=r"model_max_length is .* allowed: a number above 0"):
        load_tokenizer(str(folder))


def test_the_tokenizer_of_a_model_is_loaded_from_a_whole_model_only(
    starter: Path, tmp_path: Path
) -> None:
    shutil.copytree(starter, folder := tmp_path / "m")
    assert load_model_tokenizer(str(folder))(TEXT) == load_tokenizer(str(starter))(TEXT)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"^model.path: no config.json .* the whole model"):
        load_model_tokenizer(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"it holds an adapter: .* as model.adapter"):
        load_model_tokenizer(str(folder))
    with pytest.raises(UserError, match=r"^model\.path: .*no such folder .* correct model\.path"):
        load_model_tokenizer(str(tmp_path / "nowhere"))


def test_a_path_is_never_taken_for_a_name_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        (str(tmp_path / "nowhere"), "no such folder .* fix: correct tokenizer"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        (str(tmp_path / "file"), "is a file .* fix: name its folder"),
        ("some/where", r"cannot load the tokenizer 'some/where' .*hf download some/where"),
    ):
        with pytest.raises(UserError, match=f"^tokenizer: .*{message}"):
            load_tokenizer(path)


@pytest.mark.parametrize(
    ("prefix", "text", "wanted"),
    [
        # Offsets of `Query`, `:`, ` word`: the space belongs to the word.
        (7, [(0, 5), (5, 6), (6, 11)], 2),
        (6, [(0, 0), (0, 5), (5, 6), (6, 11), (0, 0)], 3),  # BOS counts with the instruction
        (0, [(0, 0), (0, 4), (0, 0)], 0),  # no instruction: BOS is pooled
        (9, [(0, 5), (5, 12), (12, 13)], 1),  # a token across the border is the text's
    ],
)
def test_a_token_that_reaches_into_the_text_is_no_instruction(
    prefix: int, text: list[tuple[int, int]], wanted: int
) -> None:
    assert tokens_within(text, prefix) == wanted


def test_a_hub_that_cannot_be_reached_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with pytest.raises(UserError, match="cannot load the tokenizer 'some/where'"):
        load_tokenizer("some/where")
    assert "Retrying" not in capfd.readouterr().err


SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
ABSOLUTE: list[tuple[Any, int]] = [
    (hf.BertConfig(**SIZES, max_position_embeddings=32), 32),
    (hf.RobertaConfig(**SIZES, max_position_embeddings=34, pad_token_id=1), 32),
    (hf.RobertaConfig(**SIZES, max_position_embeddings=34, pad_token_id=0), 33),
    (hf.XLMRobertaConfig(**SIZES, max_position_embeddings=34, pad_token_id=1), 32),
    (hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32), 32),
]


@pytest.mark.parametrize(("config", "longest"), ABSOLUTE)
def test_the_longest_text_is_the_longest_that_the_model_embeds(
    tmp_path: Path, config: Any, longest: int
) -> None:
    hf.AutoModel.from_config(config).save_pretrained(tmp_path)
    limits = read_limits(str(tmp_path))
    assert (limits.positions, limits.num_tokens) == (longest, 50)
    encoder = build_encoder(ModelConfig(path=str(tmp_path), dtype="float32"))
    encoder(torch.arange(3, 3 + longest), torch.tensor([longest]))
    with pytest.raises(UserError, match=f"{longest + 1} tokens, but .* {longest} positions"):
        encoder(torch.arange(3, 4 + longest), torch.tensor([longest + 1]))


def test_rotary_positions_have_no_end_but_a_trained_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "max_position_embeddings": 64, "vocab_size": 50})
    )
    limits = read_limits(str(tmp_path), factor=2.0)
    assert (limits.positions, limits.trained_length) == (None, 128)
    limits.require_length({"max_document_length": 4096}, fix="")
    limits.warn_of_length({"max_document_length": 128})
    assert capsys.readouterr().err == ""
    limits.warn_of_length({"max_document_length": 129})
    assert "129 tokens, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tree", "tokens"),
    [
        ({"vocab_size": 50, "embedding_size": 64}, 64),  # LLaDA's padded rows
        ({"text_config": {"vocab_size": 50}, "vocab_size": 7}, 50),  # Gemma 3 with images
        ({"vocab_size": "many"}, None),
        ({}, None),
    ],
)
def test_the_number_of_tokens_is_read_from_every_form_of_config(
    tree: dict[str, Any], tokens: int | None
) -> None:
    assert limits_of(tree, "m").num_tokens == tokens


def test_rows_are_counted_in_the_weights_where_they_are_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 50}')
    save_file({"embed_tokens.weight": torch.ones(51, 4)}, tmp_path / "part.safetensors")
    index = {"weight_map": {"embed_tokens.weight": "part.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_limits(str(tmp_path)).num_tokens == 51
    (tmp_path / "part.safetensors").write_bytes(b"\xff" * 20)
    assert read_limits(str(tmp_path)).num_tokens == 50
    assert read_limits(str(tmp_path / "none")) == ModelLimits(path=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("name", "tree", "lowers"),
    [
        ("sentence_bert_config.json", {"do_lower_case": True}, True),
        ("sentence_xlm-roberta_config.json", {"do_lower_case": True}, True),
        ("sentence_bert_config.json", {"do_lower_case": False}, False),
        ("sentence_bert_config.json", {}, False),
    ],
)
def test_texts_are_lower_cased_where_sentence_transformers_would(
    starter: Path, tmp_path: Path, name: str, tree: dict[str, Any], lowers: bool
) -> None:
    folder = shutil.copytree(starter, tmp_path / "m")
    plain = load_tokenizer(str(folder))
    (folder / name).write_text(json.dumps(tree))
    # Without modules.json it is no folder of sentence-transformers.
    assert load_tokenizer(str(folder))(TEXT)["input_ids"] == plain(TEXT)["input_ids"]
    (folder / "modules.json").write_text("[]")
    found = load_tokenizer(str(folder))
    wanted = plain(TEXT.lower() if lowers else TEXT)["input_ids"]
    assert found(TEXT)["input_ids"] == wanted
    assert (plain(TEXT)["input_ids"] != wanted) == lowers
    # Other shards, so they are told apart.
    assert (tokenizer_fingerprint(found) != tokenizer_fingerprint(plain)) == lowers
    rules, info = load_fast_tokenizer(str(folder), append_eos=False)
    shards = TextTokenizer(rules, eos_id=info.eos_id, append_eos=False)
    assert shards.encode([TEXT], max_length=64)[0][0].tolist() == wanted


def test_a_tokenizer_that_lower_cases_by_its_own_rules_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"]))
    own = hf.BertTokenizer.from_pretrained(tmp_path, do_lower_case=True)
    own.save_pretrained(tmp_path)
    before, _ = load_fast_tokenizer(str(tmp_path), append_eos=False)
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    assert load_fast_tokenizer(str(tmp_path), append_eos=False)[0] == before
    (tmp_path / "sentence_bert_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer: .*sentence_bert_config\.json cannot be read"):
        load_tokenizer(str(tmp_path))


def declare(
    folder: Path, pooling: dict[str, Any], *, normalize: bool = True, others: tuple[str, ...] = ()
) -> str:
    """Write the files of a sentence-transformers folder that declare its pooling and prompts."""
    kinds = ["Transformer", "Pooling", *others, *(["Normalize"] if normalize else [])]
    modules = [
        {"path": f"{number}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    prompts = {"prompts": {"query": "query: ", "document": ""}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return str(folder)


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [
        ({"pooling_mode": "cls"}, "first_token"),
        ({"pooling_mode": "lasttoken"}, "last_token"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first_token"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
    ],
)
def test_a_run_that_names_no_pooling_takes_the_one_that_its_model_was_made_with(
    tmp_path: Path, pooling: dict[str, Any], wanted: str
) -> None:
    path = declare(tmp_path, pooling)
    assert ModelConfig(path=path).pooling == wanted
    assert build_config(ModelConfig, {"path": path}, origin="t").pooling == wanted
    assert ModelConfig(path=path, pooling="mean").pooling == "mean"
    assert ModelConfig(path=str(tmp_path / "plain")).pooling == "mean"


def test_a_pooling_that_does_not_exist_here_has_to_be_replaced_in_the_config(
    tmp_path: Path,
) -> None:
    path = declare(tmp_path, {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True})
    with pytest.raises(UserError, match=r"model\.pooling: not given.*max\+mean"):
        ModelConfig(path=path)
    assert ModelConfig(path=path, pooling="mean").pooling == "mean"


def test_a_run_is_warned_of_what_it_does_unlike_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = declare(tmp_path, {"pooling_mode": "cls"}, normalize=False)
    warn_if_unlike_base(ModelConfig(path=path, pooling="mean"), Template())
    warned = capsys.readouterr().err
    assert "model.pooling: mean" in warned and "without normalisation" in warned
    assert "'query: '" in warned
    fitting = Template(query="query: {text}", document="passage: {text}")
    warn_if_unlike_base(ModelConfig(path=path, normalize=False), fitting)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("others", "own", "stated", "words"),
    [
        (("Dense",), False, {}, "was made with Dense after its pooling"),
        (("LayerNorm", "Dense"), False, {}, "was made with LayerNorm, Dense after its pooling"),
        (("Dropout", "Dense"), False, {}, "was made with Dense after its pooling"),
        (("Dense",), True, {}, "model.dimensions: all numbers, but .* the first 8 of a vector"),
        ((), False, {"truncate_dim": 8}, "model.dimensions: all numbers, but .* the first 8"),
    ],
)
def test_a_run_is_warned_of_what_it_leaves_out_of_its_model(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    others: tuple[str, ...],
    own: bool,
    stated: dict[str, Any],
    words: str,
) -> None:
    path = declare(tmp_path, {"pooling_mode": "mean"}, others=others)
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(stated))
    if own:
        (tmp_path / "diffembed.json").write_text('{"model": {"dimensions": 8}}')
    warn_if_unlike_base(ModelConfig(path=path), Template())
    warned = capsys.readouterr().err
    assert re.search(words, warned) and warned.count("WARNING") == 1
    warn_if_unlike_base(ModelConfig(path=path, dimensions=8), Template())
    assert ("WARNING" in capsys.readouterr().err) == (bool(others) and not own)


def test_a_run_is_warned_of_a_prompt_that_its_model_does_not_pool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = declare(tmp_path, {"pooling_mode": "mean", "include_prompt": False})
    fitting = Template(query="query: {text}", document="{text}")
    warn_if_unlike_base(ModelConfig(path=path), fitting)
    assert "model.pool_instruction: true, but" in capsys.readouterr().err
    warn_if_unlike_base(ModelConfig(path=path, pool_instruction=False), fitting)
    assert capsys.readouterr().err == ""


def test_a_folder_without_pooling_module_declares_none(tmp_path: Path) -> None:
    path = declare(tmp_path, {"pooling_mode": "cls"})
    (tmp_path / "modules.json").write_text('[{"path": "", "type": "a.Router"}]')
    assert ModelConfig(path=path).pooling == "mean"
