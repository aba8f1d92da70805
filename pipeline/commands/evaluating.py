"""Commands that score exports: an evaluation step by step, its report, and the tagging of words."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands import USE, Config, Overrides, Processes, load, say_next
from pipeline.config import EvaluateConfig, ProbeConfig

app = typer.Typer()
evaluate = typer.Typer(help="Score exports with mteb.", no_args_is_help=True)
app.add_typer(evaluate, name="evaluate", rich_help_panel=USE)


@app.command(rich_help_panel=USE)
def probe(config: Config, overrides: Overrides = None) -> None:
    """Tag words with a linear classifier on a frozen export: accuracy and F1."""
    tree = load(ProbeConfig, config, overrides)
    from pipeline.evaluation.probe import probe as probe_words

    path = probe_words(tree)
    print(path.read_text(), end="")


@app.command(rich_help_panel=USE)
def report(config: Config, overrides: Overrides = None) -> None:
    """Collect the scores of an evaluation in tables and plots."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.report import write_report

    write_report(tree)


@evaluate.command()
def tasks() -> None:
    """List the names of benchmarks and their tasks; mteb's other retrieval tasks work as well."""
    from pipeline.evaluation.tasks import BENCHMARKS

    for benchmark, names in BENCHMARKS.items():
        print(benchmark, *names, sep="\n  ")


@evaluate.command()
def count(config: Config, overrides: Overrides = None) -> None:
    """Print the number of array elements of an evaluation (for sbatch --array=0-N)."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.run import num_elements

    print(num_elements(tree))


@evaluate.command("run")
def run_evaluation(
    config: Config,
    overrides: Overrides = None,
    index: Annotated[int | None, typer.Option(help="one array element; default: all")] = None,
) -> None:
    """Score one array element, or all of them in turn."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.run import run_all, run_element

    if index is None:
        run_all(tree)
        say_next("report", config, overrides)
    else:
        run_element(tree, index)


@evaluate.command()
def prefetch(config: Config, overrides: Overrides = None) -> None:
    """Download the tasks' data at pinned revisions, on a node with network access."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.datasets import prefetch as fetch_snapshots

    print(f"written: {fetch_snapshots(tree)}")
    say_next("evaluate run", config, overrides)


@evaluate.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """List every distinct text of all tasks once, in blocks of equal cost."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.run import plan as plan_texts

    plan_texts(tree)
    say_next("evaluate embed", config, overrides)


@evaluate.command()
def embed(
    config: Config,
    overrides: Overrides = None,
    index: Annotated[int, typer.Option(help="this element of the array")] = 0,
    of: Annotated[int, typer.Option(help="the number of elements of the array")] = 1,
    processes: Processes = None,
) -> None:
    """Embed one element's share of the planned texts; finished blocks are skipped."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.run import embed as embed_share

    number = embed_share(tree, index, of, num_processes=processes)
    print(f"element {index + 1}/{of}: {number:,} blocks embedded; the others were there already")
    say_next("evaluate score", config, overrides, "" if of == 1 else ", after all elements")


@evaluate.command()
def score(config: Config, overrides: Overrides = None) -> None:
    """Score all tasks from the embedded texts."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.run import score_all

    score_all(tree)
    say_next("report", config, overrides)
