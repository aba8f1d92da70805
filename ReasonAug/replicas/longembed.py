"""LongEmbed replicas: one document of a length hides what the query asks for.

Needle: a worked problem of a concept that training never met, sought by another problem of this
concept. Passkey: the number of the drawer on a concept, sought by the name of the concept.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from ReasonAug.problem import num_tokens
from ReasonAug.replicas.hub import Configs
from ReasonAug.scenes import background, draw_scene
from ReasonAug.splits import UNSEEN_CONCEPTS, Entry, by_concept

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_COPY_EVERY = 256  # tokens: a long document repeats what it hides once in every such block
_DOCUMENTS = 10


def about(cap: int) -> str:
    """The README text of both data sets."""
    return (
        f"Splits are named as in LongEmbed, but no document is longer than about {cap} tokens, so "
        "that a laptop can score them: test_N holds documents of min(N, "
        f"{cap}) tokens. What is sought is repeated once in every {_COPY_EVERY} tokens."
    )


def needle_configs(entries: Sequence[Entry], rng: Random, *, cap: int) -> Configs:
    """Config `needle` of LongEmbed: queries, corpus and qrels, told apart by split."""
    groups = [
        sorted(group, key=lambda entry: (num_tokens(entry.problem.document()), entry.id))
        for group in by_concept(entries, UNSEEN_CONCEPTS).values()
    ]
    tables: dict[str, list[dict[str, Any]]] = {"corpus": [], "queries": [], "qrels": []}
    for number, length in enumerate(LENGTHS):
        for group in groups[:_DOCUMENTS]:
            hidden = group[number % (len(group) - 1)]
            other = [entry for entry in group if entry.problem.form != hidden.problem.form]
            asked = other[number % len(other)]
            text = _hide(hidden.problem.document(), min(length, cap), rng)
            document, query = f"{length}-{hidden.id}", f"{length}-{asked.id}"
            shared = {"context_length": length}
            tables["corpus"].append({"doc_id": document, "text": text, **shared})
            tables["queries"].append({"qid": query, "text": asked.problem.statement, **shared})
            tables["qrels"].append({"qid": query, "doc_id": document, **shared})
    # One config has one schema, and an all-null column would get no type: fill up with "".
    columns = ("qid", "doc_id", "text", "context_length")
    return {
        "needle": {
            split: [{column: row.get(column, "") for column in columns} for row in rows]
            for split, rows in tables.items()
        }
    }


def passkey_configs(entries: Sequence[Entry], rng: Random, *, cap: int) -> Configs:
    """Configs `corpus`, `queries` and `default` (relevance) with one split per length."""
    configs: dict[str, dict[str, list[dict[str, Any]]]] = {
        "corpus": {},
        "queries": {},
        "default": {},
    }
    concepts = sorted({entry.problem.concept for entry in entries})
    for length in LENGTHS:
        split = f"test_{length}"
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
        for index, concept in enumerate(rng.sample(concepts, min(_DOCUMENTS, len(concepts)))):
            key = rng.randint(10000, 99999)
            hidden = (
                f"The passkey of the drawer on {concept} is {key}. Remember it: {key} is the "
                f"passkey that opens the drawer on {concept}."
            )
            document, query = f"{length}-document-{index}", f"{length}-query-{index}"
            text = _hide(hidden, min(length, cap), rng)
            question = f"What is the passkey of the drawer on {concept}?"
            rows["corpus"].append({"_id": document, "title": "", "text": text})
            rows["queries"].append({"_id": query, "text": question})
            rows["default"].append({"query-id": query, "corpus-id": document, "score": 1})
        for name in configs:
            configs[name][split] = rows[name]
    return configs


def _hide(hidden: str, length: int, rng: Random) -> str:
    """Background of about `length` tokens with `hidden` at a random place of every block."""
    blocks = []
    for _ in range(max(1, length // _COPY_EVERY)):
        scene = draw_scene(rng)
        room = min(length, _COPY_EVERY) - num_tokens(hidden)
        sentences: list[str] = []
        for sentence in background(scene, rng, _COPY_EVERY):
            room -= num_tokens(sentence)
            if room < 0:
                break
            sentences.append(sentence)
        sentences.insert(rng.randint(0, len(sentences)), hidden)
        blocks.append(" ".join(sentences))
    return " ".join(blocks)
