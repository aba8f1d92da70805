"""Rows of the report's tables, and their layout as text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Table = tuple[list[str], list[list[str]]]


def score_rows(models: Sequence[str], tasks: Sequence[dict[str, Any]]) -> Table:
    """One row per task: every model's score, chance, and the difference with its interval."""
    header = ["task", "metric", *models, "chance"]
    if len(models) > 1:
        header += ["difference", "95 % interval"]
    rows = []
    for task in tasks:
        row = [task["name"], task["metric"], *(f"{task[model]:.4f}" for model in models)]
        row.append("" if task["chance"] is None else f"{task['chance']:.4f}")
        if len(models) > 1:
            row += [f"{task['difference']:+.4f}", _interval(task)]
        rows.append(row)
    return header, rows


def card_rows(model: str, tasks: Sequence[dict[str, Any]]) -> Table:
    """One row per task for the card of a single model."""
    rows = []
    for task in tasks:
        low, high = task["intervals"][model]
        cells = [f"{task[model]:.4f}", f"[{low:.4f}, {high:.4f}]", str(task["max_length"])]
        rows.append([task["name"], task["metric"], *cells])
    return ["task", "metric", "score", "95 % interval", "max length"], rows


def pair_rows(tasks: Sequence[dict[str, Any]]) -> Table | None:
    """One row per pair of models: their difference on every task; None for less than three."""
    if "pairs" not in tasks[0]:
        return None
    rows = []
    for number, pair in enumerate(tasks[0]["pairs"]):
        found = [task["pairs"][number] for task in tasks]
        cells = [f"{entry['difference']:+.4f} {_interval(entry)}" for entry in found]
        rows.append([f"{pair['model']} - {pair['minus']}", *cells])
    return ["models", *(task["name"] for task in tasks)], rows


def _interval(entry: dict[str, Any]) -> str:
    mark = "" if entry["significant"] else " ns"
    return f"[{entry['ci_low']:+.4f}, {entry['ci_high']:+.4f}]{mark}"


def with_splits(tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tasks that have several splits, one per document length."""
    return [task for task in tasks if len(next(iter(task["by_split"].values()))) > 1]


def split_rows(models: Sequence[str], tasks: Sequence[dict[str, Any]]) -> Table | None:
    """Scores by split for the tasks that have several, with the difference; None for no such task.

    A split is usually a document length.
    """
    header = ["task", "split", *models]
    if len(models) > 1:
        header += ["difference", "95 % interval"]
    rows = []
    for task in with_splits(tasks):
        for split in task["by_split"][models[0]]:
            scores = (f"{task['by_split'][model][split]:.4f}" for model in models)
            row = [task["name"], split, *scores]
            if len(models) > 1:
                found = task["split_differences"][split]
                row += [f"{found['difference']:+.4f}", _interval(found)]
            rows.append(row)
    return (header, rows) if rows else None


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a LaTeX tabular of the booktabs package."""
    lines = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in [header, *rows]]
    columns = "l" + "r" * (len(header) - 1)
    body = [lines[0], r"\midrule", *lines[1:]]
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]
    )


def _latex(cell: str) -> str:
    for symbol in "&%$#_{}":
        cell = cell.replace(symbol, "\\" + symbol)
    return cell


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column left, the others right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        for row in [header, rule, *rows]
    )


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as columns of spaces, for a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    )
