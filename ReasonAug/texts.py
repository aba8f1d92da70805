"""Write plain texts to pre-train on, and rows that search for a fact in a short text.

Only the training split is used: no problem, name or definition of an evaluation concept occurs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from pipeline.errors import UserError
from ReasonAug.concepts import CONCEPTS
from ReasonAug.files import write_jsonl
from ReasonAug.replicas import read_entries
from ReasonAug.replicas.longembed import Size, drawer, drawer_question, hide
from ReasonAug.splits import TRAIN, Entry, by_concept, slug
from ReasonAug.triplets import Row

TASK = "Retrieve text based on user query"  # the evaluation's instruction for tasks without one
_SHORTEST = 128  # tokens of a long text
_ROW_TOKENS = 64  # of a document with a hidden passkey
_ROWS = 48  # per concept


def write_texts(data: Path, *, seed: int, num_long: int, max_tokens: int) -> None:
    """Write `texts.jsonl` and `hidden.jsonl` next to `problems.jsonl`.

    Args:
        data: Folder written by `templates`.
        seed: Same seed, same bytes.
        num_long: Texts that hide a problem or a passkey in much background.
        max_tokens: Length of the longest of these (`num_tokens`).

    Raises:
        UserError: `data` is not such a folder, or an argument is out of range.
    """
    if max_tokens < _SHORTEST:
        raise UserError(found=f"--max-tokens {max_tokens}", allowed=f">= {_SHORTEST}")
    if num_long < 0:
        raise UserError(found=f"--num-long {num_long}", allowed=">= 0")
    entries = read_entries(data / "problems.jsonl", (TRAIN,))
    rng = Random(f"{seed}/texts")
    texts = [entry.problem.document() for entry in entries]
    texts += [concept.definition_body() for concept in CONCEPTS if not concept.held_out]
    texts += _long_texts(entries, rng, count=num_long, max_tokens=max_tokens)
    rng.shuffle(texts)
    rows = list(hidden_rows(entries, Random(f"{seed}/hidden")))
    write_jsonl(data / "texts.jsonl", ({"text": text} for text in texts))
    write_jsonl(data / "hidden.jsonl", rows)
    print(f"texts: {len(texts)}, {num_long} of them long")
    print(f"rows that search for a hidden passkey: {len(rows)}")


def _long_texts(
    entries: Sequence[Entry], rng: Random, *, count: int, max_tokens: int
) -> Iterator[str]:
    """Return long texts that hide a worked problem or a passkey in turn, of log-uniform lengths."""
    size = Size(cap=max_tokens, divisor=1)
    for number in range(count):
        entry = rng.choice(entries)
        length = round(math.exp(rng.uniform(math.log(_SHORTEST), math.log(max_tokens))))
        problem = entry.problem
        hidden = problem.document() if number % 2 else drawer(problem.concept, rng)
        yield hide(hidden, size, length, rng)


def hidden_rows(entries: Sequence[Entry], rng: Random) -> Iterator[Row]:
    """Return rows: question about a concept's drawer, text with its passkey, another text."""
    size = Size(cap=_ROW_TOKENS)
    domains = {name: group[0].problem.domain for name, group in by_concept(entries, TRAIN).items()}
    for concept, domain in domains.items():
        others = [name for name in domains if name != concept]
        for number in range(1, _ROWS + 1):
            other = rng.choice(others)
            yield {
                "id": f"hidden-{slug(concept)}-{number:04d}",
                "domain": domain,
                "instance": concept,
                "task_type": "hidden",
                "task": TASK,
                "user_query": drawer_question(concept),
                "positive_document": hide(drawer(concept, rng), size, _ROW_TOKENS, rng),
                "hard_negative_document": hide(drawer(other, rng), size, _ROW_TOKENS, rng),
                "negative_instance": other,
            }
