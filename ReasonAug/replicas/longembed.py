"""Make LongEmbed replicas: one document of each length contains the answer to the query.

Needle: a worked problem of a concept that training never met, sought by another problem of this
concept. Passkey: the number of the drawer on a concept, sought by the name of the concept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from ReasonAug.problem import num_tokens
from ReasonAug.replicas.hub import Configs
from ReasonAug.scenes import background, draw_scene
from ReasonAug.splits import UNSEEN_CONCEPTS, Entry, by_concept

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_BLOCK = 256  # tokens about one scene
_DOCUMENTS = 10  # per length, as many as there are held-out concepts


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The lengths of the documents and the number of queries.

    Attributes:
        cap: Tokens of the longest document.
        divisor: A document of split test_N has N / divisor tokens. At 1 a document has the hidden
            text in every block of 256 tokens; otherwise it has it once.
        num_queries: For each length.
    """

    cap: int
    divisor: int = 1
    num_queries: int = _DOCUMENTS

    def length(self, nominal: int) -> int:
        """Return the number of tokens of a document of split test_`nominal`."""
        return min(nominal // self.divisor, self.cap)

    def about(self) -> str:
        """Return the README text of both data sets."""
        shown = "N" if self.divisor == 1 else f"N / {self.divisor}"
        copies = (
            f"is repeated once in every {_BLOCK} tokens" if self.divisor == 1 else "stands once"
        )
        return (
            f"Splits are named as in LongEmbed, but no document is longer than about {self.cap} "
            "tokens, so that a laptop can score them: test_N holds documents of "
            f"min({shown}, {self.cap}) tokens. What is sought {copies}."
        )


def needle_configs(entries: Sequence[Entry], rng: Random, *, size: Size) -> Configs:
    """Return config `needle` of LongEmbed: queries, corpus and qrels, separated by split."""
    groups = [
        sorted(group, key=lambda entry: (num_tokens(entry.problem.document()), entry.id))
        for group in by_concept(entries, UNSEEN_CONCEPTS).values()
    ]
    tables: dict[str, list[dict[str, Any]]] = {"corpus": [], "queries": [], "qrels": []}
    for number, length in enumerate(LENGTHS):
        for group in groups[:_DOCUMENTS]:
            hidden = group[number % (len(group) - 1)]
            other = [entry for entry in group if entry.problem.form != hidden.problem.form]
            text = hide(hidden.problem.document(), size, length, rng)
            document = f"{length}-{hidden.id}"
            shared = {"context_length": length}
            tables["corpus"].append({"doc_id": document, "text": text, **shared})
            for turn in range(min(size.num_queries // _DOCUMENTS, len(other))):
                asked = other[(number + turn) % len(other)]
                query = f"{length}-{asked.id}"
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


def passkey_configs(entries: Sequence[Entry], rng: Random, *, size: Size) -> Configs:
    """Return configs `corpus`, `queries` and `default` (relevance), one split per length."""
    configs: dict[str, dict[str, list[dict[str, Any]]]] = {
        "corpus": {},
        "queries": {},
        "default": {},
    }
    concepts = sorted({entry.problem.concept for entry in entries})
    for length in LENGTHS:
        split = f"test_{length}"
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
        for index, concept in enumerate(rng.sample(concepts, min(size.num_queries, len(concepts)))):
            hidden = drawer(concept, rng)
            document, query = f"{length}-document-{index}", f"{length}-query-{index}"
            text = hide(hidden, size, length, rng)
            rows["corpus"].append({"_id": document, "title": "", "text": text})
            rows["queries"].append({"_id": query, "text": drawer_question(concept)})
            rows["default"].append({"query-id": query, "corpus-id": document, "score": 1})
        for name in configs:
            configs[name][split] = rows[name]
    return configs


def drawer(concept: str, rng: Random) -> str:
    """Return the sentence that a passkey document hides."""
    key = rng.randint(10000, 99999)
    return (
        f"The passkey of the drawer on {concept} is {key}. Remember it: {key} is the "
        f"passkey that opens the drawer on {concept}."
    )


def drawer_question(concept: str) -> str:
    """Return the question about it."""
    return f"What is the passkey of the drawer on {concept}?"


def hide(hidden: str, size: Size, nominal: int, rng: Random) -> str:
    """Return background of a document's length in blocks, with `hidden` at a random position."""
    length = size.length(nominal)
    count = max(1, length // _BLOCK)
    holding = range(count) if size.divisor == 1 else (rng.randrange(count),)
    blocks = []
    for block in range(count):
        scene = draw_scene(rng)
        tokens = min(length, _BLOCK)
        room = tokens - (num_tokens(hidden) if block in holding else 0)
        sentences: list[str] = []
        for sentence in background(scene, rng, tokens):
            room -= num_tokens(sentence)
            if room < 0:
                break
            sentences.append(sentence)
        if block in holding:
            sentences.insert(rng.randint(0, len(sentences)), hidden)
        blocks.append(" ".join(sentences))
    return " ".join(blocks)
