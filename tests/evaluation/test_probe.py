"""The word task on generated sentences whose tags a reader of the right context can tell."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import ModelConfig, ProbeConfig
from pipeline.errors import UserError
from pipeline.evaluation.probe import probe, read_sentences, tokens_of_words
from pipeline.model.encoder import build_encoder
from pipeline.tokenizer import load_tokenizer
from tests.tiny_models import export_tiny, tiny_starter

WORDS = ("river", "stone", "cloud", "amber", "forest", "signal", "copper", "meadow", "reed", "bay")
Tagged = list[tuple[str, str]]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models with bidirectional and with causal attention."""
    folder = tmp_path_factory.mktemp("probe")
    corpus = folder / "corpus.txt"
    rng = random.Random(0)  # each word often, with and without a space before it
    corpus.write_text("".join(" ".join(rng.sample(WORDS, 5)) + "\n" for _ in range(200)))
    sizes = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96}
    tiny_starter(folder / "model", corpus, **sizes)
    found = {}
    for attention in ("bidirectional", "causal"):
        config = ModelConfig(
            path=str(folder / "model"),
            attention=attention,
            dtype="float32",  # type: ignore[arg-type]
        )
        encoder = build_encoder(config)
        with torch.no_grad():  # both a word and its context show in a state, as in a trained one
            for name, parameter in encoder.named_parameters():
                if "embed_tokens" in name:
                    parameter.mul_(50)
                elif "self_attn" in name:
                    parameter.mul_(7)
        found[attention] = export_tiny(config, folder / attention, encoder=encoder)
    return found


def sentences(tag: Any, count: int, seed: int, longest: int = 7) -> list[Tagged]:
    """2 or more random words; tag(words, place, rng) gives the tag of each."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(2, longest))
        found.append([(word, tag(words, place, rng)) for place, word in enumerate(words)])
    return found


def write_columns(path: Path, tagged: list[Tagged]) -> Path:
    """CoNLL-2003's columns, the tag as chunk."""
    blocks = ["-DOCSTART- -X- -X- O\n"]
    blocks += ["".join(f"{word} X {tag} O\n" for word, tag in rows) for rows in tagged]
    path.write_text("\n".join(blocks))
    return path


def run(
    folder: Path,
    model: Path,
    tag: Any,
    labels: Literal["same_token", "next_token"] = "same_token",
    longest: int = 7,
    **changes: Any,
) -> dict[str, Any]:
    config = ProbeConfig(
        output_dir=folder / "out",
        model=model,
        train=write_columns(folder / "train.txt", sentences(tag, 300, 0, longest)),
        test=write_columns(folder / "test.txt", sentences(tag, 100, 1, longest)),
        task="chunk",
        labels=labels,
        **{"lr": 1e-2, "num_epochs": 20, "batch_size": 64, **changes},
    )
    result: dict[str, Any] = json.loads(probe(config).read_text())
    return result


def own(words: list[str], place: int, _: random.Random) -> str:
    return f"tag of {WORDS.index(words[place]) % 3}".replace(" ", "-")


def after(words: list[str], place: int, _: random.Random) -> str:
    """A tag that the word after it decides."""
    follower = words[place + 1] if place + 1 < len(words) else WORDS[0]
    return f"T{WORDS.index(follower) % 2}"


def chance(words: list[str], place: int, rng: random.Random) -> str:
    return rng.choice("AB")


