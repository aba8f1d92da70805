"""Commands from raw data to vectors, and for a run's folder: watch, stop, rewind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.commands import (
    CHECK,
    DEFAULT_DEEPSPEED,
    MODEL,
    RUN,
    USE,
    Config,
    DeepSpeed,
    Overrides,
    Processes,
    load,
    say_next,
)
from pipeline.config import MineConfig, PrepareConfig, StarterConfig, TrainConfig
from pipeline.errors import UserError

app = typer.Typer()
Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]


@app.command(rich_help_panel=MODEL)
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="folder of the configs and the run")
    ],
    model: Annotated[
        str,
        typer.Option(
            prompt="model (a folder, or a name in the local cache)", help="model to train"
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            prompt="data (a file, folder, glob or hub:OWNER/NAME)", help="rows to train on"
        ),
    ],
    gpus: Annotated[
        int, typer.Option(min=0, prompt="GPUs (0 for the CPU)", help="GPUs of the run")
    ],
    goal: Annotated[
        Literal["search", "instructions", "long"],
        typer.Option(
            prompt="goal: search (short texts), instructions (said with each query), "
            "or long (documents of thousands of tokens)",
            help="search: texts of a few hundred tokens; instructions: each query says what to "
            "look for; long: documents up to 8,192 tokens",
        ),
    ] = "search",
    query: Annotated[str | None, typer.Option(help="field of the queries")] = None,
    positive: Annotated[str | None, typer.Option(help="field of the right documents")] = None,
    negative: Annotated[str | None, typer.Option(help="field of hard negatives")] = None,
    holdout: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.5,
            help="share of the documents kept out of training to score the model; default: 0.1, or "
            "0 below 100 rows",
        ),
    ] = None,
) -> None:
    """Write commented configs for your data; asks for whatever no option answers."""
    from pipeline.new_run import Answers, write_run

    named = {"query": query, "positives": positive, "negatives": negative}
    columns = {column: field for column, field in named.items() if field is not None}
    answers = Answers(
        model=model, data=data, num_gpus=gpus, goal=goal, columns=columns, holdout=holdout
    )
    prepare_config, train_config, *scoring = write_run(folder, answers)
    how = f" --ranks {gpus}" if gpus > 1 else ""
    if gpus and load(TrainConfig, train_config, None).model.lora is not None:
        # An adapter's gradients and moments are small: whole weights on each GPU communicate least.
        how += " --deepspeed ds_configs/zero2.json"
    commands = [
        f"prepare {prepare_config}",
        f"train {train_config}{how} --dry-run",
        f"train {train_config}{how}",
        f"export {train_config}",
    ]
    for evaluate_config in scoring:
        commands += [
            f"export {train_config} --checkpoint init --output {folder / 'before'}",
            f"evaluate run {evaluate_config}",
            f"report {evaluate_config}",
        ]
    print("written:", ", ".join(map(str, [prepare_config, train_config, *scoring])))
    print("next:", *(f"  diffembed {command}" for command in commands), sep="\n")


@app.command(rich_help_panel=CHECK)
def files(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="target folder; existing files are kept")
    ] = Path(),
) -> None:
    """Copy the recipes, DeepSpeed configs and Slurm scripts of this installation."""
    from pipeline.shipped_files import SHIPPED, copy_shipped

    copied = copy_shipped(folder)
    print(f"{folder}: {len(copied)} files written below {', '.join(map(str, SHIPPED))}")
    if copied:
        print(f"next: edit {folder / 'slurm/cluster.env'}, then `diffembed submit` in {folder}")


@app.command(rich_help_panel=MODEL)
def starter(config: Config, overrides: Overrides = None) -> None:
    """Make a small untrained model and its tokenizer."""
    tree = load(StarterConfig, config, overrides)
    from pipeline.model.starter import build_starter

    print(f"written: {build_starter(tree)}")
    print("next: name it as tokenizer in a data config, and as model.path in a training config")


@app.command(rich_help_panel=MODEL)
def prepare(config: Config, overrides: Overrides = None) -> None:
    """Tokenise raw data into shards; alone, under mpirun or under srun."""
    tree = load(PrepareConfig, config, overrides)
    from pipeline.data.prepare import prepare as prepare_shards
    from pipeline.launch import discover_world

    folder = prepare_shards(tree)
    if discover_world().is_main:
        print(f"next: diffembed train CONFIG, with data.path: {folder}")


@app.command(rich_help_panel=MODEL)
def mine(
    config: Config,
    overrides: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="processes; default: one per GPU, otherwise one per core"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the work of each step, and stop")
    ] = False,
) -> None:
    """Find hard negatives for prepared shards; alone, under mpirun or under srun."""
    tree = load(MineConfig, config, overrides)
    if dry_run:
        from pipeline.mining import describe_mining

        print(describe_mining(tree))
        return
    from pipeline.launch import discover_world
    from pipeline.mining import mine as mine_shards

    folder = mine_shards(tree, num_workers=workers)
    if discover_world().is_main:
        print(f"next: diffembed train CONFIG, with data.path: {folder}")


@app.command(rich_help_panel=MODEL)
def train(
    config: Config,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, help="number of ranks; default: one per GPU of this machine, otherwise one"
        ),
    ] = None,
    deepspeed: DeepSpeed = DEFAULT_DEEPSPEED,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the whole config and the plan, and stop")
    ] = False,
) -> None:
    """Train on this machine; the same command resumes. Ctrl-C saves a checkpoint first."""
    load(TrainConfig, config, overrides)  # now, not once in every rank
    from pipeline.launch import count_gpus, discover_world, run_ranks

    world = discover_world()
    # One rank alone may be a shell that `srun --pty` opened: ranks started here are no part of it.
    if world.world_size > 1:
        raise UserError(
            f"diffembed train: this process is a rank of a launcher, {world.rank} of "
            f"{world.world_size}",
            fix="under torchrun, deepspeed, mpirun or srun start pipeline/train.py",
        )
    number = ranks or max(1, count_gpus())
    script = Path(__file__).parents[1] / "train.py"
    words = [sys.executable, str(script), str(config), *(overrides or ())]
    words += ["--deepspeed", str(deepspeed)]
    if dry_run:
        words += ["--dry-run", "--world-size", str(number)]
    code = run_ranks(words, 1 if dry_run else number)
    if code == 0 and not dry_run:
        say_next("export", config, overrides)
    raise typer.Exit(code)


@app.command(rich_help_panel=RUN)
def watch(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="folder of a run, an evaluation, a synthesis, shards or a chain; or its config",
        ),
    ],
    once: Annotated[
        bool, typer.Option("--once", help="print it once and exit, as in a pipe")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="also write a page for the browser: one file, with plots")
    ] = None,
    every: Annotated[float, typer.Option(min=0.5, help="seconds between two updates")] = 5.0,
) -> None:
    """Show how far a run is, from its files, until it is finished or Ctrl-C is pressed."""
    from pipeline.watch import watch as watch_folder

    watch_folder(folder, once=once, html=html, every=every)


@app.command(rich_help_panel=RUN)
def stop(run: Run) -> None:
    """Let a running training save a checkpoint and stop (it exits with 75)."""
    from pipeline.run_folder import RunDir
    from pipeline.watch.runs import is_locked

    if not RunDir(run).config.exists():
        raise UserError(f"{run}: not a run (no config.yaml in it)", fix="give a run's output_dir")
    request = RunDir(run).stop_request
    request.touch()
    if is_locked(RunDir(run)):
        print(f"{run}: will stop after the current step; the command that started it continues it")
    else:
        print(
            f"{run}: this machine sees no training work on it. One on another machine stops after "
            f"its current step, otherwise the next start stops after one; rm {request} takes the "
            "request back"
        )


@app.command(rich_help_panel=RUN)
def rewind(
    run: Run,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="a name like step-000100")
    ],
) -> None:
    """Continue a run from an older checkpoint, which is verified; none is deleted."""
    from pipeline import run_folder
    from pipeline.run_folder import RunDir

    path = run_folder.rewind(RunDir(run).checkpoints, checkpoint)
    print(f"{run}: its next start continues from {path}")


@app.command(rich_help_panel=MODEL)
def export(
    config: Config,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str, typer.Option(help="latest, a name like step-000100, or init (the untrained model)")
    ] = "latest",
    output: Annotated[
        Path | None, typer.Option(help="folder to write; default: the run's export folder")
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="leave out the weights of the adapter's base")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="before the folder appears, compare vectors by sentence-transformers and "
            "transformers with the trained model's",
        ),
    ] = True,
) -> None:
    """Write a folder that sentence-transformers and transformers load without this package."""
    tree = load(TrainConfig, config, overrides)
    from pipeline.training.export_run import export_run

    folder = export_run(
        tree, which=checkpoint, output=output, adapter_only=adapter_only, check=check
    )
    print(f"written: {folder} (its README.md shows how to load it)")
    print("next: diffembed evaluate run CONFIG, with this folder as models.path")


@app.command(rich_help_panel=USE)
def encode(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="an export")],
    source: Annotated[
        str, typer.Option("--input", help="JSON lines, Parquet or text: file, folder, glob or URL")
    ],
    output: Annotated[
        Path,
        typer.Option(help="file of ids and vectors: .arrow, .parquet or .npy (with .ids.json)"),
    ],
    field: Annotated[str, typer.Option(help="the field with the text")] = "text",
    id_field: Annotated[
        str | None,
        typer.Option(help="the field with the record's id; default: id or _id; '': row numbers"),
    ] = None,
    title_field: Annotated[
        str | None,
        typer.Option(help="the field to put before the text; default: a document's title"),
    ] = None,
    role: Annotated[
        Literal["query", "document"], typer.Option(help="role of all texts")
    ] = "document",
    instruction: Annotated[str, typer.Option(help="instruction of all texts")] = "",
    max_length: Annotated[
        int | None,
        typer.Option(help="tokens after which a text is cut; default: the model's limit"),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="type of the vectors in the file")
    ] = "float32",
    dim: Annotated[
        int | None, typer.Option(help="keep only the first N numbers of a vector")
    ] = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="type of weights and arithmetic")
    ] = "auto",
    max_tokens: Annotated[int, typer.Option(help="packed tokens of one forward")] = 16384,
    processes: Processes = None,
) -> None:
    """Turn texts into vectors; the same command continues a killed run."""
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
