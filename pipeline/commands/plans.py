"""Commands that plan a run before it starts, and the one that submits it to Slurm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.commands import CHECK, DEFAULT_DEEPSPEED, RUN, Config, DeepSpeed, Overrides, load
from pipeline.config import ChainConfig, EvaluateConfig, ExportStep, MineConfig, TrainConfig
from pipeline.errors import UserError, say_warning

if TYPE_CHECKING:
    from pipeline.planning.calibration import Machine
    from pipeline.planning.text_sizes import DescribedTask
    from pipeline.submission.jobs import RequestedGpus

app = typer.Typer()
plan = typer.Typer(help="Estimate runs and arrays before they start.", no_args_is_help=True)
app.add_typer(plan, name="plan", rich_help_panel=CHECK)

# Gb/s of a node. `DEFAULT_NETWORK` of planning/speed.py, whose import would slow down `--help`.
_NETWORK = 400.0
# A plan for data that does not exist yet.
Rows = Annotated[
    int | None, typer.Option(min=1, help="plan for this many rows instead of the shards")
]
QueryTokens = Annotated[
    int | None, typer.Option(min=1, help="with --rows or --queries: their mean length")
]
DocumentTokens = Annotated[
    int | None, typer.Option(min=1, help="with --rows or --documents: mean length of the documents")
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        help="constants measured by `diffembed plan calibrate`; default: the GPU's, if it was "
        "calibrated"
    ),
]
Gpu = Annotated[str | None, typer.Option(help="as for `diffembed plan run`")]
Price = Annotated[float | None, typer.Option(min=0.0, help="price of one GPU for an hour")]
GpusAtATime = Annotated[
    int, typer.Option(min=1, help="GPUs that work at a time, one for each element of an array")
]


def _planned_data(
    tree: TrainConfig, rows: int | None, query_tokens: int | None, document_tokens: int | None
) -> AbstractContextManager[TrainConfig]:
    """Return the config as it is, or with shards as the options describe them."""
    if rows is None and query_tokens is None and document_tokens is None:
        from pipeline.data.manifest import FILE_NAME

        if not (tree.data.path / FILE_NAME).is_file():
            raise UserError(
                f"data.path: {tree.data.path} is not prepared yet",
                fix="describe the data (--rows, --query-tokens and --document-tokens), or run "
                "`diffembed prepare`",
            )
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


def _choose_machine(gpu: str | None, calibration: Path | None, ranks_per_host: int) -> Machine:
    """Return the machine to plan for, and warn of an unfit calibration."""
    from pipeline.planning.calibration import choose_machine

    machine = choose_machine(gpu, calibration, ranks_per_host=ranks_per_host)
    if machine.warning:
        say_warning(machine.warning)
    return machine


def _resolver(tree: TrainConfig, deepspeed: Path) -> Callable[[int], dict[str, Any]]:
    """Return a function that resolves the DeepSpeed config for a number of ranks."""
    from pipeline.training.ds_config import load_ds_config, resolve_ds_config

    given = load_ds_config(deepspeed)
    return lambda ranks: resolve_ds_config(given, tree, world_size=ranks)


@plan.command("run")
def plan_run(
    config: Config,
    overrides: Overrides = None,
    deepspeed: DeepSpeed = DEFAULT_DEEPSPEED,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node, one rank each")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="h100, h200, a100-80, a100-40, l40s, b200, or memory in GiB; default: the "
            "calibrated device, or h100"
        ),
    ] = None,
    calibration: CalibrationFile = None,
    network: Annotated[
        float, typer.Option(min=0.1, help="bandwidth of a node in Gb/s, all its adapters together")
    ] = _NETWORK,
    rows: Rows = None,
    query_tokens: QueryTokens = None,
    document_tokens: DocumentTokens = None,
) -> None:
    """Print batch arithmetic, schedule, memory and time of a training run, for any GPUs."""
    tree = load(TrainConfig, config, overrides)
    from pipeline.planning import plan_run as make_plan
    from pipeline.planning.describe import describe, describe_time

    ranks = nodes * gpus_per_node
    resolve = _resolver(tree, deepspeed)
    machine = _choose_machine(gpu, calibration, gpus_per_node)
    with _planned_data(tree, rows, query_tokens, document_tokens) as planned:
        plan = make_plan(
            planned,
            resolve(ranks),
            world_size=ranks,
            target=machine.target,
            build=False,
            speed=machine.speed,
            network=network,
            num_examples=rows,
        )
    print(describe(plan, tree))
    if machine.speed is not None:  # a size in GiB has none
        print("\n" + describe_time(plan, tree, machine, network=network))


@plan.command("scale")
def plan_scale(
    config: Config,
    overrides: Overrides = None,
    deepspeed: DeepSpeed = DEFAULT_DEEPSPEED,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node, one rank each")] = 8,
    gpu: Gpu = None,
    calibration: CalibrationFile = None,
    network: Annotated[float, typer.Option(min=0.1, help="bandwidth of a node in Gb/s")] = _NETWORK,
    price: Price = None,
    plot: Annotated[Path | None, typer.Option(help="also plot tokens per second, as .png")] = None,
    rows: Rows = None,
    query_tokens: QueryTokens = None,
    document_tokens: DocumentTokens = None,
) -> None:
    """Project a training run on 1, 2, 4, ... nodes, up to 1,024 GPUs: memory, time, price."""
    tree = load(TrainConfig, config, overrides)
    from pipeline.planning.describe import describe_scale, plot_scale, scale

    resolve = _resolver(tree, deepspeed)
    machine = _choose_machine(gpu, calibration, gpus_per_node)
    with _planned_data(tree, rows, query_tokens, document_tokens) as planned:
        sizes = scale(planned, resolve, machine=machine, network=network)
    print(describe_scale(sizes, tree, machine=machine, network=network, price=price))
    if plot is not None:
        plot_scale(sizes, plot, title=f"{config} on {machine.name}, a projection")
        print(f"written: {plot}")


@plan.command("evaluate")
def plan_evaluate(
    config: Config,
    overrides: Overrides = None,
    gpu: Gpu = None,
    calibration: CalibrationFile = None,
    gpus: GpusAtATime = 1,
    price: Price = None,
    model: Annotated[
        str | None,
        typer.Option(help="plan with this model instead, for example before the exports exist"),
    ] = None,
    count: Annotated[
        bool,
        typer.Option("--count", help="read all data and count tokens with the models' tokenizers"),
    ] = False,
    documents: Annotated[
        int | None,
        typer.Option(min=1, help="number of documents of a task without published sizes"),
    ] = None,
    document_tokens: DocumentTokens = None,
    queries: Annotated[
        int | None, typer.Option(min=1, help="with --documents: number of queries")
    ] = None,
    query_tokens: QueryTokens = None,
) -> None:
    """Print the GPU time of an evaluation's array, by task."""
    tree = load(EvaluateConfig, config, overrides)
    from pipeline.planning.arrays import describe_array, plan_evaluation
    from pipeline.planning.text_sizes import count_texts

    if count and model is not None:
        raise UserError(
            "--count with --model", fix="remove one: the exports' own tokenizers count their texts"
        )
    described = _described_task(documents, document_tokens, queries, query_tokens, "--documents")
    machine = _choose_machine(gpu, calibration, 1)
    counted = count_texts(tree) if count else None
    found = plan_evaluation(tree, machine, model=model, described=described, counted=counted)
    print(describe_array(found, machine, gpus=gpus, price=price))


