"""Predict the batch, the schedule and the memory of a run before it starts.

config, shards --plan_run--> first global batch, tokens of the fullest rank and chunk
model --shape.py--> ModelShape: from the meta device, or from its config.json alone
ModelShape, RankWorkload --memory.py--> terms of memory, what `auto` means
                         --speed.py, measured.py--> seconds of a step by part
                         --describe--> the text of `--dry-run` and `diffembed plan run`
                         --scale.py--> the same run on 8 to 1,024 GPUs

Nothing here imports torch, except `plan_run` for a model that is built.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
from typing import Any

from pipeline.config import TrainConfig, as_tree, local_file, model_fix
from pipeline.data.batch import GlobalBatch
from pipeline.data.shards import Dataset
from pipeline.data.text_loader import data_warnings, make_loader, open_dataset
from pipeline.errors import UserError
from pipeline.loss.tiles import (
    DEFAULT_SCORE_BYTES,
    TOKEN_TILE_BYTES,
    LossCost,
    TeacherTerms,
    loss_cost,
)
from pipeline.planning.calibration import Calibration
from pipeline.planning.machine import Machine
from pipeline.planning.measured import measured_seconds
from pipeline.planning.memory import (
    GIB,
    PARTS,
    REDUCE_BUCKET,
    SCHEDULES,
    SUB_GROUP,
    RankWorkload,
    Schedule,
    Target,
    Term,
    choose_schedule,
    fitting_schedules,
    graphs_that_fit,
    host_memory,
    loading_peak,
    memory_terms,
    needed,
    peak,
)
from pipeline.planning.shape import ModelShape
from pipeline.planning.speed import (
    DEFAULT_NETWORK,
    Gpu,
    Seconds,
    StepWork,
    step_flops,
    step_seconds,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """A run's first global batch, as every rank would lay it out, and its schedule."""

    batch: GlobalBatch  # as rank 0 gets it
    num_examples: int
    shape: ModelShape
    workload: RankWorkload
    loss: LossCost | None  # None where tokens are predicted
    target: Target
    schedule: Schedule
    keep_graphs: int
    warnings: list[str]  # about data that do not suit the run
    # Where `auto` chose by time: schedules that fit and their seconds, fastest first.
    considered: tuple[tuple[Schedule, float], ...] = ()

    @property
    def terms(self) -> tuple[Term, ...]:
        """Memory of the fullest rank."""
        return memory_terms(self.shape, self.workload, self.schedule, self.keep_graphs)


def plan_run(
    config: TrainConfig,
    ds_config: dict[str, Any],
    *,
    world_size: int,
    target: Target,
    build: bool = True,
    speed: Gpu | Calibration | None = None,
    network: float = DEFAULT_NETWORK,
    earlier: Schedule | None = None,
    num_examples: int | None = None,
) -> RunPlan:
    """Lay out the first batch and choose the schedule where the config has `auto`.

    Args:
        config: the run.
        ds_config: the resolved DeepSpeed config.
        world_size: ranks to plan for.
        target: their memory.
        speed: of the machine; among schedules that fit, `auto` takes the fastest, or where no speed
            is known the one with the fewest FLOPs.
        network: Gb/s of one host, all adapters together.
        earlier: the schedule of the run that is resumed, which `auto` keeps while it fits.
        build: build the model without weights and compare its tokenizer with the shards'; False
            counts config.json, and takes a second.
        num_examples: of data that are only described, whose shards hold enough for a batch.

    Raises:
        UserError: the data cannot be read, the batch is impossible, or no schedule fits.
    """
    # Verifying all shards would take too long.
    if build:
        dataset = open_dataset(config, verify=False)
    else:
        dataset = Dataset.open(config.data.path, verify=False)
        dataset.require_model(config.model)
    loader = make_loader(dataset, config, rank=0, world_size=world_size)
    warnings = data_warnings(loader, config, num_examples=num_examples)
    # Of every rank's chunks, because the fullest rank decides, and it need not be rank 0.
    tokens = loader.chunk_tokens(0)
    batch = loader.batch(0)
    if build:
        shape = _built_shape(config)
    else:
        shape = ModelShape.planned(
            _read_config(config), config.model, head=config.objective is not None
        )
    width, loss = config.model.dimensions or shape.hidden_size, None
    teacher = dataset.manifest.teacher
    config.loss.require_fit(
        width=width,
        has_scores=dataset.manifest.has_scores,
        has_vectors=teacher is not None,
    )
    if config.objective is None:
        loss = _loss_cost(
            config,
            batch.num_queries,
            batch.num_documents,
            width=width,
            teacher=TeacherTerms.of(config.loss, width=0 if teacher is None else teacher.width),
            world_size=world_size,
            on_gpu=target.on_gpu,
        )
    workload = _workload(
        config,
        ds_config,
        world_size=world_size,
        rank_tokens=max(map(sum, tokens)),
        chunk_tokens=max(map(max, tokens)),
        loss=loss,
        target=target,
    )
    schedule = config.schedule
    if schedule == "auto":
        schedule = choose_schedule(
            shape, workload, target.available, _possible(config), assumed=target.name
        )
    plan = RunPlan(
        batch=batch,
        num_examples=num_examples or sum(unit.size for unit in loader.order.units),
        shape=shape,
        workload=workload,
        loss=loss,
        target=target,
        schedule=schedule,
        keep_graphs=_keep_graphs(config, shape, workload, schedule, target, len(tokens[0])),
        warnings=warnings,
    )
    if config.schedule != "auto":
        return plan
    return _choose_by_time(plan, config, speed, network=network, earlier=earlier)


