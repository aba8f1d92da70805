"""The worst queries of a model as a page: where to look when a score is low."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def examples_markdown(name: str, model: str, examples: Sequence[Mapping[str, Any]]) -> str:
    """One task's examples as a section of Markdown."""
    parts = [f"## {name}, {model}", ""]
    for example in examples:
        parts += [f"**{example['query']}**, score {example['score']:.4f}: {_line(example)}", ""]
        parts += [
            f"{document['rank']}. {'relevant' if document['relevant'] else 'not relevant'}, "
            f"{document['similarity']:.4f}, `{document['id']}`: {_line(document)}"
            for document in example["documents"]
        ]
        parts.append("")
    return "\n".join(parts)


def _line(row: Mapping[str, Any]) -> str:
    return " ".join(str(row["text"]).split())