@plan.command("mine")
def plan_mine(
    config: Config,
    overrides: Overrides = None,
    gpu: Gpu = None,
    calibration: CalibrationFile = None,
    gpus: GpusAtATime = 1,
    price: Price = None,
    rows: Rows = None,
    query_tokens: QueryTokens = None,
    document_tokens: DocumentTokens = None,
) -> None:
    """Print the GPU time of a mining, by step and model."""
    tree = load(MineConfig, config, overrides)
    from pipeline.planning.arrays import describe_array, plan_mining

    described = _described_task(rows, document_tokens, rows, query_tokens, "--rows")
    machine = _choose_machine(gpu, calibration, 1)
    found = plan_mining(tree, machine, described=described)
    print(describe_array(found, machine, gpus=gpus, price=price))


@plan.command("encode")
def plan_encode(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="an export, or a model's name")],
    source: Annotated[
        str | None, typer.Option("--input", help="files, as for `diffembed encode`")
    ] = None,
    gpu: Gpu = None,
    calibration: CalibrationFile = None,
    gpus: GpusAtATime = 1,
    price: Price = None,
    field: Annotated[str, typer.Option(help="the field with the text")] = "text",
    role: Annotated[
        Literal["query", "document"], typer.Option(help="role of all texts")
    ] = "document",
    max_length: Annotated[
        int | None, typer.Option(min=1, help="tokens after which a text is cut")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="number of texts, in place of --input")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="with --rows: mean length of a text")
    ] = None,
) -> None:
    """Print the GPU time of encoding a file, from a sample of it."""
    from pipeline.planning.arrays import describe_array, plan_encoding
    from pipeline.planning.planned_model import PlannedModel
    from pipeline.planning.text_sizes import Texts, estimate_tokens, read_inputs

    # Exactly one of --input and the pair.
    described = rows is not None and tokens is not None
    if (source is None) != described or (rows is None) != (tokens is None):
        raise UserError("plan encode: what to encode", allowed="--input, or --rows and --tokens")
    machine = _choose_machine(gpu, calibration, 1)
    read = PlannedModel.read(model, name=model, key="MODEL", precision="auto", machine=machine)
    if rows is not None and tokens is not None:
        # The longest has four times the mean, as wherever texts are described.
        texts, origin = Texts.around(rows, tokens, 4.0 * tokens), "described"
    else:
        found, factor = read_inputs(str(source), field=field, role=role)
        texts = Texts.counted(estimate_tokens(found)).times(factor)
        origin = (
            "files, by bytes" if factor == 1 else f"{len(found):,} texts of the files, by bytes"
        )
    array = plan_encoding(read, texts, limit=max_length, origin=origin)
    print(describe_array(array, machine, gpus=gpus, price=price))