def _choose_by_time(
    plan: RunPlan,
    config: TrainConfig,
    speed: Gpu | Calibration | None,
    *,
    network: float,
    earlier: Schedule | None,
) -> RunPlan:
    """Return the plan with the fastest schedule that fits, or with an earlier one."""
    shape, workload, target = plan.shape, plan.workload, plan.target
    plans = {
        schedule: dataclasses.replace(
            plan,
            schedule=schedule,
            keep_graphs=_keep_graphs(
                config, shape, workload, schedule, target, len(plan.batch.chunks)
            ),
        )
        for schedule in fitting_schedules(shape, workload, target.available, _possible(config))
    }
    if earlier in plans:
        return plans[earlier]
    if speed is None:
        return plan
    try:
        seconds = {
            schedule: sum(part.seconds for part in seconds_of(each, config, speed, network=network))
            for schedule, each in plans.items()
        }
    except UserError:  # a calibration of other ranks, or of another type of numbers
        return plan
    # Of equally fast ones, the first has the fewest FLOPs.
    order = sorted(plans, key=lambda schedule: seconds[schedule])
    considered = tuple((schedule, seconds[schedule]) for schedule in order)
    return dataclasses.replace(plans[order[0]], considered=considered)


def _loss_cost(
    config: TrainConfig,
    num_queries: int,
    num_documents: int,
    *,
    width: int,
    teacher: TeacherTerms,
    world_size: int,
    on_gpu: bool,
) -> LossCost:
    return loss_cost(
        num_queries=num_queries,
        num_documents=num_documents,
        width=width,
        world_size=world_size,
        score_bytes=DEFAULT_SCORE_BYTES["cuda" if on_gpu else "cpu"],
        symmetric=config.loss.symmetric,
        teacher=teacher,
    )


def _loss_bytes(loss: LossCost | None, *, on_gpu: bool) -> float:
    """Return the memory of the loss, or of a tile of scores where tokens are predicted."""
    if loss is None:
        return float(TOKEN_TILE_BYTES["cuda" if on_gpu else "cpu"])
    # The loss reads the embeddings of all chunks, joined, and gives the gradient of each.
    return float(loss.peak_bytes + 2 * loss.row_bytes)


def _workload(
    config: TrainConfig,
    ds_config: dict[str, Any],
    *,
    world_size: int,
    rank_tokens: int,
    chunk_tokens: int,
    loss: LossCost | None,
    target: Target,
) -> RankWorkload:
    """Collect everything that decides the memory of the fullest rank."""
    zero = ds_config["zero_optimization"]
    accumulated = ds_config.get("data_types", {}).get("grad_accum_dtype")
    wide = config.model.dtype == "float32" or accumulated in ("fp32", "float32", "torch.float32")
    return RankWorkload(
        world_size=world_size,
        stage=zero["stage"],
        dtype=config.model.dtype,
        rank_tokens=rank_tokens,
        chunk_tokens=chunk_tokens,
        gradient_checkpointing=config.model.gradient_checkpointing,
        boundaries_on_host=config.chunks.boundaries == "host",
        offload_optimizer=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
        loss_bytes=_loss_bytes(loss, on_gpu=target.on_gpu),
        predicts_tokens=config.objective is not None,
        hpz=int(zero.get("zero_hpz_partition_size", 1)),
        reduce_bucket=int(zero.get("reduce_bucket_size", REDUCE_BUCKET)),
        sub_group=int(zero.get("sub_group_size", SUB_GROUP)),
        overlap_comm=bool(zero.get("overlap_comm", False)),
        share_bytes=4 if wide else 2,
        on_gpu=target.on_gpu,
        ranks_per_host=target.ranks_per_host,
    )


