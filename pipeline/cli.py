"""Define the commands of `diffembed`: arguments, help, and the functions that they call.

    init  starter  prepare  mine  train  export  encode  probe  report     files in, files out
    submit                                                           the same as Slurm jobs
    watch  stop  rewind                                              a run's folder
    doctor                                                           this machine, before a run
    config    explain  schema  diff                                  the keys of all configs
    data      inspect  verify                                        prepared shards
    plan      run  loss                                              the cost of a run, in advance
    evaluate  count  run  prefetch  plan  embed  score               an evaluation, step by step

Commands import heavy packages inside, after they have read their config: `--help` and errors of a
config are answered at once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from pipeline.config import (
    ChainConfig,
    EvaluateConfig,
    ExportStep,
    MineConfig,
    PrepareConfig,
    ProbeConfig,
    StarterConfig,
    TrainConfig,
    load_config,
)
from pipeline.errors import UserError, errors_end_the_process

T = TypeVar("T")


def load(kind: type[T], config: Path, overrides: list[str] | None) -> T:
    """Return the config of a command line.

    Raises:
        UserError: the file or an override is wrong.
    """
    return load_config(kind, config, tuple(overrides or ()))


def say_next(command: str, config: Path, overrides: list[str] | None, also: str = "") -> None:
    """Print the command to run next with this config; on the first rank only."""
    from pipeline.launch import discover_world

    if discover_world().is_main:
        print(f"next: diffembed {' '.join([command, str(config), *(overrides or ())])}{also}")


app = typer.Typer(
    help="Turn a diffusion or autoregressive language model into a text embedder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_commands = typer.Typer(help="Explain and compare configs.", no_args_is_help=True)
data_commands = typer.Typer(help="Inspect and verify prepared shards.", no_args_is_help=True)
plan_commands = typer.Typer(help="Estimate a run before it starts.", no_args_is_help=True)
evaluate_commands = typer.Typer(help="Score exports with mteb.", no_args_is_help=True)
app.add_typer(config_commands, name="config")
app.add_typer(data_commands, name="data")
app.add_typer(plan_commands, name="plan")
app.add_typer(evaluate_commands, name="evaluate")

# --- arguments that several commands share ---------------------------------------------------

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see launch/recipes/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="changes to CONFIG")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]
Shards = Annotated[Path, typer.Argument(metavar="DIR", help="a folder made by `prepare`")]
DEFAULT_DEEPSPEED = Path("ds_configs/zero3.json")
# Commands of one process per device, alone or under a launcher.
Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="default: one per GPU, otherwise one per core; under mpirun or srun, its ranks",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print("diffembed", metadata.version("diffembed"))
        raise typer.Exit


@app.callback()
def _shared(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print and stop"),
    ] = False,
) -> None:
    pass


# --- a model, from start to export -----------------------------------------------------------


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="for the configs and the run")],
    model: Annotated[
        str, typer.Option(prompt="model (a folder, or a name in the local cache)", help="to train")
    ],
    data: Annotated[
        str, typer.Option(prompt="data (a file, folder, glob or hub:OWNER/NAME)", help="rows")
    ],
    gpus: Annotated[int, typer.Option(min=0, prompt="GPUs (0 for the CPU)", help="of the run")],
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
) -> None:
    """Write commented configs for your data; asks for whatever no option answers."""
    from pipeline.new_run import Answers, write_run

    named = {"query": query, "positives": positive, "negatives": negative}
    columns = {column: field for column, field in named.items() if field is not None}
    answers = Answers(model=model, data=data, num_gpus=gpus, goal=goal, columns=columns)
    prepare_config, train_config = write_run(folder, answers)
    ranks = f" --ranks {gpus}" if gpus > 1 else ""
    print(
        f"written: {prepare_config}, {train_config}\nnext:",
        f"  diffembed prepare {prepare_config}",
        f"  diffembed train {train_config}{ranks} --dry-run",
        f"  diffembed train {train_config}{ranks}",
        sep="\n",
    )


@app.command()
def files(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="kept: files that exist")] = Path(),
) -> None:
    """Copy the recipes, DeepSpeed configs and Slurm scripts of this installation."""
    from pipeline.shipped_files import SHIPPED, copy_shipped

    copied = copy_shipped(folder)
    print(f"{folder}: {len(copied)} files written below {', '.join(map(str, SHIPPED))}")
    if copied:
        print(f"next: edit {folder / 'slurm/cluster.env'}, then `diffembed submit` in {folder}")


@app.command()
def starter(config: Config, overrides: Overrides = None) -> None:
    """Make a small untrained model and its tokenizer."""
    tree = load(StarterConfig, config, overrides)
    from pipeline.model.starter import build_starter

    print(f"written: {build_starter(tree)}")
    print("next: name it as tokenizer in a data config, and as model.path in a training config")


@app.command()
def prepare(config: Config, overrides: Overrides = None) -> None:
    """Tokenise raw data into shards; alone, under mpirun or under srun."""
    tree = load(PrepareConfig, config, overrides)
    from pipeline.data.prepare import prepare as prepare_shards
    from pipeline.launch import discover_world

    folder = prepare_shards(tree)
    if discover_world().is_main:
        print(f"next: diffembed train CONFIG, with data.path: {folder}")


@app.command()
def mine(
    config: Config,
    overrides: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="processes; default: one per GPU, otherwise one per core"),
    ] = None,
) -> None:
    """Find hard negatives for prepared shards; alone, under mpirun or under srun."""
    tree = load(MineConfig, config, overrides)
    from pipeline.launch import discover_world
    from pipeline.mining import mine as mine_shards

    folder = mine_shards(tree, num_workers=workers)
    if discover_world().is_main:
        print(f"next: diffembed train CONFIG, with data.path: {folder}")


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="default: one per GPU of this machine, otherwise one")
    ] = None,
    deepspeed: Annotated[Path, typer.Option(help="see ds_configs/")] = DEFAULT_DEEPSPEED,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the whole config and the plan, and stop")
    ] = False,
) -> None:
    """Train on this machine; the same command resumes. Ctrl-C saves a checkpoint first."""
    load(TrainConfig, config, overrides)  # now, not once in every rank
    from pipeline.launch import count_gpus, discover_world, run_ranks

    if discover_world().launched:
        raise UserError(
            "diffembed train: this process is a rank of a launcher",
            fix="under torchrun, deepspeed, mpirun or srun start pipeline/train.py",
        )
    number = ranks or max(1, count_gpus())
    script = Path(__file__).with_name("train.py")
    words = [sys.executable, str(script), str(config), *(overrides or ())]
    words += ["--deepspeed", str(deepspeed)]
    if dry_run:
        words += ["--dry-run", "--world-size", str(number)]
    code = run_ranks(words, 1 if dry_run else number)
    if code == 0 and not dry_run:
        say_next("export", config, overrides)
    raise typer.Exit(code)


@app.command()
def watch(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="of a run, an evaluation, a synthesis, shards or a chain, or the config of one",
        ),
    ],
    once: Annotated[
        bool, typer.Option("--once", help="print it once and leave, as in a pipe")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="also write a page for the browser: one file, with plots")
    ] = None,
    every: Annotated[float, typer.Option(min=0.5, help="seconds between two looks")] = 5.0,
) -> None:
    """Show how far a run is, from its files, until it is finished or Ctrl-C is pressed."""
    from pipeline.watch import watch as watch_folder

    watch_folder(folder, once=once, html=html, every=every)


@app.command()
def stop(run: Run) -> None:
    """Let a running training save a checkpoint and stop (it exits with 75)."""
    from pipeline.run_folder import RunDir

    if not RunDir(run).config.exists():
        raise UserError(f"{run}: not a run (no config.yaml in it)", fix="give a run's output_dir")
    RunDir(run).stop_request.touch()
    print(f"{run}: will stop after the current step; the command that started it continues it")


@app.command()
def rewind(
    run: Run,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="a name like step-000100")
    ],
) -> None:
    """Continue a run from an older checkpoint, which is verified; none is deleted."""
    from pipeline import checkpoint_folder
    from pipeline.run_folder import RunDir

    path = checkpoint_folder.rewind(RunDir(run).checkpoints, checkpoint)
    print(f"{run}: its next start continues from {path}")


@app.command()
def export(
    config: Config,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str, typer.Option(help="latest, a name like step-000100, or init (the untrained model)")
    ] = "latest",
    output: Annotated[Path | None, typer.Option(help="default: the run's export folder")] = None,
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


@app.command()
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
    role: Annotated[Literal["query", "document"], typer.Option(help="of all texts")] = "document",
    instruction: Annotated[str, typer.Option(help="of all texts")] = "",
    max_length: Annotated[int | None, typer.Option(help="tokens; default: the model's")] = None,
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="of the vectors in the file")
    ] = "float32",
    dim: Annotated[int | None, typer.Option(help="keep only this many first numbers")] = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="of weights and arithmetic")
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


# --- scores ----------------------------------------------------------------------------------


@app.command()
def probe(config: Config, overrides: Overrides = None) -> None:
    """Tag words with a linear classifier on a frozen export: accuracy and F1."""
    tree = load(ProbeConfig, config, overrides)
    from pipeline.evaluation.probe import probe as probe_words

    path = probe_words(tree)
    print(path.read_text(), end="")


@app.command()
def report(config: Config, overrides: Overrides = None) -> None:
    """Collect the scores of an evaluation in tables and plots."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.report import write_report

    write_report(tree)


