"""Predict the batch, the schedule and the memory of a run before it starts.

config, shards --plan_run--> first global batch, tokens of the fullest rank and chunk
model --shape.py--> ModelShape: from the meta device, or from its config.json alone
ModelShape, RankWorkload --memory.py--> terms of memory, what `auto` means
                         --speed.py, measured.py--> seconds of a step by part
                         --describe.py--> the text of `--dry-run` and `diffembed plan run`, and
                                          of the same run on 8 to 1,024 GPUs
evaluation, mining, encoding --arrays.py--> GPU time by task

Nothing here imports torch, except `plan_run` for a model that is built.
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any

from pipeline.config import TrainConfig, local_file, model_fix
from pipeline.data.batch import GlobalBatch
from pipeline.data.manifest import Manifest
from pipeline.data.shards import Dataset
from pipeline.data.text_loader import data_warnings, make_loader, open_dataset
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.loss.tiles import (
    DEFAULT_SCORE_BYTES,
    TOKEN_TILE_BYTES,
    LossCost,
    TeacherTerms,
    loss_cost,
)
from pipeline.planning.calibration import Calibration, Machine
from pipeline.planning.measured import measured_seconds
from pipeline.planning.memory import (
    GIB,
    REDUCE_BUCKET,
    SCHEDULES,
    SUB_GROUP,
    RankWorkload,
    Schedule,
    Target,
    Term,
    allowed_schedules,
    choose_schedule,
    fitting_schedules,
    graphs_that_fit,
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
    step_seconds,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """A run's first global batch, as every rank would lay it out, and its schedule."""

    batch: GlobalBatch  # as rank 0 gets it
    num_examples: int  # of the data set, for the number of epochs
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
        speed: of the machine; of the schedules that fit, `auto` takes the fastest, or the one with
            the fewest FLOPs where no speed is known.
        network: Gb/s of one host, all adapters together.
        earlier: the schedule of the run that is resumed, which `auto` keeps while it fits.
        build: build the model without weights and compare its tokenizer with the shards'; False
            counts config.json, and takes a second.
        num_examples: of data that are only described, whose shards hold two batches at most.

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
    shape = _built_shape(config) if build else _counted_shape(config)
    width = config.model.dimensions or shape.hidden_size
    loss = _loss_of_data(config, dataset.manifest, batch, width, world_size, on_gpu=target.on_gpu)
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
            shape, workload, target.available, possible_schedules(config), assumed=target.name
        )
    plan = RunPlan(
        batch=batch,
        num_examples=num_examples or sum(unit.size for unit in loader.order.units),
        shape=shape,
        workload=workload,
        loss=loss,
        target=target,
        schedule=schedule,
        keep_graphs=0,  # chosen with the schedule below
        warnings=warnings,
    )
    if config.schedule != "auto":
        return _with_schedule(plan, config, schedule)
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
    fitting = fitting_schedules(
        plan.shape, plan.workload, plan.target.available, possible_schedules(config)
    )
    plans = {schedule: _with_schedule(plan, config, schedule) for schedule in fitting}
    if earlier in plans:
        return plans[earlier]
    if speed is None:
        return plans[plan.schedule]
    try:
        seconds = {
            schedule: step_time(each, config, speed, network=network)
            for schedule, each in plans.items()
        }
    except UserError:  # a calibration of other ranks, or of another type of numbers
        return plans[plan.schedule]
    # Of equally fast ones, the first has the fewest FLOPs.
    order = sorted(plans, key=lambda schedule: seconds[schedule])
    considered = tuple((schedule, seconds[schedule]) for schedule in order)
    return dataclasses.replace(plans[order[0]], considered=considered)


def _loss_of_data(
    config: TrainConfig,
    manifest: Manifest,
    batch: GlobalBatch,
    width: int,
    world_size: int,
    *,
    on_gpu: bool,
) -> LossCost | None:
    """Return the cost of a batch's loss; None where tokens are predicted.

    Raises:
        UserError: the loss needs what the model or the data lack.
    """
    teacher = manifest.teacher
    config.loss.require_fit(
        width=width, has_scores=manifest.has_scores, has_vectors=teacher is not None
    )
    if config.objective is not None:
        return None
    return _loss_cost(
        config,
        batch.num_queries,
        batch.num_documents,
        width=width,
        teacher=TeacherTerms.of(config.loss, width=0 if teacher is None else teacher.width),
        world_size=world_size,
        on_gpu=on_gpu,
    )


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
        device="cuda" if on_gpu else "cpu",
        teacher=teacher,
    )


