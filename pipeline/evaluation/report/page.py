"""The report as Markdown, a section per question that a reader may have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.evaluation.report.by_step import step_rows
from pipeline.evaluation.report.findings import Findings, Results
from pipeline.evaluation.report.references import published_table
from pipeline.evaluation.report.tables import (
    Table,
    markdown_table,
    pair_rows,
    score_rows,
    split_rows,
)


def report_page(findings: Findings, figures: Sequence[Path]) -> str:
    """The report itself.

    Args:
        findings: what it tells.
        figures: plots beside it.
    """
    models, tasks = findings.models, findings.tasks
    published = _section("Beside published scores, in percent", published_table(models, tasks))
    if published:
        published += [
            "Published scores differ in protocol; see `pipeline/evaluation/report/references.py`.",
            "",
        ]
    steps = step_rows(findings.by_step) if findings.by_step else None
    lines = [
        *_scores(findings),
        *published,
        *_section("Every model minus those before it", pair_rows(tasks)),
        *_section("By length", split_rows(models, tasks)),
        *(line for figure in figures for line in (f"![{figure.stem}]({figure.name})", "")),
        *_training(findings),
        *_section("Score by training step", steps),
        *_section("How each number was made", _provenance(findings.results)),
        f"The worst queries of {models[-1]} are in [examples.md](examples.md).",
    ]
    return "\n".join(lines) + "\n"


def _section(title: str, table: Table | None) -> list[str]:
    """A table under its title; nothing where there is no table."""
    return [] if table is None else [f"## {title}", "", markdown_table(*table), ""]


def _scores(findings: Findings) -> list[str]:
    models = findings.models
    lines = ["# Evaluation report", "", markdown_table(*score_rows(models, findings.tasks)), ""]
    if len(models) > 1:
        lines += [
            f"Difference is {models[-1]} minus {models[0]}, with the 95 % interval of a paired "
            "bootstrap over queries; `ns` marks an interval that holds 0. Chance is the expected "
            "score of a random order of the documents that a query may find.",
            "",
        ]
    return lines


def _training(findings: Findings) -> list[str]:
    training = findings.training
    if training is None:
        return []
    count, kind = training["averaged"], training["kind"]
    steps = f"the first and the last {count} steps" if count > 1 else "the first and the last step"
    return [
        f"Training: {training['num_steps']} steps, loss {training['first_loss']:.4f} -> "
        f"{training['last_loss']:.4f} (mean of {steps}" + (f" of {kind}" if kind else "") + ").",
        "",
    ]


def _provenance(results: Results) -> Table:
    header = ["task", "model", "revision", "max length", "precision", "query template"]
    header += ["document template", "instruction", "data set"]
    scaled = any(r.get("rope_scaling") for by_model in results.values() for r in by_model.values())
    if scaled:
        header.append("RoPE scaling")
    rows = [
        [
            task,
            model,
            result["revision"],
            str(result["max_length"]),
            result["precision"],
            _code(result["query_template"]),
            _code(result["document_template"]),
            result["instruction"] or "none",
            result["dataset_revision"][:12],
            *([result.get("rope_scaling") or "none"] if scaled else []),
        ]
        for task, by_model in results.items()
        for model, result in by_model.items()
    ]
    return header, rows


def _code(template: str) -> str:
    """A template as it is written in a config: line breaks visible."""
    return f"`{json.dumps(template, ensure_ascii=False)[1:-1]}`"
