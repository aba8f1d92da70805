"""Write training rows whose long documents contain the answer to the query once.

Only the training split is used, and sentences and questions are worded differently from the
LongEmbed replicas'. The query of a needle is another problem of a training concept, the query of a
note is about its topic. Background comes from the same templates as everywhere in ReasonAug.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from pipeline.errors import UserError
from ReasonAug.concepts import CONCEPTS
from ReasonAug.files import write_jsonl
from ReasonAug.problem import num_tokens
from ReasonAug.replicas import read_entries
from ReasonAug.scenes import background, draw_scene
from ReasonAug.splits import TRAIN, Entry, by_concept
from ReasonAug.triplets import TASKS, Row

_SHORTEST = 64  # tokens of a document
_SCENE_SENTENCES = 16  # sentences about one scene before the next scene

_SYLLABLE = ("bcdfghklmnprstvw", "aeiou", ("", "l", "n", "r", "s", "t"))  # sounds in order

NOTE_TASK = "Given a question about a note, retrieve the text that holds the note"
# Notes about a topic, and the question that only a document with the note answers.
NOTES = (
    (
        "The combination of the locker for {topic} is {number}. Whoever needs the locker for "
        "{topic} dials {number}.",
        "Which combination opens the locker for {topic}?",
    ),
    (
        "The folder about {topic} lies in room {number}. Nothing but {topic} is kept in {number}.",
        "In which room is the folder about {topic}?",
    ),
    (
        "Ask for shelf {number} to see the box with {topic}; shelf {number} has only {topic}.",
        "On which shelf is the box with {topic}?",
    ),
    (
        "The extension of the expert for {topic} is {number}. Call {number} about {topic}.",
        "What is the extension of the expert for {topic}?",
    ),
)


def write_long_rows(data: Path, *, seed: int, num_rows: int, max_tokens: int) -> None:
    """Write `long.jsonl` next to `problems.jsonl`: notes and needles in turn.

    Args:
        data: Folder written by `templates`.
        seed: Same seed, same bytes.
        num_rows: Rows to write.
        max_tokens: Length of the longest document (`num_tokens`).

    Raises:
        UserError: `data` is not such a folder, or an argument is out of range.
    """
    if max_tokens < _SHORTEST:
        raise UserError(found=f"--max-tokens {max_tokens}", allowed=f">= {_SHORTEST}")
    if num_rows < 2:
        raise UserError(found=f"--rows {num_rows}", allowed=">= 2")
    entries = read_entries(data / "problems.jsonl", (TRAIN,))
    rows = list(long_rows(entries, Random(f"{seed}/long"), count=num_rows, max_tokens=max_tokens))
    write_jsonl(data / "long.jsonl", rows)
    longest = max(num_tokens(row["positive_document"]) for row in rows)
    print(f"rows with long documents: {len(rows)}, the longest of {longest} tokens")


def long_rows(
    entries: Sequence[Entry], rng: Random, *, count: int, max_tokens: int
) -> Iterator[Row]:
    """Return rows of both kinds in turn; document lengths are uniform on a log scale."""
    concepts = by_concept(entries, TRAIN)
    topics = _topics(rng, sorted(concepts))
    for number in range(count):
        length = round(math.exp(rng.uniform(math.log(_SHORTEST), math.log(max_tokens))))
        row = _note(next(topics), rng) if number % 2 else _needle(concepts, rng)
        hidden = row["positive_document"]
        yield {
            "id": f"long-{number:06d}",
            **row,
            "positive_document": hide_once(hidden, length, rng),
        }


def _needle(concepts: dict[str, list[Entry]], rng: Random) -> Row:
    """Return a problem as the query, and a worked problem of the same concept to hide."""
    asked, hidden = rng.sample(concepts[rng.choice(sorted(concepts))], 2)
    return {
        "domain": hidden.problem.domain,
        "instance": hidden.problem.concept,
        "task_type": "long-p2ps",
        "task": TASKS["p2ps"],
        "user_query": asked.problem.statement,
        "positive_document": hidden.problem.document(),
    }


def _note(topic: str, rng: Random) -> Row:
    """Return a question about a topic, and the note to hide."""
    note, question = rng.choice(NOTES)
    return {
        "domain": "notes",
        "instance": topic,
        "task_type": "long-note",
        "task": NOTE_TASK,
        "user_query": question.format(topic=topic),
        "positive_document": note.format(topic=topic, number=rng.randint(100, 999)),
    }


def _topics(rng: Random, names: Sequence[str]) -> Iterator[str]:
    """Yield names of training concepts, pairs of words of their definitions, and invented names.

    Invented names make the pieces of words that training never shows count as content.
    """
    known = set(names)
    texts = [concept.definition for concept in CONCEPTS if concept.name in known]
    words = sorted({word for text in texts for word in re.findall(r"\b[a-z]{5,}\b", text)})
    while True:
        for name in rng.sample(names, len(names)):
            yield name
            yield " ".join(rng.sample(words, 2))
            yield " ".join(_invented(rng) for _ in range(2))


def _invented(rng: Random) -> str:
    """Return a word of two to four random syllables."""
    syllables = ("".join(map(rng.choice, _SYLLABLE)) for _ in range(rng.randint(2, 4)))
    return "".join(syllables)


def hide_once(hidden: str, length: int, rng: Random) -> str:
    """Return background of about `length` tokens with `hidden` at a random position."""
    room = length - num_tokens(hidden)
    sentences: list[str] = []
    while room > 0:
        for sentence in background(draw_scene(rng), rng, _SCENE_SENTENCES):
            room -= num_tokens(sentence)
            if room < 0:
                break
            sentences.append(sentence)
    sentences.insert(rng.randint(0, len(sentences)), hidden)
    return " ".join(sentences)
