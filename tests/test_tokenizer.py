from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
from transformers import AutoTokenizer

from pipeline.errors import UserError
from pipeline.tokenizer import (
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
    """Dream publishes vocab.json, merges.txt and added tokens around a class of its own."""
    ours = AutoTokenizer.from_pretrained(starter)
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
    wanted = AutoTokenizer.from_pretrained(starter)
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
    with pytest.raises(UserError, match="cannot load the tokenizer .*its own code is never run"):
        load_tokenizer(str(tmp_path))


def test_the_cure_for_a_tokenizer_with_code_works(starter: Path, tmp_path: Path) -> None:
    wanted = AutoTokenizer.from_pretrained(starter)
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
    with pytest.raises(UserError, match="^model.path: .*no such folder .* correct model.path"):
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
        (6, [(0, 0), (0, 5), (5, 6), (6, 11), (0, 0)], 3),  # BOS stands with the instruction
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
