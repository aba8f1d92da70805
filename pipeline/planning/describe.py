"""Format plans as text: batch, schedule, memory and seconds by part; runs on more nodes.

RunPlan --describe, describe_time--> lines of `--dry-run` and `diffembed plan run`
TrainConfig --scale--> a row per number of GPUs --describe_scale, plot_scale--> `plan scale`

`plan scale` keeps the global batch, so that every row trains the same model (strong scaling). The
range of a row shows how much the projection depends on what is unknown before a run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import TrainConfig, as_tree
from pipeline.data.batch import GlobalBatch
from pipeline.errors import UserError, several
from pipeline.files import atomic_path
from pipeline.loss.tiles import DEFAULT_SCORE_BYTES, loss_cost
from pipeline.planning import (
    RunPlan,
    largest_batch,
    plan_run,
    possible_schedules,
    seconds_of,
    step_time,
    step_work,
)
from pipeline.planning.calibration import Calibration, Machine
from pipeline.planning.memory import (
    PARTS,
    Schedule,
    Term,
    allowed_schedules,
    host_memory,
    loading_peak,
    memory_terms,
    needed,
    peak,
)
from pipeline.planning.speed import Gpu, step_flops


def describe(plan: RunPlan, config: TrainConfig) -> str:
    """Format a plan as aligned lines of text."""
    batch, workload, shape = plan.batch, plan.workload, plan.shape
    optimizer = config.optimizer
    lines = [
        *_objective(batch, config),
        (
            "tokens",
            f"{batch.tokens:,} = {several(len(batch.chunks), 'chunk')} x "
            f"<= {workload.chunk_tokens:,} tokens x {several(workload.world_size, 'rank')} "
            f"(budget {config.chunks.max_tokens:,} a chunk)",
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
            f"{several(plan.keep_graphs, 'graph')} kept, ZeRO stage {workload.stage} "
            f"on {several(workload.world_size, 'rank')}",
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
    # Sorted by time, so that the first is the chosen one.
    (_, own), *others = plan.considered
    slower = "".join(f"; {schedule} {seconds:.3g} s" for schedule, seconds in others[:1])
    return f" (auto: {own:.3g} s a step, the least of what fits{slower})"


def describe_time(plan: RunPlan, config: TrainConfig, machine: Machine, *, network: float) -> str:
    """Format the seconds of a step by part, and the time of the run.

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
    run = total * config.num_steps
    flops = step_flops(plan.shape, step_work(plan, config, network=network), plan.schedule)
    use = ["FLOP/s", f"{flops / total:.3g}", "of a rank, with recomputation"]
    if isinstance(speed, Gpu):
        use = ["of the peak", f"{flops / speed.bf16 / total:.0%}", "FLOPs with recomputation"]
    rows = [["seconds of a step", "", "from"]]
    rows += [[part.part, f"{part.seconds:.3g}", part.source] for part in parts]
    rows += [
        ["sum", f"{total:.3g}", machine.origin(network)],
        use,
        [
            "tokens a second",
            f"{batch.tokens / total:,.0f}",
            f"all {several(ranks, 'rank')}" if ranks > 1 else "one rank",
        ],
        ["largest batch", f"{largest_batch(plan, config):,}", "that fits, of such texts"],
        ["run", format_seconds(run), f"{config.num_steps:,} steps, {gpu_time(run * ranks)}"],
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
    # A row for each term of either schedule, by part; the sort keeps the chosen one's order.
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
    # No schedule changes how weights are read.
    rows.append(["while loading", *(loading for _ in columns), "weights, before the first step"])
    hosts = [
        host_memory(shape, workload, schedule)
        for schedule in (plan.schedule, *([other] if other else []))
    ]
    for name in dict.fromkeys(name for sizes in hosts for name in sizes):
        cells = [format_bytes(sizes.get(name, 0.0)) for sizes in hosts]
        rows.append(
            [f"host: {name}", *cells, f"{several(workload.ranks_on_host, 'rank')} on a host"]
        )
    return format_columns(rows) + "\n(in parentheses: not in memory at the peak)"


def runner_up(plan: RunPlan, config: TrainConfig) -> Schedule | None:
    """Return the next fastest schedule, or the next by FLOPs where no speed is known."""
    if len(plan.considered) > 1:
        return plan.considered[1][0]
    possible = allowed_schedules(plan.workload, possible_schedules(config))
    index = possible.index(plan.schedule)
    # The one with fewer FLOPs, which shows why it was not chosen; the first has only a next one.
    if index > 0:
        return possible[index - 1]
    return possible[1] if len(possible) > 1 else None


def _find(terms: tuple[Term, ...], part: str, name: str) -> tuple[Term | None, str]:
    """Return a term and its cell."""
    term = next((t for t in terms if (t.part, t.name) == (part, name)), None)
    if term is None:
        return None, "-"
    size = format_bytes(term.size)
    return term, size if peak(terms)[0] in term.moments else f"({size})"


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
    naive = 4.0 * num_queries * num_documents  # fp32
    lines = [
        (
            "loss",
            f"{num_queries:,} queries x {num_documents:,} documents, {several(world_size, 'rank')}",
        ),
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


def format_columns(rows: list[list[str]]) -> str:
    """Align the columns of a table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def format_bytes(size: float) -> str:
    """Format a size with its unit."""
    if size < 1:
        return "0 B"
    power = min(int(math.log(size, 1024)), 4)
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def format_seconds(seconds: float) -> str:
    """Format a time in seconds, minutes or hours: `45 s`, `12.3 min`, `3.4 h`."""
    value, symbol, _ = _in_unit(seconds)
    return f"{value} {symbol}"


def gpu_time(seconds: float) -> str:
    """Format the time of all GPUs together: `45 GPU-seconds`, `3.4 GPU-hours`."""
    value, _, name = _in_unit(seconds)
    return f"{value} GPU-{name}"


def format_price(seconds: float, price: float) -> str:
    """Format the cost of GPU time; `price` is that of one GPU for one hour."""
    cost = seconds / 3600 * price
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.2f}"


_UNITS = ((3600, "h", "hours"), (60, "min", "minutes"), (1, "s", "seconds"))


def _in_unit(seconds: float) -> tuple[str, str, str]:
    """Return a number of the largest unit that fits, and the unit's symbol and name."""
    size, symbol, name = next((unit for unit in _UNITS if seconds >= unit[0]), _UNITS[-1])
    value = seconds / size
    # Whole numbers above 1,000, where three digits would become 1.2e+03.
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}", symbol, name


# --- runs on more nodes ----------------------------------------------------------------------

_MAX_GPUS = 1024
# Multiples of the speed of layers (0.4 to 0.6 of a GPU's peak), and of the links' bandwidth, at the
# ends of the range.
_SHARES = (0.8, 1.2)
_LINKS = (0.5, 2.0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The projection for one number of GPUs.

    Attributes:
        gpus: of all nodes together.
        plan: None where the run is impossible; `problem` has the reason.
        seconds: of a step.
        fewest, most: seconds of a step at the ends of the range.
    """

    gpus: int
    plan: RunPlan | None
    problem: str = ""
    seconds: float = 0.0
    fewest: float = 0.0
    most: float = 0.0


def scale(
    config: TrainConfig,
    resolve: Callable[[int], dict[str, Any]],
    *,
    machine: Machine,
    network: float,
) -> list[Row]:
    """Plan the run on 1, 2, 4, ... nodes, up to 1,024 GPUs.

    Args:
        config: the run.
        resolve: number of ranks -> the resolved DeepSpeed config.
        machine: one node.
        network: Gb/s of a node, all adapters together.

    Raises:
        UserError: the GPU's speed is not known, or no number of GPUs can run it.
    """
    speed, target = machine.require_speed(), machine.target
    rows = []
    for gpus in _sizes(target.ranks_per_host):
        try:
            plan = plan_run(
                config,
                resolve(gpus),
                world_size=gpus,
                target=target,
                build=False,
                speed=speed,
                network=network,
            )
        except UserError as error:
            rows.append(Row(gpus=gpus, plan=None, problem=str(error)))
            continue
        fewest, most = _range(plan, config, speed, network)
        seconds = step_time(plan, config, speed, network=network)
        rows.append(Row(gpus=gpus, plan=plan, seconds=seconds, fewest=fewest, most=most))
    if not any(row.plan for row in rows):
        raise UserError(rows[-1].problem)
    return rows


def _sizes(gpus_per_node: int) -> Iterator[int]:
    gpus = gpus_per_node
    while gpus <= max(_MAX_GPUS, gpus_per_node):
        yield gpus
        gpus *= 2


def _range(
    plan: RunPlan, config: TrainConfig, speed: Gpu | Calibration, network: float
) -> tuple[float, float]:
    slow, fast = (
        step_time(plan, config, speed.changed(compute=share, link=link), network=network * link)
        for share, link in zip(_SHARES, _LINKS, strict=True)
    )
    return fast, slow


def describe_scale(
    rows: Sequence[Row],
    config: TrainConfig,
    *,
    machine: Machine,
    network: float,
    price: float | None,
) -> str:
    """Format the rows; `price` is of one GPU for one hour."""
    head = ["GPUs", "schedule", "peak", "step, s", "range, s", "tokens/s", "efficiency", "time"]
    head += ["GPU time"] + ["price"] * (price is not None)
    table, problems = [head], []
    for row in rows:
        if row.plan is None:
            table.append([f"{row.gpus:,}", *"-" * (len(head) - 1)])
            problems.append(f"{row.gpus:,} GPUs: {row.problem}")
            continue
        run = row.seconds * config.num_steps
        cells = [f"{row.gpus:,}", row.plan.schedule, format_bytes(peak(row.plan.terms)[1])]
        cells += [f"{row.seconds:.3g}", f"{row.fewest:.3g} to {row.most:.3g}"]
        cells += [f"{row.plan.batch.tokens / row.seconds:,.0f}", f"{_efficiency(row, rows):.0%}"]
        cells += [format_seconds(run), gpu_time(run * row.gpus)]
        table.append(cells + ([format_price(run * row.gpus, price)] if price is not None else []))
    note = (
        f"From {machine.origin(network)}. Range: {_SHARES[0]:g} to {_SHARES[1]:g} times the speed "
        f"of layers, {_LINKS[0]:g} to {_LINKS[1]:g} times the bandwidth.\n"
        f"{config.num_steps:,} steps of the same global batch in every row."
    )
    return "\n".join([format_columns(table), note, *problems])


def _efficiency(row: Row, rows: Sequence[Row]) -> float:
    """Return GPU-seconds of a step on the fewest GPUs that can run it / GPU-seconds of this row."""
    first = next(other for other in rows if other.plan)
    return first.seconds * first.gpus / (row.seconds * row.gpus)


def plot_scale(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draw tokens a second over GPUs with their range, and perfect scaling.

    Raises:
        UserError: matplotlib knows no such format, or the file cannot be written.
    """
    # Not pyplot, which would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    allowed = sorted(FigureCanvasAgg(figure).get_supported_filetypes())
    if path.suffix[1:] not in allowed:
        raise UserError(f"--plot {path}", allowed=f"a file that ends in {', '.join(allowed)}")
    planned = [(row, row.plan.batch.tokens) for row in rows if row.plan]
    gpus = [row.gpus for row, _ in planned]
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens / s")
    axes.set_xticks(gpus, [f"{count:,}" for count in gpus], minor=False)
    # A log axis of less than a decade would label its minor ticks too, between the numbers of GPUs.
    axes.minorticks_off()
    slow, fast = ([n / getattr(row, end) for row, n in planned] for end in ("most", "fewest"))
    axes.fill_between(gpus, slow, fast, alpha=0.25, label="range")
    speeds = [tokens / row.seconds for row, tokens in planned]
    axes.plot(gpus, speeds, marker="o", label="projection")
    ideal = [speeds[0] * count / gpus[0] for count in gpus]
    axes.plot(gpus, ideal, linestyle="--", color="grey", label="perfect")
    axes.set_title(title.replace("$", r"\$"))  # not the beginning of a formula
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])