@evaluate_commands.command()
def count(config: Config, overrides: Overrides = None) -> None:
    """Print the number of array elements of an evaluation (for sbatch --array=0-N)."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.run import num_elements

    print(num_elements(tree))


@evaluate_commands.command("run")
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


@evaluate_commands.command()
def prefetch(config: Config, overrides: Overrides = None) -> None:
    """Download the tasks' data at pinned revisions, on a node with network access."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.datasets import prefetch as fetch_snapshots

    print(f"written: {fetch_snapshots(tree)}")
    say_next("evaluate run", config, overrides)


@evaluate_commands.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """List every distinct text of all tasks once, in blocks of equal cost."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.run import plan as plan_texts

    plan_texts(tree)
    say_next("evaluate embed", config, overrides)


@evaluate_commands.command()
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


@evaluate_commands.command()
def score(config: Config, overrides: Overrides = None) -> None:
    """Score all tasks from the embedded texts."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.evaluation.run import score_all

    score_all(tree)
    say_next("report", config, overrides)


# --- before a run ----------------------------------------------------------------------------


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="also check everything that it names")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
    launcher: Annotated[
        str,
        typer.Option(
            help='words that start ranks, such as "srun --ntasks=16"; default: ranks of this '
            "machine, one per GPU, otherwise two"
        ),
    ] = "",
) -> None:
    """Check versions, GPUs, kernels, ranks, disks, limits and a config; exit 1 if any fails."""
    from pipeline.doctor import doctor as check_all

    raise typer.Exit(check_all(config, tuple(overrides or ()), launcher=launcher, as_json=as_json))