def test_a_tag_of_the_word_itself_is_read_off_and_one_of_chance_is_not(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    learnt = run(tmp_path, exports["causal"], own)
    assert learnt["accuracy"] > 0.98
    assert learnt["macro_f1"] > 0.98
    assert learnt["num_tags"] == 3
    assert learnt["skipped_words"] == 0
    noise = run(tmp_path, exports["bidirectional"], chance)
    assert abs(noise["accuracy"] - 0.5) < 0.1


def test_a_tag_that_the_next_word_decides_is_read_only_by_who_sees_it(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    both = run(tmp_path, exports["bidirectional"], after, longest=2)
    behind = run(tmp_path, exports["causal"], after, longest=2)
    assert both["accuracy"] > 0.95
    # The second word always has the same tag; the tag of the first is a coin for the causal model.
    assert behind["accuracy"] < 0.85


def test_next_token_classifies_a_word_by_the_token_before_it(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    def previous(words: list[str], place: int, _: random.Random) -> str:
        return f"T{WORDS.index(words[place - 1]) % 3}" if place else "T0"

    shifted = run(tmp_path, exports["causal"], previous, "next_token", merge_subwords=False)
    assert shifted["accuracy"] > 0.98
    # The first word of each of the 400 sentences has no token before it.
    assert shifted["skipped_words"] == 400
    unseen = run(tmp_path, exports["causal"], own, "next_token", merge_subwords=False)
    assert unseen["accuracy"] < unseen["majority_accuracy"] + 0.1


def test_every_token_belongs_to_the_word_it_spells(exports: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(exports["causal"]))
    words = ("copper", "zq", "x", "meadow-bay")
    ids, places = tokens_of_words(words, tokenizer, 64)
    assert sorted(place for word in places for place in word) == list(range(len(ids)))
    for word, own_places in zip(words, places, strict=True):
        assert tokenizer.decode([ids[place] for place in own_places]).strip() == word
    cut = tokens_of_words(words, tokenizer, 2)[1]
    assert cut[-1] == []


def test_both_formats_give_the_same_sentences(tmp_path: Path) -> None:
    tagged = sentences(own, 5, 0)
    columns = write_columns(tmp_path / "a.txt", tagged)
    lines = tmp_path / "a.jsonl"
    lines.write_text(
        "".join(
            json.dumps({"tokens": [w for w, _ in rows], "chunk_tags": [t for _, t in rows]}) + "\n"
            for rows in tagged
        )
    )
    found = read_sentences(columns, "chunk")
    assert found == read_sentences(lines, "chunk")
    assert [list(zip(s.words, s.tags, strict=True)) for s in found] == tagged


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "word X\n", "a.txt:1: 2 columns"),
        ("a.txt", "\n\n", "no sentence"),
        ("a.jsonl", '{"tokens": ["a"]}\n', "a.jsonl:1: KeyError"),
        ("a.jsonl", '{"tokens": ["a"], "ner_tags": []}\n', "a.jsonl:1: a word without tag"),
        ("a.jsonl", '{"tokens": ["a"], "ner_tags": "X"}\n', "a.jsonl:1: a word without tag"),
        ("a.jsonl", '{"tokens": "a", "ner_tags": ["X"]}\n', "a.jsonl:1: a word without tag"),
        ("a.jsonl", '{"tokens": ["\\ud83d"], "ner_tags": ["X"]}\n', "a.jsonl:1: .*surrogates not"),
        (
            "a.jsonl",
            '{"tokens": ["a"], "ner_tags": ["X"]}\n{"tokens": ["a", "b"], "ner_tags": ["X", 1]}\n',
            "a.jsonl:2: the tag 1 among texts",
        ),
        (
            "a.jsonl",
            '{"tokens": ["a"], "ner_tags": [3]}\n{"tokens": ["a"], "ner_tags": ["3"]}\n',
            "a.jsonl:2: the tag '3' among numbers",
        ),
    ],
)
def test_wrong_files_are_named_by_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_sentences(tmp_path / name, "ner")


def test_the_command_prints_what_it_writes(exports: dict[str, Path], tmp_path: Path) -> None:
    train = write_columns(tmp_path / "train.txt", sentences(own, 20, 0))
    (tmp_path / "probe.yaml").write_text(
        f"{{output_dir: {tmp_path / 'out'}, model: {exports['causal']}, train: {train}, "
        f"test: {train}, task: chunk}}"
    )
    done = CliRunner().invoke(app, ["probe", str(tmp_path / "probe.yaml"), "num_epochs=1"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["config"]["num_epochs"] == 1
