"""The strings of a task exactly as mteb defines them, and what they become for a model.

mteb joins a document's title and text, and a query's text and its own (FollowIR) instruction. That
happens here once; nothing downstream may add either again.
"""

from __future__ import annotations

from typing import Any, Literal

Role = Literal["query", "document"]


def document_texts(table: Any) -> list[str]:
    """Title and text of each document of a corpus (columns `text` and optionally `title`)."""
    texts = table["text"][:]
    titles = table["title"][:] if "title" in table.column_names else [""] * len(texts)
    return [
        f"{title} {text}".strip() if title else text.strip()
        for title, text in zip(titles, texts, strict=True)
    ]


def query_texts(table: Any) -> list[str]:
    """Text of each query, followed by its own instruction where the task has that column."""
    texts: list[str] = table["text"][:]
    if "instruction" not in table.column_names:
        return texts
    return [
        text if instruction is None else f"{text} {instruction}"
        for text, instruction in zip(texts, table["instruction"][:], strict=True)
    ]
