"""Classify words from a frozen model's hidden states (LLM2Vec, arXiv 2404.05961, section 4.1).

    tagged sentences --> tokens --> hidden states --> one state per word --> linear classifier

    words       the        old      ships
    tokens      [CLS] the  old      sh     ips   [SEP]
    same_token        the  old      sh                    state of the word's first token
    next_token  [CLS]      the      old                   state of the token before it

With `merge_subwords`, the mean over all tokens of a word takes the place of the first one.

Letters: N words, D width of the model.
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
    """The words of a sentence, and the tag of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read_sentences(path: Path, task: str) -> list[Sentence]:
    """Read a file of tagged sentences: `.jsonl` or `.json` lines, columns otherwise.

    Raises:
        UserError: the file is missing or empty, or a line is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error})", allowed="a text file in UTF-8"
        ) from error
    # Both formats give the same sentences.
    read = _read_json if path.suffix in (".jsonl", ".json") else _read_columns
    sentences = read(path, lines, task)
    if not sentences:
        raise UserError(f"{path}: no sentences", allowed="columns of CoNLL-2003, or JSON lines")
    return sentences


def _read_columns(path: Path, lines: list[str], task: str) -> list[Sentence]:
    sentences, rows = [], []
    # An empty line at the end closes the last sentence.
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
    sentences: list[Sentence] = []
    kind: type | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
            words, tags = record["tokens"], record[f"{task}_tags"]
            # A text has letters, an object has keys: neither is a list of words or of tags.
            fits = isinstance(words, list) and isinstance(tags, list)
            fits = fits and len(words) == len(tags) > 0
            fits = fits and all(isinstance(word, str) for word in words)
            # JSON can hold half a surrogate pair, which no tokenizer accepts: a ValueError here.
            json.dumps(words if fits else "", ensure_ascii=False).encode()
            fits = fits and all(isinstance(tag, str) or type(tag) is int for tag in tags)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: {type(error).__name__}: {error}",
                allowed=f"a JSON object with the lists tokens and {task}_tags",
            ) from error
        if not fits:
            raise UserError(
                f"{path}:{number}: a word without tag, or no words",
                allowed=f"a list of texts in tokens, and as many texts or numbers in {task}_tags",
            )
        # Tags are names or class numbers; one of the other kind is damage, not another tag.
        kind = kind or type(tags[0])
        odd = [tag for tag in tags if type(tag) is not kind]
        if odd:
            others = "texts" if kind is str else "numbers"
            raise UserError(
                f"{path}:{number}: the tag {odd[0]!r} among {others}",
                allowed=f"{task}_tags that are all texts, or all numbers",
                fix="correct the line",
            )
        sentences.append(Sentence(words=tuple(words), tags=tuple(map(str, tags))))
    return sentences


def tokens_of_words(
    words: tuple[str, ...], tokenizer: Any, max_length: int
) -> tuple[list[int], list[list[int]]]:
    """Return the token ids of a sentence, and the positions of each word's tokens.

    The words are joined with spaces; a token belongs to the word in which it ends. Words beyond
    `max_length` tokens have no positions.
    """
    encoded = tokenizer(
        " ".join(words), truncation=True, max_length=max_length, return_offsets_mapping=True
    )
    positions: list[list[int]] = [[] for _ in words]
    # The word of each character; a space belongs to the word before it.
    word_of = [number for number, word in enumerate(words) for _ in range(len(word) + 1)]
    for position, (start, end) in enumerate(encoded["offset_mapping"]):
        if end > start:  # not a special token
            positions[word_of[end - 1]].append(position)
    return encoded["input_ids"], positions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WordStates:
    """The hidden states of a file's words, and their tags."""

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
    # Tags that only the test file has cannot be predicted, and count as errors.
    names = sorted(set(train.tags))
    predicted = _classify(config, train, test.states_ND, names)
    # The classifier to beat: it ignores the model.
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
    """Return one state per word: see the picture above."""
    tokenised = [
        tokens_of_words(sentence.words, export.tokenizer, config.max_length)
        for sentence in sentences
    ]
    # All at once: the export packs sentences into forwards, longest first.
    states = export.token_states([ids for ids, _ in tokenised])
    shift = int(config.labels == "next_token")
    rows, tags, skipped = [], [], 0
    for sentence, (_, words), states_LD in zip(sentences, tokenised, states, strict=True):
        for tag, positions in zip(sentence.tags, words, strict=True):
            chosen = positions if config.merge_subwords else positions[:1]
            read = [position - shift for position in chosen if position >= shift]
            if read:
                # The mean in float32: bfloat16 would lose bits.
                rows.append(states_LD[read].float().mean(dim=0).to(states_LD.dtype))
                tags.append(tag)
            else:
                skipped += 1
    if not rows:
        raise UserError(
            f"labels: {config.labels}: no word has a hidden state to classify",
            fix="give sentences of more than one token",
        )
    return WordStates(states_ND=torch.stack(rows), tags=tags, skipped=skipped)


def _classify(
    config: ProbeConfig, train: WordStates, states_ND: torch.Tensor, names: list[str]
) -> list[str]:
    """Train on the words of one file, and tag the words of another."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = {name: number for number, name in enumerate(names)}
    labels = torch.tensor([numbers[tag] for tag in train.tags])
    # A separate generator: dropout must not change the order of the words.
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)  # the dropout
    classifier: Any = torch.nn.Linear(train.states_ND.shape[1], len(names), device=device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.lr)
    for _ in range(config.num_epochs):
        order = torch.randperm(len(labels), generator=generator)
        for rows in torch.split(order, config.batch_size):
            states = F.dropout(train.states_ND[rows].to(device).float(), config.dropout)
            # In float32, in whatever type the model computes.
            loss = F.cross_entropy(classifier(states), labels[rows].to(device))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    with torch.inference_mode():
        batches = torch.split(states_ND, config.batch_size)
        best = torch.cat([classifier(rows.to(device).float()).argmax(dim=1) for rows in batches])
    return [names[number] for number in best.tolist()]
