"""Write the report of an evaluation.

results of all elements --summarise--> report.json
                        --report_page--> report.md, plots, report.tex
                        --examples_page--> examples.md
                        --merge_results--> mteb's files for the leaderboard
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.results import (
    Curves,
    Result,
    changed_inputs,
    delete_scored_exports,
    merge_results,
    read_curves,
    read_result,
    results_digest,
)
from pipeline.evaluation.tables import (
    Strata,
    Table,
    aligned_table,
    card_results,
    card_rows,
    interval,
    latex_table,
    markdown_table,
    pair_rows,
    paired_difference,
    plot_loss,
    plot_scores,
    plot_splits,
    plot_steps,
    published_scores,
    published_table,
    score_rows,
    split_rows,
    step_rows,
    with_splits,
)
from pipeline.evaluation.tasks import LOCAL_REVISION, Element, lengths_of, list_elements
from pipeline.files import one_at_a_time, read_json_lines, require_writable, write_json, write_text
from pipeline.model.card import add_evaluation
from pipeline.model.export_folder import is_export
from pipeline.run_folder import RunDir


def write_report(config: EvaluateConfig) -> Path:
    """Compare all models on all tasks, write the report, and print its table.

    With two models or more, the last is compared with the first: paired bootstrap over queries,
    95 % interval.

    Returns:
        The folder that holds report.md, report.json and the plots.

    Raises:
        UserError: an element has not finished.
    """
    folder = RunDir(config.output_dir).report
    require_writable(folder, key="output_dir")
    # Checkpoints of a run are scored in parallel: the last writer must also be the last reader.
    with one_at_a_time(folder / ".lock"):
        _write(config, folder)
        # Only exports that training itself made for its checkpoints, never a user's.
        run = config.training_run
        if run and config.output_dir.resolve() == RunDir(run).evaluations.resolve():
            delete_scored_exports(config.output_dir)
    print(f"report: {folder / 'report.md'}", flush=True)
    return folder


def _write(config: EvaluateConfig, folder: Path) -> None:
    # Submission skips a report whose digest is that of the present results. Taken before they are
    # read: scores that change meanwhile make this report outdated.
    digest = results_digest(config)
    findings = collect_findings(config)
    models, tasks = findings.models, findings.tasks
    write_json(
        folder / "report.json",
        {
            "models": models,
            "tasks": tasks,
            "training": findings.training,
            "by_step": findings.by_step,
            "results_digest": digest,
        },
    )
    write_text(folder / "report.md", report_page(findings, _draw(findings, folder)))
    write_text(folder / "report.tex", latex_table(*score_rows(models, tasks)) + "\n")
    write_text(folder / "examples.md", examples_page(findings.results, models[-1]))
    merge_results(config)
    for model in config.models:
        # A card must show the export's own scores, without changes of the config.
        as_exported = model.template is None and model.rope_scaling is None
        if as_exported and is_export(model.path):
            try:
                table = markdown_table(*card_rows(model.name, tasks))
                results = card_results(model.name, tasks)
                add_evaluation(model.path, table, name=model.name, results=results)
            except OSError as error:
                # A shared export may be read-only; the report does not need its card.
                print(f"{model.path}: scores not added to its card ({error})", flush=True)
    print(aligned_table(*score_rows(models, tasks)))


def _draw(findings: Findings, folder: Path) -> list[Path]:
    """Write the plots that have data."""
    models, tasks = findings.models, findings.tasks
    figures = [plot_scores(folder / "scores.png", models, tasks)]
    if split := with_splits(tasks):
        figures.append(plot_splits(folder / "splits.png", models, split))
    if findings.curve:
        figures.append(plot_loss(folder / "loss.png", findings.curve))
    if findings.by_step:
        figures.append(plot_steps(folder / "steps.png", findings.by_step))
    return figures


# Name in the report -> model -> result. The name is the task's, with @LENGTH for a task that is run
# at several lengths.
Results = dict[str, dict[str, Result]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """Everything that the pages, tables and plots of a report show.

    Attributes:
        models: names, in the order of the config.
        results: of all elements.
        tasks: entries of report.json, one per name in `results`.
        curve: lines of the training run's metrics that hold a loss.
        by_step: scores of the training run's checkpoints.
    """

    models: list[str]
    results: Results
    tasks: list[dict[str, Any]]
    curve: list[dict[str, float]]
    by_step: Curves

    @property
    def training(self) -> dict[str, Any] | None:
        """Summarise the training run in a few numbers; None without one."""
        if not self.curve:
            return None
        return {"num_steps": len(self.curve), **compare_ends(self.curve)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """A line of metrics as far as the report needs it; a loss that was not finite is null."""

    step: int
    loss: float | None = None


def collect_findings(config: EvaluateConfig) -> Findings:
    """Read and compare everything.

    Raises:
        UserError: an element has no valid result, or the training run has no metrics.
    """
    results = collect_results(config)
    models = [model.name for model in config.models]
    return Findings(
        models=models,
        results=results,
        tasks=[summarise(name, models, by_model) for name, by_model in results.items()],
        curve=read_curve(config.training_run),
        by_step=read_curves(config.training_run),
    )


def collect_results(config: EvaluateConfig) -> Results:
    """Read the results of all elements, by name and model.

    Raises:
        UserError: some are missing, or their export, data or settings have changed since; the
            message gives their indices for the array.
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
            fix="see their logs; submit the evaluation again, or run elements "
            + ",".join(str(element.index) for element, _ in missing),
        )
    return results