# --- configs ---------------------------------------------------------------------------------


@config_commands.command("explain")
def explain_key(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="loss.temperature, temperature, or a section: loss")
    ],
) -> None:
    """Print what a key means, its values and its default; a section prints its keys."""
    from pipeline.config.explain import explain

    print(explain(key))


@config_commands.command()
def schema(
    kind: Annotated[
        Literal["starter", "prepare", "mine", "train", "evaluate", "probe", "chain"] | None,
        typer.Argument(
            metavar="[KIND]", help="starter, prepare, mine, train, evaluate, probe or chain"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="a folder: write the schemas of all kinds as KIND.json")
    ] = None,
) -> None:
    """Print the JSON schema of a kind of config files, for completion and checks in an editor."""
    import json

    from pipeline.config.explain import file_schema, write_schemas

    if (kind is None) == (output is None):
        raise UserError("config schema", allowed="either a KIND to print, or --output FOLDER")
    if output is not None:
        print(*write_schemas(output), sep="\n")
    if kind is not None:
        print(json.dumps(file_schema(kind), indent=1, ensure_ascii=False))


@config_commands.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="a config, or a run's config.yaml")],
    second: Annotated[Path, typer.Argument(metavar="B", help="another config of the same kind")],
) -> None:
    """Print every key that differs between two configs, with everything they extend."""
    from pipeline.config.explain import compare

    rows = compare(first, second)
    width = max((len(key) for key, _, _ in rows), default=0)
    for key, left, right in rows:
        print(f"{key:{width}}  {left} -> {right}")
    if not rows:
        print("no key differs")


# --- shards and plans ------------------------------------------------------------------------


@data_commands.command()
def inspect(folder: Shards) -> None:
    """Show sources, counts, lengths and a few decoded examples."""
    from pipeline.data.shards import inspect_dataset

    print(inspect_dataset(folder))


@data_commands.command()
def verify(folder: Shards) -> None:
    """Read every shard and compare it with its recorded hash."""
    from pipeline.data.shards import verify_dataset

    print(verify_dataset(folder))


# A plan for data that does not exist yet.
Rows = Annotated[
    int | None, typer.Option(min=1, help="plan for data of so many rows instead of the shards")
]
QueryTokens = Annotated[
    int | None, typer.Option(min=1, help="with --rows: mean length of the queries")
]
DocumentTokens = Annotated[
    int | None, typer.Option(min=1, help="with --rows: mean length of the documents")
]


