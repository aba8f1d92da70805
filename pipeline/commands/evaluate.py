"""`diffembed evaluate`: every step from data sets to scores."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands.arguments import Config, Overrides, load
from pipeline.config import EvaluateConfig

app = typer.Typer(help="Score exports with mteb.", no_args_is_help=True)


@app.command()
def count(config: Config, overrides: Overrides = None) -> None:
    """Print how many array elements an evaluation has (for sbatch --array=0-N)."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.score.array import num_elements

    print(num_elements(tree))


@app.command("run")
def run_evaluation(
    config: Config,
    overrides: Overrides = None,
    index: Annotated[int | None, typer.Option(help="one array element; default: all")] = None,
) -> None:
    """Score one array element, or all of them one after another."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.score.array import run_all, run_element

    if index is None:
        run_all(tree)
    else:
        run_element(tree, index)


@app.command()
def prefetch(config: Config, overrides: Overrides = None) -> None:
    """Download the tasks' data at pinned revisions, on a node that has a network."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.tasks.prefetch import prefetch as fetch_snapshots

    fetch_snapshots(tree)


@app.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """List every distinct text of all tasks once, in blocks of equal cost."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.score.array import plan as plan_texts

    plan_texts(tree)


@app.command()
def embed(
    config: Config,
    overrides: Overrides = None,
    index: Annotated[int, typer.Option(help="this element of the array")] = 0,
    of: Annotated[int, typer.Option(help="how many elements the array has")] = 1,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="default: one per GPU, else per core; under srun, its ranks"),
    ] = None,
) -> None:
    """Embed one element's share of the planned texts; blocks already there are skipped."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.score.array import embed as embed_share

    embed_share(tree, index, of, num_processes=processes)


@app.command()
def score(config: Config, overrides: Overrides = None) -> None:
    """Score all tasks from the embedded texts."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.score.array import score_all

    score_all(tree)