def _possible(config: TrainConfig) -> tuple[Schedule, ...]:
    """Return the schedules that `auto` may choose from."""
    # Tokens are predicted chunk by chunk, which needs the memory of `cache`.
    return SCHEDULES if config.objective is None else SCHEDULES[1:]


def _built_shape(config: TrainConfig) -> ModelShape:
    """Count the model itself; its shapes need no weights, so that a login node can plan."""
    from pipeline.model import encoder

    return ModelShape.of(encoder.build_model(config, meta=True), config.model)


def _read_config(config: TrainConfig) -> dict[str, Any]:
    path = local_file(config.model.path, "config.json", config.model.revision)
    if path is None:
        raise UserError(
            f"model.path: {config.model.path}: no config.json on this machine",
            fix=model_fix(config.model.path),
        )
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: {error}", fix=model_fix(config.model.path)) from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {type(tree).__name__} at the top", allowed="a JSON object")
    return tree


def _keep_graphs(
    config: TrainConfig,
    shape: ModelShape,
    workload: RankWorkload,
    schedule: Schedule,
    target: Target,
    num_chunks: int,
) -> int:
    kept = config.chunks.keep_graphs
    if schedule != "cache" or config.objective is not None:
        return 0
    if kept == "auto":
        return graphs_that_fit(shape, workload, target.available, num_chunks)
    return kept


def describe(plan: RunPlan, config: TrainConfig) -> str:
    """Format a plan as aligned lines of text."""
    batch, workload, shape = plan.batch, plan.workload, plan.shape
    optimizer = config.optimizer
    lines = [
        *_objective(batch, config),
        (
            "tokens",
            f"{batch.tokens:,} = {len(batch.chunks)} chunks x <= {workload.chunk_tokens:,} tokens "
            f"x {workload.world_size} ranks (budget {config.chunks.max_tokens:,} a chunk)",
        ),
        ("steps", _steps(plan, config)),
        (
            "learning rate",
            f"{optimizer.lr:g} after {optimizer.warmup_steps} warm-up steps, "
            f"then {optimizer.decay}",
        ),
        (
            "model",
            f"{shape.parameters:,} parameters, {shape.trainable:,} trained, "
            f"{config.model.dtype}, {config.model.attention}, {config.model.pooling} pooling",
        ),
        (
            "schedule",
            f"{plan.schedule}{_reason(plan, config)}, "
            f"{plan.keep_graphs} graphs kept, ZeRO stage {workload.stage} "
            f"on {workload.world_size} ranks",
        ),
        *(("warning", warning) for warning in plan.warnings),
    ]
    return _align(lines) + "\n\n" + memory_table(plan, config)


def _reason(plan: RunPlan, config: TrainConfig) -> str:
    """Return the words in which a plan explains its schedule."""
    if config.schedule != "auto":
        return ""
    if not plan.considered:
        return " (auto)"
    (_, own), *others = plan.considered
    slower = "".join(f"; {schedule} {seconds:.3g} s" for schedule, seconds in others[:1])
    return f" (auto: {own:.3g} s a step, the least of what fits{slower})"


def seconds_of(
    plan: RunPlan, config: TrainConfig, speed: Gpu | Calibration, *, network: float
) -> tuple[Seconds, ...]:
    """Predict the parts of a step; `network` is Gb/s of a host, all adapters together.

    Raises:
        UserError: a calibration does not cover the run.
    """
    work = _work(plan, config, network=network)
    if isinstance(speed, Calibration):
        return measured_seconds(plan.shape, work, plan.schedule, speed)
    return step_seconds(plan.shape, work, plan.schedule, speed)


def expected_step(
    plan: RunPlan, config: TrainConfig, machine: Machine, *, network: float
) -> dict[str, float]:
    """Return the numbers of a step that a run logs, by their key, as far as they are known.

    Raises:
        UserError: a calibration does not cover the run.
    """
    found = {}
    if plan.workload.on_gpu:
        # torch counts neither CUDA's memory nor NCCL's.
        allocated = [term for term in plan.terms if term.part != "context"]
        found["peak_memory_gib"] = peak(allocated)[1] / GIB
    if machine.speed is not None:
        parts = seconds_of(plan, config, machine.speed, network=network)
        found["seconds"] = sum(part.seconds for part in parts)
    return found


