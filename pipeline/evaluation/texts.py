"""The strings of a task exactly as mteb defines them, and what they become for a model.

mteb joins a document's title and text, and a query's text and its own (FollowIR) instruction. That
happens here once; nothing downstream may add either again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def document_texts(rows: Mapping[str, Sequence[Any]]) -> list[str]:
    """Title and text of each document.

    Args:
        rows: columns of a corpus, `text` and optionally `title`.
    """
    texts = list(rows["text"])
    titles = list(rows["title"]) if "title" in rows else [""] * len(texts)
    return [
        f"{title} {text}".strip() if title else text.strip()
        for title, text in zip(titles, texts, strict=True)
    ]


def query_texts(rows: Mapping[str, Sequence[Any]]) -> list[str]:
    """Text of each query, followed by the query's own instruction where the task has one.

    Args:
        rows: columns of the queries, `text` and optionally `instruction`.
    """
    texts = list(rows["text"])
    if "instruction" not in rows:
        return texts
    return [
        text if instruction is None else f"{text} {instruction}"
        for text, instruction in zip(texts, rows["instruction"], strict=True)
    ]
