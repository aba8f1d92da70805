"""The worst queries of a model as a page: where to look when a score is low."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.report.findings import Results


def examples_page(results: Results, model: str) -> str:
    """The worst queries of a model on every task."""
    sections = [
        _section(f"{name} {split}", model, examples)
        for name, by_model in results.items()
        for split, examples in by_model[model]["worst_queries"].items()
    ]
    title = f"# What went wrong: the ten worst queries of {model} per task and split"
    return "\n".join([title, "", *sections])


def _section(name: str, model: str, examples: Sequence[Mapping[str, Any]]) -> str:
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
