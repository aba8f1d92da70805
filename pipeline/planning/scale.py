"""Project one run on more and more nodes: `diffembed plan scale`.

The global batch stays, so that every row trains the same model; the time is strong scaling. The
range of a row shows how much the projection depends on what is not known before a first run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.files import atomic_path
from pipeline.planning import RunPlan, plan_run, seconds_of
from pipeline.planning.calibration import Calibration
from pipeline.planning.describe import (
    format_bytes,
    format_columns,
    format_price,
    format_seconds,
    gpu_time,
)
from pipeline.planning.hardware import Machine
from pipeline.planning.memory import peak
from pipeline.planning.speed import Gpu

_MAX_GPUS = 1024
# Shares of the speed of layers, and of the links, that bound the range.
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
        seconds = _total(plan, config, speed, network)
        rows.append(Row(gpus=gpus, plan=plan, seconds=seconds, fewest=fewest, most=most))
    if not any(row.plan for row in rows):
        raise UserError(rows[-1].problem)
    return rows


def _sizes(gpus_per_node: int) -> Iterator[int]:
    gpus = gpus_per_node
    while gpus <= max(_MAX_GPUS, gpus_per_node):
        yield gpus
        gpus *= 2


def _total(plan: RunPlan, config: TrainConfig, speed: Gpu | Calibration, network: float) -> float:
    return sum(part.seconds for part in seconds_of(plan, config, speed, network=network))


def _range(
    plan: RunPlan, config: TrainConfig, speed: Gpu | Calibration, network: float
) -> tuple[float, float]:
    slow, fast = (
        _total(plan, config, speed.changed(compute=share, link=link), network * link)
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
    """Return the GPU-seconds of a step on the fewest GPUs that can run it, over this row's."""
    first = next(other for other in rows if other.plan)
    return first.seconds * first.gpus / (row.seconds * row.gpus)


def plot_scale(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draw tokens a second over GPUs with their range, and perfect scaling.

    Raises:
        UserError: matplotlib knows no such format, or the file cannot be written.
    """
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
    axes.minorticks_off()
    slow, fast = ([n / getattr(row, end) for row, n in planned] for end in ("most", "fewest"))
    axes.fill_between(gpus, slow, fast, alpha=0.25, label="range")
    speeds = [tokens / row.seconds for row, tokens in planned]
    axes.plot(gpus, speeds, marker="o", label="projection")
    ideal = [speeds[0] * count / gpus[0] for count in gpus]
    axes.plot(gpus, ideal, linestyle="--", color="grey", label="perfect")
    axes.set_title(title)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])
