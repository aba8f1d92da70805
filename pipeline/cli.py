"""Commands of `diffembed`, their arguments and options."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from pipeline.config import (
    EvaluateConfig,
    ExportStep,
    PrepareConfig,
    ProbeConfig,
    StarterConfig,
    TrainConfig,
    load_config,
)
from pipeline.errors import UserError, errors_end_the_process

T = TypeVar("T")
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see launch/recipes/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="changes to CONFIG")
]
DEFAULT_DEEPSPEED = Path("ds_configs/zero3.json")


def load(kind: type[T], config: Path, overrides: list[str] | None) -> T:
    """The config of a command line.

    Raises:
        UserError: the file or a change to it is wrong.
    """
    return load_config(kind, config, tuple(overrides or ()))


data_commands = typer.Typer(help="Look at prepared shards.", no_args_is_help=True)
Shards = Annotated[Path, typer.Argument(metavar="DIR", help="a folder made by `prepare`")]


@data_commands.command()
def inspect(folder: Shards) -> None:
    """Show sources, counts, lengths and a few decoded examples."""
    from pipeline.data.shards import inspect as inspect_shards

    print(inspect_shards(folder))


@data_commands.command()
def verify(folder: Shards) -> None:
    """Read every shard again and compare it with its recorded hash."""
    from pipeline.data.shards import verify as verify_shards

    print(verify_shards(folder))


plan_commands = typer.Typer(help="What a run costs, before it starts.", no_args_is_help=True)


@plan_commands.command("run")
def plan_run(
    config: Config,
    overrides: Overrides = None,
    deepspeed: Annotated[Path, typer.Option(help="see ds_configs/")] = DEFAULT_DEEPSPEED,
    world_size: Annotated[int, typer.Option(help="ranks to plan for")] = 1,
    memory_gib: Annotated[float, typer.Option(help="device memory of a rank")] = 80.0,
) -> None:
    """Print batch arithmetic, schedule and memory of a training run."""
    tree = load(TrainConfig, config, overrides)
    from pipeline.planning import describe
    from pipeline.planning import plan_run as make_plan
    from pipeline.training.ds_config import load_ds_config, resolve_ds_config

    resolved = resolve_ds_config(load_ds_config(deepspeed), tree, world_size=world_size)
    available = memory_gib * 2**30
    print(describe(make_plan(tree, resolved, world_size=world_size, available=available), tree))


@plan_commands.command("loss")
def plan_loss(
    queries: Annotated[int, typer.Option(help="of the global batch")],
    documents: Annotated[int, typer.Option(help="of the global batch, with hard negatives")],
    width: Annotated[int, typer.Option(help="of the embeddings")] = 3584,
    world_size: Annotated[
        list[int] | None, typer.Option(help="ranks to plan for; may be repeated")
    ] = None,
) -> None:
    """Print what the loss costs each rank at a size that need not exist yet."""
    from pipeline.planning import describe_loss

    for ranks in world_size or [1]:
        print(
            describe_loss(
                num_queries=queries, num_documents=documents, width=width, world_size=ranks
            )
        )


evaluate_commands = typer.Typer(help="Score exports with mteb.", no_args_is_help=True)


@evaluate_commands.command()
def count(config: Config, overrides: Overrides = None) -> None:
    """Print how many array elements an evaluation has (for sbatch --array=0-N)."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.run import num_elements

    print(num_elements(tree))


@evaluate_commands.command("run")
def run_evaluation(
    config: Config,
    overrides: Overrides = None,
    index: Annotated[int | None, typer.Option(help="one array element; default: all")] = None,
) -> None:
    """Score one array element, or all of them one after another."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.run import run_all, run_element

    if index is None:
        run_all(tree)
    else:
        run_element(tree, index)


@evaluate_commands.command()
def prefetch(config: Config, overrides: Overrides = None) -> None:
    """Download the tasks' data at pinned revisions, on a node that has a network."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.datasets import prefetch as fetch_snapshots

    fetch_snapshots(tree)


@evaluate_commands.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """List every distinct text of all tasks once, in blocks of equal cost."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.run import plan as plan_texts

    plan_texts(tree)


@evaluate_commands.command()
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
    from pipeline.evaluation.run import embed as embed_share

    embed_share(tree, index, of, num_processes=processes)


@evaluate_commands.command()
def score(config: Config, overrides: Overrides = None) -> None:
    """Score all tasks from the embedded texts."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.run import score_all

    score_all(tree)


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="an export")]
Input = Annotated[
    str, typer.Option("--input", help="JSON lines, Parquet or text: file, folder, glob or URL")
]
Output = Annotated[
    Path, typer.Option(help="file of ids and vectors: .arrow, .parquet or .npy (with .ids.json)")
]
Field = Annotated[str, typer.Option(help="the field that holds the text")]
IdField = Annotated[
    str | None,
    typer.Option(help="the field that names a record; default: id or _id; '': row numbers"),
]
TitleField = Annotated[
    str | None,
    typer.Option(help="the field that stands before the text; default: a document's title"),
]
Role = Annotated[Literal["query", "document"], typer.Option(help="of all texts")]
Instruction = Annotated[str, typer.Option(help="of all texts")]
MaxLength = Annotated[int | None, typer.Option(help="tokens; default: the model's")]
Dtype = Annotated[Literal["float32", "float16"], typer.Option(help="of the vectors in the file")]
Dim = Annotated[int | None, typer.Option(help="keep the first so many numbers")]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"], typer.Option(help="of weights and arithmetic")
]
MaxTokens = Annotated[int, typer.Option(help="packed tokens of one forward")]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1, help="default: one per GPU, else per core; under mpirun or srun, its ranks"
    ),
]


def encode(
    model: Model,
    source: Input,
    output: Output,
    field: Field = "text",
    id_field: IdField = None,
    title_field: TitleField = None,
    role: Role = "document",
    instruction: Instruction = "",
    max_length: MaxLength = None,
    dtype: Dtype = "float32",
    dim: Dim = None,
    precision: Precision = "auto",
    max_tokens: MaxTokens = 16384,
    processes: Processes = None,
) -> None:
    """Turn texts into vectors; a killed run is continued by the same command."""
    from pipeline.evaluation.encode import EncodeJob, encode_file

    job = EncodeJob(
        model=model,
        input=source,
        output=output,
        field=field,
        id_field=id_field,
        title_field=title_field,
        role=role,
        instruction=instruction,
        max_length=max_length,
        dtype=dtype,
        dimensions=dim,
        precision=precision,
        max_tokens=max_tokens,
    )
    encode_file(job, num_processes=processes)


# Heavy packages are imported inside the commands, behind the reading of their configs: `--help` and
# the faults of a config are answered at once.
app = typer.Typer(
    help="Turn a diffusion or autoregressive language model into a text embedder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_commands, name="data")
app.add_typer(plan_commands, name="plan")
app.add_typer(evaluate_commands, name="evaluate")
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
    from pipeline.run_folder import RunDir

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
    from pipeline.checkpoint_folder import rewind as rewind_to
    from pipeline.run_folder import RunDir

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
    from pipeline.training.export_run import export_run

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
    from pipeline.submission.submit import submit_command

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
    from pipeline.evaluation.probe import probe as probe_words

    path = probe_words(tree)
    print(path.read_text(), end="")


@app.command()
def report(config: Config, overrides: Overrides = None) -> None:
    """Gather the scores of an evaluation into tables and plots."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.report import write_report

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