def _changed_inputs(config: EvaluateConfig, element: Element, result: Result) -> tuple[str, ...]:
    try:
        return changed_inputs(config, element, result)
    except UserError:
        return ()  # the export was deleted after scoring; see `delete_scored_exports`


def summarise(name: str, models: list[str], by_model: dict[str, Result]) -> dict[str, Any]:
    """Return one task's entry of report.json."""
    first, last = by_model[models[0]], by_model[models[-1]]
    task = first["task"]
    # The score of a replica must not be compared with a published one.
    local = any(result["dataset_revision"] == LOCAL_REVISION for result in by_model.values())
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
        entry |= _difference(last["per_query"], first["per_query"])
        entry["split_differences"] = {
            split: _difference(_within(split, last), _within(split, first))
            for split in first["by_split"]
        }
    # Of two models, `difference` is the only pair.
    if len(models) > 2:
        entry["pairs"] = [
            {
                "model": over,
                "minus": under,
                **_difference(by_model[over]["per_query"], by_model[under]["per_query"]),
            }
            # Every model minus every earlier one.
            for under, over in itertools.combinations(models, 2)
        ]
    return entry


def _within(split: str, result: Result) -> Strata:
    """Return the query scores of one split in all subsets; strata are named `subset/split`."""
    strata: Strata = result["per_query"]
    return {name: scores for name, scores in strata.items() if name.endswith(f"/{split}")}


def _difference(over: Strata, under: Strata) -> dict[str, Any]:
    difference, low, high = paired_difference(over, under)
    return {
        "difference": difference,
        "ci_low": low,
        "ci_high": high,
        # The interval excludes 0; that of a single query has no width and tells nothing.
        "significant": (low > 0 or high < 0) and sum(map(len, over.values())) > 1,
    }


def compare_ends(curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare the loss at both ends of a run, over batches of one kind.

    Kinds differ in loss by more than training changes it, so that the first line and the last tell
    little about a run.

    Returns:
        `kind`, the one with the most batches; `averaged`, how many of its first and of its last
        batches the means `first_loss` and `last_loss` are over.
    """
    # Runs over a mixture have no kinds: all lines have the kind "".
    kinds = Counter(line.get("kind", "") for line in curve)
    kind = kinds.most_common(1)[0][0]
    losses = [line["loss"] for line in curve if line.get("kind", "") == kind]
    # At most a quarter at each end, so that the ends of a short run do not overlap.
    count = max(1, min(10, len(losses) // 4))
    return {
        "kind": kind,
        "averaged": count,
        "first_loss": fmean(losses[:count]),
        "last_loss": fmean(losses[-count:]),
    }


def read_curve(training_run: Path | None) -> list[dict[str, float]]:
    """Read the lines of a training run's metrics.jsonl that have a loss; empty without a run."""
    if training_run is None:
        return []
    path = training_run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"training_run: no {path}", fix="correct training_run, or leave it out")
    fix = "correct training_run, or leave it out"
    lines = [line for _, line in read_json_lines(path, _Line, fix=fix)]
    if not lines:
        raise UserError(f"{path}: no step in it", fix=fix)
    # The loss of a step that was skipped is null.
    return [line for line in lines if line.get("loss") is not None]


def examples_page(results: Results, model: str) -> str:
    """Format the worst queries of a model on every task."""
    sections = [
        _examples_of(f"{name} {split}", model, examples)
        for name, by_model in results.items()
        for split, examples in by_model[model]["worst_queries"].items()
    ]
    title = f"# What went wrong: the ten worst queries of {model} per task and split"
    return "\n".join([title, "", *sections])


def _examples_of(name: str, model: str, examples: Sequence[Mapping[str, Any]]) -> str:
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
    # In one line: headings and lists inside a text would become the page's.
    return " ".join(str(row["text"]).split())


def report_page(findings: Findings, figures: Sequence[Path]) -> str:
    """Format report.md.

    Args:
        findings: the content.
        figures: plots in the report's folder.
    """
    models, tasks = findings.models, findings.tasks
    published = _section("Next to published scores, in percent", published_table(models, tasks))
    if published:
        published += [
            "Published scores differ in protocol; see `pipeline/evaluation/published.yaml`.",
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
    """Format a table under its title; nothing without a table."""
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
    return [*lines, *_few_queries(findings.tasks)]


# Below, an interval holds the true value clearly less often than it claims.
_FEW_QUERIES = 10


def _few_queries(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warn of tasks with so few queries that resampling them tells little; nothing without any."""
    few = [f"{t['name']} ({t['num_queries']})" for t in tasks if t["num_queries"] < _FEW_QUERIES]
    if not few:
        return []
    return [
        f"Too few queries for these intervals: {', '.join(few)}. With normally distributed scores, "
        "an interval covers the true mean in 9 of 10 cases for 8 queries and in 7 of 10 for 3; for "
        "one query it has no width.",
        "",
    ]


def _training(findings: Findings) -> list[str]:
    training = findings.training
    if training is None:
        return []
    count, kind = training["averaged"], training["kind"]
    # One batch has no mean.
    steps = f"the first and the last {count} steps" if count > 1 else "the first and the last step"
    return [
        f"Training: {training['num_steps']} steps, loss {training['first_loss']:.4f} -> "
        f"{training['last_loss']:.4f} (mean of {steps}" + (f" of {kind}" if kind else "") + ").",
        "",
    ]


def _provenance(results: Results) -> Table:
    header = ["task", "model", "revision", "max length", "precision", "query template"]
    header += ["document template", "instruction", "data set"]
    # A column that would be empty in most reports.
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
    """Format a template with visible line breaks, as in a config."""
    return f"`{json.dumps(template, ensure_ascii=False)[1:-1]}`"