def _work(plan: RunPlan, config: TrainConfig, *, network: float) -> StepWork:
    batch = plan.batch
    return StepWork(
        workload=plan.workload,
        # Ranks are balanced by cost, so that this rank is like the fullest.
        chunks=tuple(chunk.lengths for chunk in batch.chunks),
        causal=config.model.attention == "causal",
        kept=min(1.0, plan.keep_graphs / len(batch.chunks)),
        loss=plan.loss,
        network=network * 1e9 / 8,
    )


def describe_time(plan: RunPlan, config: TrainConfig, machine: Machine, *, network: float) -> str:
    """Format the seconds of a step by part, and what the run takes.

    Args:
        plan: of the run.
        config: the run.
        machine: a size in GiB has no speed.
        network: Gb/s of one host, all adapters together.

    Raises:
        UserError: the machine's speed is not known, or a calibration does not cover the run.
    """
    speed, batch = machine.require_speed(), plan.batch
    parts = seconds_of(plan, config, speed, network=network)
    total = sum(part.seconds for part in parts)
    ranks = plan.workload.world_size
    hours = total * config.num_steps / 3600
    flops = step_flops(plan.shape, _work(plan, config, network=network), plan.schedule)
    use = ["FLOP/s", f"{flops / total:.3g}", "of a rank, with recomputation"]
    if isinstance(speed, Gpu):
        use = ["of the peak", f"{flops / speed.bf16 / total:.0%}", "FLOPs with recomputation"]
    rows = [["seconds of a step", "", "from"]]
    rows += [[part.part, f"{part.seconds:.3g}", part.source] for part in parts]
    rows += [
        ["sum", f"{total:.3g}", machine.origin(network)],
        use,
        ["tokens a second", f"{batch.tokens / total:,.0f}", f"all {ranks} ranks"],
        ["largest batch", f"{largest_batch(plan, config):,}", "that fits, of such texts"],
        ["run", f"{hours:.3g} h", f"{config.num_steps:,} steps, {hours * ranks:.3g} GPU-hours"],
    ]
    return format_columns(rows)


def memory_table(plan: RunPlan, config: TrainConfig) -> str:
    """Format the memory of a rank by part, for the chosen schedule and the runner-up."""
    shape, workload, available = plan.shape, plan.workload, plan.target.available
    chosen = memory_terms(shape, workload, plan.schedule, plan.keep_graphs)
    columns = [(f"{plan.schedule}, chosen", chosen)]
    if (other := runner_up(plan, config)) is not None:
        fits = "fits too" if needed(shape, workload, other) <= available else "does not fit"
        columns.append((f"{other}, {fits}", memory_terms(shape, workload, other)))
    # Terms of both schedules, by part; a schedule's own come first.
    names = dict.fromkeys((term.part, term.name) for _, terms in columns for term in terms)
    rows = [["memory of a rank", *(title for title, _ in columns), "from"]]
    for part, name in sorted(names, key=lambda key: PARTS.index(key[0])):
        found = [_find(terms, part, name) for _, terms in columns]
        source = next(term.source for term, _ in found if term is not None)
        rows.append([f"{part}: {name}", *(cell for _, cell in found), source])
    moments = [peak(terms) for _, terms in columns]
    rows.append(["peak", *(f"{format_bytes(size)} ({moment})" for moment, size in moments), ""])
    rows.append(["may use", *(format_bytes(available) for _ in columns), plan.target.name])
    loading = format_bytes(loading_peak(shape, workload))
    rows.append(["while loading", *(loading for _ in columns), "weights, before the first step"])
    hosts = [
        host_memory(shape, workload, schedule)
        for schedule in (plan.schedule, *([other] if other else []))
    ]
    ranks = min(workload.ranks_per_host, workload.world_size)
    for name in dict.fromkeys(name for sizes in hosts for name in sizes):
        cells = [format_bytes(sizes.get(name, 0.0)) for sizes in hosts]
        rows.append([f"host: {name}", *cells, f"{ranks} ranks on a host"])
    return format_columns(rows) + "\n(in parentheses: not in memory at the peak)"