def _described_task(
    documents: int | None,
    document_tokens: int | None,
    queries: int | None,
    query_tokens: int | None,
    first: str,
) -> DescribedTask | None:
    """Return the sizes that the options describe; None if none is given."""
    given = (documents, document_tokens, queries, query_tokens)
    if all(size is None for size in given):
        return None
    if documents is None or document_tokens is None or queries is None or query_tokens is None:
        own = "" if first == "--rows" else "--queries, "
        raise UserError(
            "plan: only some of the sizes of texts",
            allowed=f"all of {first}, --document-tokens, {own}--query-tokens, or none",
        )
    from pipeline.planning.text_sizes import DescribedTask

    return DescribedTask(
        documents=documents,
        document_tokens=document_tokens,
        queries=queries,
        query_tokens=query_tokens,
    )


@plan.command("calibrate")
def plan_calibrate(
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="ranks that work together; default: one per GPU, otherwise two"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="file to write; default: in the user's cache, named after the device"),
    ] = None,
) -> None:
    """Measure this machine in about two minutes: layers, gather, reduction, update, loss."""
    from pipeline.launch import count_gpus
    from pipeline.measuring.calibrate import calibrate
    from pipeline.planning.calibration import default_path, describe, save

    found = calibrate(ranks or count_gpus() or 2)
    path = output or default_path(found.device)
    save(found, path)
    print(f"{describe(found)}\nwritten: {path}")
    print(f"next: diffembed plan run CONFIG --calibration {path}")


@plan.command("loss")
def plan_loss(
    queries: Annotated[int, typer.Option(min=1, help="queries of the global batch")],
    documents: Annotated[
        int, typer.Option(min=1, help="documents of the global batch, with hard negatives")
    ],
    width: Annotated[int, typer.Option(min=1, help="width of the embeddings")] = 3584,
    world_size: Annotated[
        list[int] | None, typer.Option(min=1, help="number of ranks; may be repeated")
    ] = None,
) -> None:
    """Print the cost of the loss on each rank, for batches of any size."""
    from pipeline.planning.describe import describe_loss

    for ranks in world_size or [1]:
        print(
            describe_loss(
                num_queries=queries, num_documents=documents, width=width, world_size=ranks
            )
        )


