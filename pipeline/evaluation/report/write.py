"""One report of an evaluation: report.json for programs, report.md and plots for people."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.report.bootstrap import interval, paired_difference
from pipeline.evaluation.report.by_step import give_back, read_curves, step_rows
from pipeline.evaluation.report.examples import examples_markdown
from pipeline.evaluation.report.merge import merge_results
from pipeline.evaluation.report.references import published_scores, published_table
from pipeline.evaluation.report.tables import (
    aligned_table,
    card_rows,
    latex_table,
    markdown_table,
    pair_rows,
    score_rows,
    split_rows,
    with_splits,
)
from pipeline.evaluation.score.results import changed_inputs, read_result
from pipeline.evaluation.tasks.elements import Element, lengths_of, list_elements
from pipeline.model.card import add_evaluation
from pipeline.model.export import is_export
from pipeline.run_dir import RunDir, one_at_a_time, write_json, write_text

# Name in the report -> model -> what the element wrote. The name is the task's, with @LENGTH where
# a task is run at several.
Results = dict[str, dict[str, dict[str, Any]]]


def write_report(config: EvaluateConfig) -> Path:
    """Compare all models on all tasks, write the report, print its table.

    With two models or more, the last is compared with the first: paired bootstrap over queries,
    95 % interval.

    Returns:
        The folder that holds report.md, report.json and the plots.

    Raises:
        UserError: an element has not finished.
    """
    folder = RunDir(config.output_dir).report
    # Checkpoints of a run are scored side by side: whoever writes last must have read last.
    with one_at_a_time(folder / ".lock"):
        _write(config, folder)
        run = config.training_run
        if run and config.output_dir.resolve() == RunDir(run).evaluations.resolve():
            give_back(config.output_dir)
    print(f"report: {folder / 'report.md'}", flush=True)
    return folder


def _write(config: EvaluateConfig, folder: Path) -> None:
    results = collect(config)
    models = [model.name for model in config.models]
    tasks = [summarise(name, models, by_model) for name, by_model in results.items()]
    curve, by_step = read_curve(config.training_run), read_curves(config.training_run)
    # matplotlib is slow to import and only this function draws.
    from pipeline.evaluation.report.plots import plot_loss, plot_scores, plot_splits, plot_steps

    figures = [plot_scores(folder / "scores.png", models, tasks)]
    if with_splits(tasks):
        figures.append(plot_splits(folder / "splits.png", models, with_splits(tasks)))
    if curve:
        figures.append(plot_loss(folder / "loss.png", curve))
    if by_step:
        figures.append(plot_steps(folder / "steps.png", by_step))
    write_json(
        folder / "report.json",
        {
            "models": models,
            "tasks": tasks,
            "training": _training_summary(curve),
            "by_step": by_step,
        },
    )
    write_text(folder / "report.md", _markdown(config, results, tasks, curve, figures))
    write_text(folder / "report.tex", latex_table(*score_rows(models, tasks)) + "\n")
    write_text(folder / "examples.md", _examples(results, models[-1]))
    merge_results(config)
    for model in config.models:
        as_exported = model.template is None and model.rope_scaling is None
        if as_exported and is_export(model.path):
            add_evaluation(model.path, markdown_table(*card_rows(model.name, tasks)))
    header, rows = score_rows(models, tasks)
    print(aligned_table(header, rows))


def collect(config: EvaluateConfig) -> Results:
    """Results of all elements by name and model.

    Raises:
        UserError: some are missing, or were computed from other exports, data or settings than
            those of now; the message gives their indices for the array.
    """
    results: Results = {}
    missing = []
    for element in list_elements(config):
        result = read_result(element)
        if result is None:
            missing.append((element, "not scored"))
        elif changed := _changed_inputs(config, element, result):
            missing.append((element, f"changed since it was scored: {', '.join(changed)}"))
        else:
            single = len(lengths_of(config, element.task)) == 1
            name = element.task if single else f"{element.task}@{element.max_length}"
            results.setdefault(name, {})[element.model.name] = result
    if missing:
        first, why = missing[0]
        raise UserError(
            f"{len(missing)} of {len(list_elements(config))} evaluation elements have no valid "
            f"result, the first: {first.model.name} {first.task}, {why}",
            fix="their logs say why; submit the evaluation again, or run elements "
            + ",".join(str(element.index) for element, _ in missing),
        )
    return results


def _changed_inputs(
    config: EvaluateConfig, element: Element, result: dict[str, Any]
) -> tuple[str, ...]:
    try:
        return changed_inputs(config, element, result)
    except UserError:
        return ()  # an export may be deleted once it is scored; see `by_step.give_back`


def summarise(name: str, models: list[str], by_model: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One task's entry of report.json."""
    first, last = by_model[models[0]], by_model[models[-1]]
    task = first["task"]
    # A replica's score must not stand beside a published one.
    local = any(result["dataset_revision"] == "local" for result in by_model.values())
    entry: dict[str, Any] = {
        "name": name,
        "task": task,
        "benchmark": first["benchmark"],
        "metric": first["metric"],
        **{model: by_model[model]["score"] for model in models},
        "chance": first["chance"],
        "intervals": {model: interval(by_model[model]["per_query"]) for model in models},
        "by_split": {model: by_model[model]["by_split"] for model in models},
        "other_scores": {model: by_model[model]["other_scores"] for model in models},
        "replica": local,
        "num_queries": sum(len(scores) for scores in first["per_query"].values()),
        "max_length": first["max_length"],
    }
    entry["published"] = {} if local else published_scores(entry)
    if len(models) > 1:
        entry |= _difference(last, first)
    if len(models) > 2:
        entry["pairs"] = [
            {"model": over, "minus": under, **_difference(by_model[over], by_model[under])}
            for under, over in itertools.combinations(models, 2)
        ]
    return entry