def _planned_data(
    tree: TrainConfig, rows: int | None, query_tokens: int | None, document_tokens: int | None
) -> AbstractContextManager[TrainConfig]:
    """Return the config as it is, or with shards as the options describe them."""
    if rows is None and query_tokens is None and document_tokens is None:
        return nullcontext(tree)
    if rows is None or query_tokens is None or document_tokens is None:
        raise UserError(
            "plan: only some of --rows, --query-tokens and --document-tokens",
            allowed="all three, or none to read the shards",
        )
    from pipeline.planning.described_data import Description, described

    return described(
        tree, Description(rows=rows, query_tokens=query_tokens, document_tokens=document_tokens)
    )


@plan_commands.command("run")
def plan_run(
    config: Config,
    overrides: Overrides = None,
    deepspeed: Annotated[Path, typer.Option(help="see ds_configs/")] = DEFAULT_DEEPSPEED,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="ranks of a node")] = 1,
    gpu: Annotated[
        str, typer.Option(help="h100, h200, a100-80, a100-40, l40s, b200, or memory in GiB")
    ] = "h100",
    network: Annotated[
        float, typer.Option(min=0.1, help="Gb/s of a node, all its adapters together")
    ] = 400.0,
    rows: Rows = None,
    query_tokens: QueryTokens = None,
    document_tokens: DocumentTokens = None,
) -> None:
    """Print batch arithmetic, schedule, memory and time of a training run, for any GPUs."""
    tree = load(TrainConfig, config, overrides)
    from pipeline.planning import describe, describe_time
    from pipeline.planning import plan_run as make_plan
    from pipeline.planning.memory import GPU_GIB, Target
    from pipeline.training.ds_config import load_ds_config, resolve_ds_config

    ranks = nodes * gpus_per_node
    resolved = resolve_ds_config(load_ds_config(deepspeed), tree, world_size=ranks)
    target = Target.gpu(gpu, ranks_per_host=gpus_per_node)
    with _planned_data(tree, rows, query_tokens, document_tokens) as planned:
        plan = make_plan(planned, resolved, world_size=ranks, target=target, build=False)
    if rows is not None:
        plan = dataclasses.replace(plan, num_examples=rows)
    print(describe(plan, tree))
    if gpu.lower() in GPU_GIB:  # a size in GiB has no speed
        print("\n" + describe_time(plan, tree, gpu=gpu, network=network))


@plan_commands.command("scale")
def plan_scale(
    config: Config,
    overrides: Overrides = None,
    deepspeed: Annotated[Path, typer.Option(help="see ds_configs/")] = DEFAULT_DEEPSPEED,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="ranks of a node")] = 8,
    gpu: Annotated[str, typer.Option(help="as for `diffembed plan run`")] = "h100",
    network: Annotated[float, typer.Option(min=0.1, help="Gb/s of a node")] = 400.0,
    price: Annotated[float | None, typer.Option(min=0.0, help="of a GPU for an hour")] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw tokens a second, as .png")] = None,
    rows: Rows = None,
    query_tokens: QueryTokens = None,
    document_tokens: DocumentTokens = None,
) -> None:
    """Project a training run on 1, 2, 4, ... nodes, up to 1,024 GPUs: memory, time, price."""
    tree = load(TrainConfig, config, overrides)
    from pipeline.planning.scale import describe_scale, plot_scale, scale
    from pipeline.training.ds_config import load_ds_config, resolve_ds_config

    given = load_ds_config(deepspeed)
    with _planned_data(tree, rows, query_tokens, document_tokens) as planned:
        sizes = scale(
            planned,
            lambda ranks: resolve_ds_config(given, tree, world_size=ranks),
            gpu=gpu,
            gpus_per_node=gpus_per_node,
            network=network,
        )
    print(describe_scale(sizes, tree, gpu=gpu, network=network, price=price))
    if plot is not None:
        plot_scale(sizes, plot, title=f"{config} on {gpu}, a projection")
        print(f"written: {plot}")


@plan_commands.command("loss")
def plan_loss(
    queries: Annotated[int, typer.Option(help="of the global batch")],
    documents: Annotated[int, typer.Option(help="of the global batch, with hard negatives")],
    width: Annotated[int, typer.Option(help="of the embeddings")] = 3584,
    world_size: Annotated[
        list[int] | None, typer.Option(help="number of ranks; may be repeated")
    ] = None,
) -> None:
    """Print the cost of the loss on each rank, for batches of any size."""
    from pipeline.planning import describe_loss

    for ranks in world_size or [1]:
        print(
            describe_loss(
                num_queries=queries, num_documents=documents, width=width, world_size=ranks
            )
        )