def largest_batch(plan: RunPlan, config: TrainConfig) -> int:
    """Return the largest global batch of such texts that fits, with any schedule that is allowed.

    A multiple of this run's batch; 0 if not even this one fits, and at most a million times it.
    """
    workload, batch = plan.workload, plan.batch
    schedules = _possible(config) if config.schedule == "auto" else (plan.schedule,)
    if workload.gradient_checkpointing:
        schedules = tuple(schedule for schedule in schedules if schedule != "sweep")

    def fits(times: int) -> bool:
        tokens = workload.rank_tokens * times
        loss = plan.loss and _loss_cost(
            config,
            batch.num_queries * times,
            batch.num_documents * times,
            width=config.model.dimensions or plan.shape.hidden_size,
            teacher=plan.loss.teacher,
            world_size=workload.world_size,
            on_gpu=workload.on_gpu,
        )
        chunk = max(workload.chunk_tokens, min(tokens, config.chunks.max_tokens))
        larger = dataclasses.replace(
            workload,
            rank_tokens=tokens,
            chunk_tokens=chunk,
            loss_bytes=_loss_bytes(loss, on_gpu=workload.on_gpu),
        )
        sizes = (needed(plan.shape, larger, schedule) for schedule in schedules)
        return any(size <= plan.target.available for size in sizes)

    # More texts never need less, so that a bisection finds the last that fit.
    times = bisect.bisect_left(range(1, 2**20 + 1), True, key=lambda times: not fits(times))
    return times * config.data.global_batch_size


def runner_up(plan: RunPlan, config: TrainConfig) -> Schedule | None:
    """Return the next fastest schedule, or the next by FLOPs where no speed is known."""
    if len(plan.considered) > 1:
        return plan.considered[1][0]
    possible = [
        s
        for s in _possible(config)
        if s != "sweep" or not plan.workload.gradient_checkpointing or s == plan.schedule
    ]
    if plan.schedule not in possible:
        return None
    index = possible.index(plan.schedule)
    if index > 0:
        return possible[index - 1]
    return possible[index + 1] if len(possible) > 1 else None


def _find(terms: tuple[Term, ...], part: str, name: str) -> tuple[Term | None, str]:
    """Return a term and its cell."""
    term = next((t for t in terms if (t.part, t.name) == (part, name)), None)
    if term is None:
        return None, "-"
    size = format_bytes(term.size)
    return term, size if peak(terms)[0] in term.moments else f"({size})"


def format_columns(rows: list[list[str]]) -> str:
    """Align the columns of a table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _objective(batch: GlobalBatch, config: TrainConfig) -> list[tuple[str, str]]:
    if config.objective is None:
        text = f"{batch.num_queries} queries, {batch.num_documents} distinct documents"
        return [("global batch", text)]
    sections = {key: value for key, value in as_tree(config.objective).items() if value is not None}
    return [("objective", str(sections)), ("global batch", f"{batch.num_documents} texts")]


def _steps(plan: RunPlan, config: TrainConfig) -> str:
    """Format steps x batch = examples, in epochs."""
    unit = "queries" if config.objective is None else "texts"
    size = config.data.global_batch_size
    total = config.num_steps * size
    return (
        f"{config.num_steps} x {size} = {total:,} {unit} = "
        f"{total / plan.num_examples:.2f} epochs of {plan.num_examples:,} examples"
    )


def describe_loss(*, num_queries: int, num_documents: int, width: int, world_size: int) -> str:
    """Format the cost of the loss alone, at a size for which no data need exist."""
    cost = loss_cost(
        num_queries=num_queries,
        num_documents=num_documents,
        width=width,
        world_size=world_size,
        score_bytes=DEFAULT_SCORE_BYTES["cuda"],
    )
    naive = 4.0 * num_queries * num_documents
    lines = [
        ("loss", f"{num_queries:,} queries x {num_documents:,} documents, {world_size} ranks"),
        ("query blocks", f"{cost.num_blocks:,}, {cost.num_tiles:,} tiles scored by each rank"),
        (
            "peak memory",
            f"{format_bytes(cost.peak_bytes)} per rank (all scores: {format_bytes(naive)})",
        ),
        ("received per step", f"{format_bytes(cost.received_bytes)} per rank"),
        ("matrix products", f"{cost.matmul_flops:.3g} FLOP per rank"),
    ]
    return _align(lines)


def _align(lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def format_bytes(size: float) -> str:
    """Format a size with its unit."""
    if size < 1:
        return "0 B"
    power = min(int(math.log(size, 1024)), 4)
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