def _difference(over: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
    difference, low, high = paired_difference(over["per_query"], under["per_query"])
    return {
        "difference": difference,
        "ci_low": low,
        "ci_high": high,
        "significant": low > 0 or high < 0,
    }


def read_curve(training_run: Path | None) -> list[dict[str, float]]:
    """Lines of the training run's metrics.jsonl that hold a loss; empty without a run."""
    if training_run is None:
        return []
    path = training_run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"training_run: no {path}", fix="correct training_run, or leave it out")
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [line for line in lines if "loss" in line]


def _training_summary(curve: list[dict[str, float]]) -> dict[str, float] | None:
    if not curve:
        return None
    return {
        "num_steps": len(curve),
        "first_loss": curve[0]["loss"],
        "last_loss": curve[-1]["loss"],
    }


def _markdown(
    config: EvaluateConfig,
    results: Results,
    tasks: list[dict[str, Any]],
    curve: list[dict[str, float]],
    figures: list[Path],
) -> str:
    models = [model.name for model in config.models]
    parts = ["# Evaluation report", "", markdown_table(*score_rows(models, tasks)), ""]
    if len(models) > 1:
        parts += [
            f"Difference is {models[-1]} minus {models[0]}, with the 95 % interval of a paired "
            "bootstrap over queries; `ns` marks an interval that holds 0. Chance is the expected "
            "score of a random order of the documents that a query may find.",
            "",
        ]
    published = published_table(models, tasks)
    if published is not None:
        parts += ["## Beside published scores, in percent", "", markdown_table(*published), ""]
        parts += [
            "Published scores differ in protocol; see `pipeline/evaluation/report/references.py`.",
            "",
        ]
    pairs = pair_rows(tasks)
    if pairs is not None:
        parts += ["## Every model minus those before it", "", markdown_table(*pairs), ""]
    per_split = split_rows(models, tasks)
    if per_split is not None:
        parts += ["## By length", "", markdown_table(*per_split), ""]
    for figure in figures:
        parts += [f"![{figure.stem}]({figure.name})", ""]
    summary = _training_summary(curve)
    if summary:
        parts += [
            f"Training: {summary['num_steps']} steps, loss {summary['first_loss']:.4f} -> "
            f"{summary['last_loss']:.4f}.",
            "",
        ]
    by_step = read_curves(config.training_run)
    if by_step:
        parts += ["## Score by training step", "", markdown_table(*step_rows(by_step)), ""]
    parts += ["## How each number was made", "", markdown_table(*_provenance(results)), ""]
    parts.append(f"The worst queries of {models[-1]} are in [examples.md](examples.md).")
    return "\n".join(parts) + "\n"


def _examples(results: Results, model: str) -> str:
    sections = [
        examples_markdown(f"{name} {split}", model, examples)
        for name, by_model in results.items()
        for split, examples in by_model[model]["worst_queries"].items()
    ]
    title = f"# What went wrong: the ten worst queries of {model} per task and split"
    return "\n".join([title, "", *sections])


def _provenance(results: Results) -> tuple[list[str], list[list[str]]]:
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