# --- Slurm -----------------------------------------------------------------------------------


@app.command()
def submit(
    what: Annotated[
        Literal["synthesize", "prepare", "mine", "train", "export", "evaluate", "report", "all"],
        typer.Argument(
            metavar="JOB", help="synthesize, prepare, mine, train, export, evaluate, report or all"
        ),
    ],
    config: Config,
    overrides: Overrides = None,
    deepspeed: Annotated[Path, typer.Option(help="train: see ds_configs/")] = DEFAULT_DEEPSPEED,
    checkpoint: Annotated[str, typer.Option(help="export: as for `diffembed export`")] = "latest",
    output: Annotated[Path | None, typer.Option(help="export: as for `diffembed export`")] = None,
    texts: Annotated[
        int | None, typer.Option(help="evaluate: array elements that share the texts of all tasks")
    ] = None,
    sbatch: Annotated[str, typer.Option(help="flags of sbatch for this job only")] = "",
    after: Annotated[list[str] | None, typer.Option(help="id of a job to wait for")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the batch scripts and the plan of a training")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help="with --dry-run: as for `diffembed plan run`; default: as Slurm's flags"),
    ] = None,
) -> None:
    """Submit a job, or a whole chain, to Slurm; it is safe to submit again."""
    from pipeline.submission.submit import submit_command

    if gpu is not None and not dry_run:
        raise UserError(f"--gpu {gpu}", fix="add --dry-run, or name the GPU in slurm/cluster.env")

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
    if dry_run and what in ("train", "all"):
        lines = _plan_of_submission(what, config, overrides, deepspeed, sbatch, gpu)
        print("\n".join(f"# plan: {line}".rstrip() for line in lines))


def _plan_of_submission(
    what: str,
    config: Path,
    overrides: list[str] | None,
    deepspeed: Path,
    sbatch: str,
    gpu: str | None,
) -> list[str]:
    """Return the plan of the training run in a chain, on the GPUs that Slurm's flags ask for."""
    from pipeline.planning import describe
    from pipeline.planning import plan_run as make_plan
    from pipeline.planning.memory import Target, gpu_named
    from pipeline.submission.jobs import parse_flags, read_site, requested_gpus, split_flags
    from pipeline.training.ds_config import load_ds_config, resolve_ds_config

    if what == "all":
        chain = load(ChainConfig, config, overrides)
        config, overrides, deepspeed = chain.train, None, chain.deepspeed
    tree = load(TrainConfig, config, overrides)
    if not (tree.data.path / "manifest.json").is_file():
        return [f"{tree.data.path} is not prepared yet; afterwards, use `diffembed plan run`"]
    own = parse_flags(split_flags(sbatch, "--sbatch"), "--sbatch")
    request = requested_gpus((*read_site().flags_of("TRAIN_FLAGS"), *own))
    name = gpu or gpu_named(request.kind)
    if name is None or not request.per_node:
        found = request.kind or f"{request.per_node} GPUs a node, of no named kind"
        return [f"Slurm's flags ask for {found}; --gpu NAME plans memory for it"]
    ranks = request.nodes * request.per_node
    try:
        resolved = resolve_ds_config(load_ds_config(deepspeed), tree, world_size=ranks)
        target = Target.gpu(name, ranks_per_host=request.per_node)
        plan = make_plan(tree, resolved, world_size=ranks, target=target, build=False)
    except UserError as error:
        # The scripts above are right even so, and the memory of a rank is an estimate.
        return [f"{request.nodes} x {request.per_node} {name}: {error}"]
    return [f"{request.nodes} x {request.per_node} {name}", *describe(plan, tree).splitlines()]


def main() -> None:
    """Run a command; errors of this package end as one line and their exit code."""
    with errors_end_the_process():
        app([_expand_home(argument) for argument in sys.argv[1:]])


def _expand_home(argument: str) -> str:
    """Expand `~` in `--output=~/export`: shells expand it only at the start of a word."""
    name, equals, value = argument.partition("=")
    if name.startswith("--") and value.startswith("~"):
        value = os.path.expanduser(value)  # noqa: PTH111 -- a text that need not be a path
    return name + equals + value


if __name__ == "__main__":
    main()
