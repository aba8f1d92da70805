"""One report of an evaluation: report.json for programs, report.md and plots for people."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import EvaluateConfig
from pipeline.evaluation.report.by_step import give_back
from pipeline.evaluation.report.examples import examples_page
from pipeline.evaluation.report.findings import Findings, find
from pipeline.evaluation.report.merge import merge_results
from pipeline.evaluation.report.page import report_page
from pipeline.evaluation.report.tables import (
    aligned_table,
    card_rows,
    latex_table,
    markdown_table,
    score_rows,
    with_splits,
)
from pipeline.evaluation.score.results import results_digest
from pipeline.model.card import add_evaluation
from pipeline.model.parts import is_export
from pipeline.run_dir import RunDir, one_at_a_time, require_writable, write_json, write_text


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
    require_writable(folder, key="output_dir")
    # Checkpoints of a run are scored side by side: whoever writes last must have read last.
    with one_at_a_time(folder / ".lock"):
        _write(config, folder)
        run = config.training_run
        if run and config.output_dir.resolve() == RunDir(run).evaluations.resolve():
            give_back(config.output_dir)
    print(f"report: {folder / 'report.md'}", flush=True)
    return folder


def _write(config: EvaluateConfig, folder: Path) -> None:
    # Before they are read: scores that change meanwhile make this report an old one.
    digest = results_digest(config)
    findings = find(config)
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
        as_exported = model.template is None and model.rope_scaling is None
        if as_exported and is_export(model.path):
            try:
                add_evaluation(model.path, markdown_table(*card_rows(model.name, tasks)))
            except OSError as error:
                # A shared export may be read-only; the report is whole without its card.
                print(f"{model.path}: scores not added to its card ({error})", flush=True)
    print(aligned_table(*score_rows(models, tasks)))


def _draw(findings: Findings, folder: Path) -> list[Path]:
    """Write the plots that there is something to draw for."""
    # matplotlib is slow to import and only this function draws.
    from pipeline.evaluation.report.plots import plot_loss, plot_scores, plot_splits, plot_steps

    models, tasks = findings.models, findings.tasks
    figures = [plot_scores(folder / "scores.png", models, tasks)]
    if split := with_splits(tasks):
        figures.append(plot_splits(folder / "splits.png", models, split))
    if findings.curve:
        figures.append(plot_loss(folder / "loss.png", findings.curve))
    if findings.by_step:
        figures.append(plot_steps(folder / "steps.png", findings.by_step))
    return figures
