"""The `diffembed` command: thin, every subcommand one call into a room."""

from __future__ import annotations

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

# Heavy packages are imported inside the commands: `diffembed --help` answers at once.
app = typer.Typer(
    help="Turn a diffusion or autoregressive language model into a text embedder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at prepared shards.", no_args_is_help=True)
evaluate_app = typer.Typer(help="Score exports with mteb.", no_args_is_help=True)
plan_app = typer.Typer(help="What a run costs, before it starts.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(plan_app, name="plan")
app.add_typer(evaluate_app, name="evaluate")

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see launch/recipes/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="changes to CONFIG")
]
_DEEPSPEED = Path("ds_configs/zero3.json")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]
Shards = Annotated[Path, typer.Argument(metavar="DIR", help="a folder made by `prepare`")]


def _load(kind: type[T], config: Path, overrides: list[str] | None) -> T:
    return load_config(kind, config, tuple(overrides or ()))


@app.command()
def starter(config: Config, overrides: Overrides = None) -> None:
    """Make a small model and its tokenizer to start from."""
    from pipeline.model.starter import build_starter

    print(build_starter(_load(StarterConfig, config, overrides)))


@app.command()
def prepare(config: Config, overrides: Overrides = None) -> None:
    """Tokenise raw data into shards; alone, under mpirun or under srun."""
    from pipeline.data.prepare import prepare as prepare_shards

    prepare_shards(_load(PrepareConfig, config, overrides))


@data_app.command()
def inspect(folder: Shards) -> None:
    """Show sources, counts, lengths and a few decoded examples."""
    from pipeline.data.inspect import inspect as inspect_shards

    print(inspect_shards(folder))


@data_app.command()
def verify(folder: Shards) -> None:
    """Read every shard again and compare it with its recorded hash."""
    from pipeline.data.inspect import verify as verify_shards

    print(verify_shards(folder))


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
) -> None:
    """Write a folder that sentence-transformers and transformers load without this package."""
    from pipeline.training.export import export_run

    tree = _load(TrainConfig, config, overrides)
    print(export_run(tree, which=checkpoint, output=output, adapter_only=adapter_only))


@app.command()
def submit(
    what: Annotated[
        Literal["prepare", "train", "export", "evaluate", "report", "all"],
        typer.Argument(metavar="JOB", help="prepare, train, export, evaluate, report or all"),
    ],
    config: Config,
    overrides: Overrides = None,
    deepspeed: Annotated[Path, typer.Option(help="train: see ds_configs/")] = _DEEPSPEED,
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


@app.command()
def encode(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="an export")],
    source: Annotated[
        str, typer.Option("--input", help="JSON lines, Parquet or text; file, folder, glob or URL")
    ],
    output: Annotated[Path, typer.Option(help="an Arrow file: id, vector")],
    field: Annotated[str, typer.Option(help="the field that holds the text")] = "text",
    id_field: Annotated[
        str, typer.Option(help="the field that names a record; without it, row numbers do")
    ] = "id",
    role: Annotated[Literal["query", "document"], typer.Option(help="of all texts")] = "document",
    instruction: Annotated[str, typer.Option(help="of all texts")] = "",
    max_length: Annotated[int | None, typer.Option(help="tokens; default: the model's")] = None,
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="of the vectors in the file")
    ] = "float32",
    dim: Annotated[int | None, typer.Option(help="keep the first so many numbers")] = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="of weights and arithmetic")
    ] = "auto",
    max_tokens: Annotated[int, typer.Option(help="packed tokens of one forward")] = 16384,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="default: one per GPU, else per core; under mpirun or srun, its ranks"
        ),
    ] = None,
) -> None:
    """Turn texts into vectors; a killed run is continued by the same command."""
    from pipeline.evaluation.vectors.encode import encode_file
    from pipeline.evaluation.vectors.job import EncodeJob

    job = EncodeJob(
        model=model,
        input=source,
        output=output,
        field=field,
        id_field=id_field,
        role=role,
        instruction=instruction,
        max_length=max_length,
        dtype=dtype,
        dimensions=dim,
        precision=precision,
        max_tokens=max_tokens,
    )
    encode_file(job, num_processes=processes)


