"""Classify single words from a frozen model's hidden states.

Shapes: N words, D width of the model, K tags.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score

from pipeline.config import ProbeConfig, as_tree
from pipeline.errors import UserError
from pipeline.evaluation.models import load_here
from pipeline.files import write_json
from pipeline.model.load_export import LoadedExport

# Columns of CoNLL-2003 (Tjong Kim Sang and De Meulder, 2003).
_COLUMNS = {"pos": 1, "chunk": 2, "ner": 3}
_DOCUMENT = "-DOCSTART-"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """Words, and the tag of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read_sentences(path: Path, task: str) -> list[Sentence]:
    """Read a file of tagged sentences: `.jsonl` or `.json` lines, columns otherwise.

    Raises:
        UserError: it is missing, empty, or a line is not what it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error})", allowed="a text file in UTF-8"
        ) from error
    read = _read_json if path.suffix in (".jsonl", ".json") else _read_columns
    sentences = read(path, lines, task)
    if not sentences:
        raise UserError(
            f"{path}: no sentence in it", allowed="columns of CoNLL-2003, or JSON lines"
        )
    return sentences


def _read_columns(path: Path, lines: list[str], task: str) -> list[Sentence]:
    sentences, rows = [], []
    for number, line in enumerate([*lines, ""], start=1):
        fields = line.split()
        if fields and fields[0] != _DOCUMENT:
            if len(fields) <= _COLUMNS[task]:
                raise UserError(
                    f"{path}:{number}: {len(fields)} columns", allowed="4: word, pos, chunk, ner"
                )
            rows.append((fields[0], fields[_COLUMNS[task]]))
        elif not fields and rows:
            words, tags = zip(*rows, strict=True)
            sentences.append(Sentence(words=words, tags=tags))
            rows = []
    return sentences


def _read_json(path: Path, lines: list[str], task: str) -> list[Sentence]:
    sentences = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
            words, tags = record["tokens"], record[f"{task}_tags"]
            fits = len(words) == len(tags) > 0 and all(isinstance(word, str) for word in words)
            fits = fits and all(isinstance(tag, str) or type(tag) is int for tag in tags)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: {type(error).__name__}: {error}",
                allowed=f"a JSON object with the lists tokens and {task}_tags",
            ) from error
        if not fits:
            raise UserError(
                f"{path}:{number}: a word without tag, or no words",
                allowed=f"as many texts in tokens as texts or numbers in {task}_tags",
            )
        sentences.append(Sentence(words=tuple(words), tags=tuple(map(str, tags))))
    return sentences


def tokens_of_words(
    words: tuple[str, ...], tokenizer: Any, max_length: int
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a sentence, and for each word the places of its tokens.

    The words are joined with spaces; a token belongs to the word in which it ends. Words beyond
    `max_length` tokens have none.
    """
    encoded = tokenizer(
        " ".join(words), truncation=True, max_length=max_length, return_offsets_mapping=True
    )
    places: list[list[int]] = [[] for _ in words]
    owner = [number for number, word in enumerate(words) for _ in range(len(word) + 1)]
    for place, (start, end) in enumerate(encoded["offset_mapping"]):
        if end > start:  # not a special token
            places[owner[end - 1]].append(place)
    return encoded["input_ids"], places


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WordStates:
    """The words of a file that have a hidden state to be classified by."""

    states_ND: torch.Tensor
    tags: list[str]
    skipped: int  # words cut off, or with no token before them


def probe(config: ProbeConfig) -> Path:
    """Train the classifier, score it, and write `probe.json`.

    Raises:
        UserError: model or data cannot be read, or the test file has no word to score.
    """
    export = load_here(config.model, max_tokens=max(config.max_tokens, config.max_length))
    train, test = (
        _word_states(export, read_sentences(path, config.task), config)
        for path in (config.train, config.test)
    )
    names = sorted(set(train.tags))
    predicted = _classify(config, train, test.states_ND, names)
    majority = collections.Counter(train.tags).most_common(1)[0][0]
    result = {
        "accuracy": float(accuracy_score(test.tags, predicted)),
        "macro_f1": float(f1_score(test.tags, predicted, average="macro", zero_division=0)),
        "majority_accuracy": float(accuracy_score(test.tags, [majority] * len(test.tags))),
        "num_train_words": len(train.tags),
        "num_test_words": len(test.tags),
        "skipped_words": train.skipped + test.skipped,
        "num_tags": len(names),
        "config": as_tree(config),
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    path = config.output_dir / "probe.json"
    write_json(path, result)
    return path


def _word_states(
    export: LoadedExport, sentences: list[Sentence], config: ProbeConfig
) -> WordStates:
    """One state per word: of its first token or the mean over all, or of those before them."""
    tokenised = [
        tokens_of_words(sentence.words, export.tokenizer, config.max_length)
        for sentence in sentences
    ]
    states = export.token_states([ids for ids, _ in tokenised])
    back = int(config.labels == "next_token")
    rows, tags, skipped = [], [], 0
    for sentence, (_, words), own in zip(sentences, tokenised, states, strict=True):
        for tag, places in zip(sentence.tags, words, strict=True):
            chosen = places if config.merge_subwords else places[:1]
            seen = [place - back for place in chosen if place >= back]
            if seen:
                rows.append(own[seen].float().mean(dim=0).to(own.dtype))
                tags.append(tag)
            else:
                skipped += 1
    if not rows:
        raise UserError(
            f"labels: {config.labels}: no word has a hidden state to be classified by",
            fix="give sentences of more than one token",
        )
    return WordStates(states_ND=torch.stack(rows), tags=tags, skipped=skipped)


def _classify(
    config: ProbeConfig, train: WordStates, states_ND: torch.Tensor, names: list[str]
) -> list[str]:
    """Train on one file's words and tag another's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = {name: number for number, name in enumerate(names)}
    labels = torch.tensor([numbers[tag] for tag in train.tags])
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)  # the dropout
    classifier: Any = torch.nn.Linear(train.states_ND.shape[1], len(names), device=device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.lr)
    for _ in range(config.num_epochs):
        order = torch.randperm(len(labels), generator=generator)
        for rows in torch.split(order, config.batch_size):
            states = F.dropout(train.states_ND[rows].to(device).float(), config.dropout)
            loss = F.cross_entropy(classifier(states), labels[rows].to(device))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    with torch.inference_mode():
        parts = torch.split(states_ND, config.batch_size)
        best = torch.cat([classifier(part.to(device).float()).argmax(dim=1) for part in parts])
    return [names[number] for number in best.tolist()]