def _loss_bytes(loss: LossCost | None, *, on_gpu: bool) -> float:
    """Return the memory of the loss, or of a tile of scores where tokens are predicted."""
    if loss is None:
        return float(TOKEN_TILE_BYTES["cuda" if on_gpu else "cpu"])
    # The embeddings of all chunks, joined, and their gradients are as large as its rows each.
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
    # Then DeepSpeed keeps a rank's share of the gradients in fp32.
    wide = config.model.dtype == "float32" or accumulated == "fp32"
    return RankWorkload(
        world_size=world_size,
        stage=zero["stage"],
        dtype=config.model.dtype,
        rank_tokens=rank_tokens,
        chunk_tokens=chunk_tokens,
        gradient_checkpointing=config.model.gradient_checkpointing,
        boundaries_on_host=config.chunks.boundaries == "host",
        # The section may be null.
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


def possible_schedules(config: TrainConfig) -> tuple[Schedule, ...]:
    """Return the schedules that `auto` may choose from."""
    # Tokens are predicted chunk by chunk, in the memory of `cache`: `plain` would change nothing.
    return SCHEDULES if config.objective is None else SCHEDULES[1:]


def _built_shape(config: TrainConfig) -> ModelShape:
    """Count the model itself; its shapes need no weights, so that a login node can plan."""
    from pipeline.model import encoder

    return ModelShape.of(encoder.build_model(config, meta=True), config.model)


def _counted_shape(config: TrainConfig) -> ModelShape:
    """Count the model from its config.json, without torch."""
    has_head = config.objective is not None
    return ModelShape.planned(_read_config(config), config.model, head=has_head)


def _read_config(config: TrainConfig) -> dict[str, Any]:
    path = local_file(config.model.path, "config.json", config.model.revision)
    if path is None:
        raise UserError(
            f"model.path: {config.model.path}: no config.json on this machine",
            fix=model_fix(config.model.path),
        )
    tree = read_json(path, fix=model_fix(config.model.path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {type(tree).__name__} at the top", allowed="a JSON object")
    return tree


def _with_schedule(plan: RunPlan, config: TrainConfig, schedule: Schedule) -> RunPlan:
    """Return the plan with a schedule and the number of graphs that it keeps."""
    kept = config.chunks.keep_graphs
    # `plain` keeps all graphs anyway; one of token prediction serves its own chunk only.
    if schedule != "cache" or config.objective is not None:
        kept = 0
    elif kept == "auto":
        num_chunks = len(plan.batch.chunks)
        kept = graphs_that_fit(plan.shape, plan.workload, plan.target.available, num_chunks)
    return dataclasses.replace(plan, schedule=schedule, keep_graphs=kept)


def seconds_of(
    plan: RunPlan, config: TrainConfig, speed: Gpu | Calibration, *, network: float
) -> tuple[Seconds, ...]:
    """Predict the parts of a step; `network` is Gb/s of a host, all adapters together.

    Raises:
        UserError: a calibration does not cover the run.
    """
    work = step_work(plan, config, network=network)
    if isinstance(speed, Calibration):
        return measured_seconds(plan.shape, work, plan.schedule, speed)
    return step_seconds(plan.shape, work, plan.schedule, speed)


def step_time(
    plan: RunPlan, config: TrainConfig, speed: Gpu | Calibration, *, network: float
) -> float:
    """Predict the seconds of a whole step; arguments and errors as in `seconds_of`."""
    return sum(part.seconds for part in seconds_of(plan, config, speed, network=network))


def expected_step(
    plan: RunPlan, config: TrainConfig, machine: Machine, *, network: float
) -> dict[str, float]:
    """Predict the numbers of a step that a run logs, by their key, as far as they are known.

    Raises:
        UserError: a calibration does not cover the run.
    """
    found = {}
    if plan.workload.on_gpu:
        # As torch's allocator will report it, which counts neither CUDA's memory nor NCCL's.
        allocated = [term for term in plan.terms if term.part != "context"]
        found["peak_memory_gib"] = peak(allocated)[1] / GIB
    if machine.speed is not None:
        found["seconds"] = step_time(plan, config, machine.speed, network=network)
    return found


def step_work(plan: RunPlan, config: TrainConfig, *, network: float) -> StepWork:
    """Return the arithmetic and traffic of a plan's step; `network` is Gb/s of a host."""
    batch = plan.batch
    return StepWork(
        workload=plan.workload,
        # Ranks are balanced by cost, so that this rank is like the fullest.
        chunks=tuple(chunk.lengths for chunk in batch.chunks),
        causal=config.model.attention == "causal",
        kept=min(1.0, plan.keep_graphs / len(batch.chunks)),
        loss=plan.loss,
        network=network * 1e9 / 8,  # bytes a second
    )


def largest_batch(plan: RunPlan, config: TrainConfig) -> int:
    """Return the largest global batch of such texts that fits, with any schedule that is allowed.

    A multiple of this run's batch; 0 if not even this one fits, and at most 2**20 times it.
    """
    workload, batch = plan.workload, plan.batch
    possible = possible_schedules(config) if config.schedule == "auto" else (plan.schedule,)
    schedules = allowed_schedules(workload, possible)

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
        # A batch that does not fill a chunk yet will.
        chunk = max(workload.chunk_tokens, min(tokens, config.chunks.max_tokens))
        larger = dataclasses.replace(
            workload,
            rank_tokens=tokens,
            chunk_tokens=chunk,
            loss_bytes=_loss_bytes(loss, on_gpu=workload.on_gpu),
        )
        sizes = (needed(plan.shape, larger, schedule) for schedule in schedules)
        return any(size <= plan.target.available for size in sizes)

    # More texts never need less, so that a bisection finds the first number that does not fit; its
    # index is the last one that does.
    times = bisect.bisect_left(range(1, 2**20 + 1), True, key=lambda times: not fits(times))
    return times * config.data.global_batch_size