@app.command()
def probe(config: Config, overrides: Overrides = None) -> None:
    """Tag words by a linear classifier on a frozen export: accuracy and F1."""
    from pipeline.evaluation.words.probe import probe as probe_words

    path = probe_words(_load(ProbeConfig, config, overrides))
    print(path.read_text(), end="")


@plan_app.command("run")
def plan_run(
    config: Config,
    overrides: Overrides = None,
    deepspeed: Annotated[Path, typer.Option(help="see ds_configs/")] = _DEEPSPEED,
    world_size: Annotated[int, typer.Option(help="ranks to plan for")] = 1,
    memory_gib: Annotated[float, typer.Option(help="device memory of a rank")] = 80.0,
) -> None:
    """Print batch arithmetic, schedule and memory of a training run."""
    from pipeline.planning.plan import describe
    from pipeline.planning.plan import plan_run as make_plan
    from pipeline.training.ds_config import load_ds_config, resolve_ds_config

    tree = _load(TrainConfig, config, overrides)
    resolved = resolve_ds_config(load_ds_config(deepspeed), tree, world_size=world_size)
    available = memory_gib * 2**30
    print(describe(make_plan(tree, resolved, world_size=world_size, available=available), tree))


@plan_app.command("loss")
def plan_loss(
    queries: Annotated[int, typer.Option(help="of the global batch")],
    documents: Annotated[int, typer.Option(help="of the global batch, with hard negatives")],
    width: Annotated[int, typer.Option(help="of the embeddings")] = 3584,
    world_size: Annotated[
        list[int] | None, typer.Option(help="ranks to plan for; may be repeated")
    ] = None,
) -> None:
    """Print what the loss costs each rank at a size that need not exist yet."""
    from pipeline.planning.plan import describe_loss

    for ranks in world_size or [1]:
        print(
            describe_loss(
                num_queries=queries, num_documents=documents, width=width, world_size=ranks
            )
        )


@evaluate_app.command()
def count(config: Config, overrides: Overrides = None) -> None:
    """Print how many array elements an evaluation has (for sbatch --array=0-N)."""
    from pipeline.evaluation.score.array import num_elements

    print(num_elements(_load(EvaluateConfig, config, overrides)))


@evaluate_app.command("run")
def run_evaluation(
    config: Config,
    overrides: Overrides = None,
    index: Annotated[int | None, typer.Option(help="one array element; default: all")] = None,
) -> None:
    """Score one array element, or all of them one after another."""
    from pipeline.evaluation.score.array import run_all, run_element

    tree = _load(EvaluateConfig, config, overrides)
    if index is None:
        run_all(tree)
    else:
        run_element(tree, index)


@evaluate_app.command()
def prefetch(config: Config, overrides: Overrides = None) -> None:
    """Download the tasks' data at pinned revisions, on a node that has a network."""
    from pipeline.evaluation.tasks.prefetch import prefetch as fetch_snapshots

    fetch_snapshots(_load(EvaluateConfig, config, overrides))


@evaluate_app.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """List every distinct text of all tasks once, in blocks of equal cost."""
    from pipeline.evaluation.score.array import plan as plan_texts

    plan_texts(_load(EvaluateConfig, config, overrides))


@evaluate_app.command()
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
    from pipeline.evaluation.score.array import embed as embed_share

    tree = _load(EvaluateConfig, config, overrides)
    embed_share(tree, index, of, num_processes=processes)


@evaluate_app.command()
def score(config: Config, overrides: Overrides = None) -> None:
    """Score all tasks from the embedded texts."""
    from pipeline.evaluation.score.array import score_all

    score_all(_load(EvaluateConfig, config, overrides))


@app.command()
def report(config: Config, overrides: Overrides = None) -> None:
    """Gather the scores of an evaluation into tables and plots."""
    from pipeline.evaluation.report.write import write_report

    write_report(_load(EvaluateConfig, config, overrides))


def main() -> None:
    """Run a subcommand; errors of this package become one line and their exit code."""
    with errors_end_the_process():
        app()


if __name__ == "__main__":
    main()