@app.command(rich_help_panel=RUN)
def submit(
    what: Annotated[
        Literal["synthesize", "prepare", "mine", "train", "export", "evaluate", "report", "all"],
        typer.Argument(
            metavar="JOB", help="synthesize, prepare, mine, train, export, evaluate, report or all"
        ),
    ],
    config: Config,
    overrides: Overrides = None,
    deepspeed: Annotated[
        Path, typer.Option(help="train: DeepSpeed JSON, see ds_configs/")
    ] = DEFAULT_DEEPSPEED,
    checkpoint: Annotated[str, typer.Option(help="export: as for `diffembed export`")] = "latest",
    output: Annotated[Path | None, typer.Option(help="export: as for `diffembed export`")] = None,
    texts: Annotated[
        int | None,
        typer.Option(min=1, help="evaluate: array elements that share the texts of all tasks"),
    ] = None,
    sbatch: Annotated[str, typer.Option(help="flags of sbatch for this job only")] = "",
    after: Annotated[list[str] | None, typer.Option(help="id of a job to wait for")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="print the batch scripts and the plan of a training, mining or evaluation",
        ),
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
    given = {
        "deepspeed": deepspeed != DEFAULT_DEEPSPEED,
        "checkpoint": checkpoint != "latest",
        "output": output is not None,
        "texts": texts is not None,
    }
    _refuse_options_of_other_jobs(what, [option for option in given if given[option]])
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
    if not dry_run:
        return
    lines: list[str] = []
    if what in ("train", "all"):
        lines = _plan_of_submission(what, config, overrides, deepspeed, sbatch, gpu)
    elif what == "mine":
        lines = _plan_of_mining(load(MineConfig, config, overrides))
    elif what == "evaluate":
        lines = _plan_of_evaluation(load(EvaluateConfig, config, overrides), texts, sbatch, gpu)
    # Comments of bash, below scripts that may be saved and run.
    for line in lines:
        print(f"# plan: {line}".rstrip())


# Options that one kind of job takes, and the key by which a chain's config sets the same.
_OPTION_OF = {
    "deepspeed": ("train", "deepspeed"),
    "checkpoint": ("export", "exports"),
    "output": ("export", "exports"),
    "texts": ("evaluate", "text_elements"),
}


def _refuse_options_of_other_jobs(what: str, given: Sequence[str]) -> None:
    for option in given:
        job, key = _OPTION_OF[option]
        if what == "all":
            raise UserError(f"--{option} with all", fix=f"set {key} in the chain's config")
        if what != job:
            raise UserError(f"--{option} with {what}", allowed=f"with {job}", fix="remove it")


def _plan_of_mining(tree: MineConfig) -> list[str]:
    """Return the work of each step, if the shards to mine exist."""
    from pipeline.data.manifest import FILE_NAME
    from pipeline.mining import describe_mining

    if not (tree.data / FILE_NAME).is_file():
        return [f"{tree.data} is not prepared yet; afterwards, use `diffembed mine --dry-run`"]
    return describe_mining(tree).splitlines()


def _plan_of_submission(
    what: str,
    config: Path,
    overrides: list[str] | None,
    deepspeed: Path,
    sbatch: str,
    gpu: str | None,
) -> list[str]:
    """Return the plan of a training run, or a chain's, on the GPUs that Slurm's flags ask for."""
    from pipeline.data.manifest import FILE_NAME
    from pipeline.planning import plan_run as make_plan
    from pipeline.planning.describe import describe

    if what == "all":
        chain = load(ChainConfig, config, overrides)
        config, overrides, deepspeed = chain.train, None, chain.deepspeed
    tree = load(TrainConfig, config, overrides)
    if not (tree.data.path / FILE_NAME).is_file():
        return [f"{tree.data.path} is not prepared yet; afterwards, use `diffembed plan run`"]
    request, name = _requested("TRAIN_FLAGS", sbatch, gpu)
    if name is None or not request.per_node:
        return [_unnamed(request, "memory")]
    ranks = request.nodes * request.per_node
    try:
        machine = _choose_machine(name, None, request.per_node)
        plan = make_plan(
            tree,
            _resolver(tree, deepspeed)(ranks),
            world_size=ranks,
            target=machine.target,
            build=False,
            speed=machine.speed,
        )
    except UserError as error:
        # The scripts above are right even so, and the memory of a rank is an estimate.
        return [f"{request.nodes} x {request.per_node} {name}: {error}"]
    return [f"{request.nodes} x {request.per_node} {name}", *describe(plan, tree).splitlines()]


def _plan_of_evaluation(
    tree: EvaluateConfig, texts: int | None, sbatch: str, gpu: str | None
) -> list[str]:
    """Return the GPU time of an evaluation's array, on the GPU that Slurm's flags ask for."""
    from pipeline.planning.arrays import describe_array, plan_evaluation
    from pipeline.submission.jobs import read_site

    request, name = _requested("EVALUATE_FLAGS", sbatch, gpu)
    if name is None or not request.per_node:
        return [_unnamed(request, "GPU time")]
    try:
        machine = _choose_machine(name, None, 1)
        array = plan_evaluation(tree, machine)
        elements = texts or len(array.work)
        at_a_time = min(elements, read_site().array_limit or elements)
        return describe_array(array, machine, gpus=at_a_time).splitlines()
    except UserError as error:  # the scripts above are right even so
        return [f"{name}: {error}"]


def _requested(key: str, sbatch: str, gpu: str | None) -> tuple[RequestedGpus, str | None]:
    """Return the GPUs that Slurm's flags ask for, and their name if it is known."""
    from pipeline.planning.memory import gpu_named
    from pipeline.submission.jobs import parse_flags, read_site, requested_gpus, split_flags

    own = parse_flags(split_flags(sbatch), "--sbatch")
    request = requested_gpus((*read_site().flags_of(key), *own))
    return request, gpu or gpu_named(request.kind)


def _unnamed(request: RequestedGpus, what: str) -> str:
    found = request.kind or f"{request.per_node} GPUs a node, of no named kind"
    return f"Slurm's flags ask for {found}; --gpu NAME plans {what} for it"
