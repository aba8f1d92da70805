"""The `diffembed` command: thin, every subcommand one call into a room."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.commands import data, evaluate, plan
from pipeline.commands.arguments import DEFAULT_DEEPSPEED, Config, Overrides, load
from pipeline.commands.encode import encode
from pipeline.config import (
    EvaluateConfig,
    ExportStep,
    PrepareConfig,
    ProbeConfig,
    StarterConfig,
    TrainConfig,
)
from pipeline.errors import UserError, errors_end_the_process

# Heavy packages are imported inside the commands, behind the reading of their configs: `--help` and
# the faults of a config are answered at once.
app = typer.Typer(
    help="Turn a diffusion or autoregressive language model into a text embedder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data")
app.add_typer(plan.app, name="plan")
app.add_typer(evaluate.app, name="evaluate")

Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]


@app.command()
def starter(config: Config, overrides: Overrides = None) -> None:
    """Make a small model and its tokenizer to start from."""
    tree = load(StarterConfig, config, overrides)
    from pipeline.model.starter import build_starter

    print(build_starter(tree))


@app.command()
def prepare(config: Config, overrides: Overrides = None) -> None:
    """Tokenise raw data into shards; alone, under mpirun or under srun."""
    tree = load(PrepareConfig, config, overrides)
    from pipeline.data.prepare import prepare as prepare_shards

    prepare_shards(tree)


@app.command()
def stop(run: Run) -> None:
    """Ask a running training to save a checkpoint and stop (it exits with 75)."""
    from pipeline.run_dir import RunDir

    if not RunDir(run).config.exists():
        raise UserError(f"{run}: no run (it holds no config.yaml)", fix="give a run's output_dir")
    RunDir(run).stop_request.touch()
    print(f"{run}: asked to stop at the next step")


@app.command()
def rewind(
    run: Run,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="a name like step-000100")
    ],
) -> None:
    """Let a run go on from an older checkpoint; it is checked first, and none is deleted."""
    from pipeline.run_dir import RunDir
    from pipeline.training.checkpoint import rewind as rewind_to

    print(f"{run}: its next start goes on from {rewind_to(RunDir(run).checkpoints, checkpoint)}")


@app.command()
def export(
    config: Config,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str, typer.Option(help="latest, a name like step-000100, or init (the untrained model)")
    ] = "latest",
    output: Annotated[Path | None, typer.Option(help="default: the run's export folder")] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="leave out the weights the adapter belongs to")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="compare the vectors of sentence-transformers and transformers with the trained "
            "model's before the folder takes its place",
        ),
    ] = True,
) -> None:
    """Write a folder that sentence-transformers and transformers load without this package."""
    tree = load(TrainConfig, config, overrides)
    from pipeline.training.export import export_run

    print(export_run(tree, which=checkpoint, output=output, adapter_only=adapter_only, check=check))


@app.command()
def submit(
    what: Annotated[
        Literal["prepare", "train", "export", "evaluate", "report", "all"],
        typer.Argument(metavar="JOB", help="prepare, train, export, evaluate, report or all"),
    ],
    config: Config,
    overrides: Overrides = None,
    deepspeed: Annotated[Path, typer.Option(help="train: see ds_configs/")] = DEFAULT_DEEPSPEED,
    checkpoint: Annotated[str, typer.Option(help="export: as of `diffembed export`")] = "latest",
    output: Annotated[Path | None, typer.Option(help="export: the same")] = None,
    texts: Annotated[
        int | None, typer.Option(help="evaluate: array elements that share all tasks' texts")
    ] = None,
    sbatch: Annotated[str, typer.Option(help="flags of sbatch for this job only")] = "",
    after: Annotated[list[str] | None, typer.Option(help="id of a job to wait for")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the batch scripts")] = False,
) -> None:
    """Submit a job, or a whole chain, to Slurm; submitted again, it does nothing twice."""
    from pipeline.submission.command import submit_command

    submit_command(
        what,
        config,
        tuple(overrides or ()),
        deepspeed=deepspeed,
        exports=ExportStep(checkpoint=checkpoint, output=output),
        text_elements=texts,
        flags=sbatch,
        after=tuple(after or ()),
        dry_run=dry_run,
    )


app.command()(encode)


@app.command()
def probe(config: Config, overrides: Overrides = None) -> None:
    """Tag words by a linear classifier on a frozen export: accuracy and F1."""
    tree = load(ProbeConfig, config, overrides)
    from pipeline.evaluation.words.probe import probe as probe_words

    path = probe_words(tree)
    print(path.read_text(), end="")


@app.command()
def report(config: Config, overrides: Overrides = None) -> None:
    """Gather the scores of an evaluation into tables and plots."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.report.write import write_report

    write_report(tree)


def main() -> None:
    """Run a subcommand; errors of this package become one line and their exit code."""
    with errors_end_the_process():
        app([_expand_home(argument) for argument in sys.argv[1:]])


def _expand_home(argument: str) -> str:
    """Write out `~` in `--output=~/export`: shells do so only at the start of a word."""
    name, equals, value = argument.partition("=")
    if name.startswith("--") and value.startswith("~"):
        value = os.path.expanduser(value)  # noqa: PTH111 -- a text that need not be a path
    return name + equals + value


if __name__ == "__main__":
    main()
