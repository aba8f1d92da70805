"""Tagged sentences, and which of a sentence's tokens belong to which word."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

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
            fits = fits and all(isinstance(tag, str | int) for tag in tags)
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
