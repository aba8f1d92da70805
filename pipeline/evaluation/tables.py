"""Tables and confidence intervals of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult
from matplotlib.figure import Figure
from numpy.typing import NDArray

_RESAMPLES = 10_000
_SEED = 20240817
# Query scores by split and subset; a task's score is the mean of its splits' means.
Strata = Mapping[str, Mapping[str, float]]


def interval(scores: Strata) -> tuple[float, float]:
    """95 % percentile interval of a task's score, queries resampled within each split."""
    return _confidence_interval([np.array([s[q] for q in sorted(s)]) for s in scores.values()])


def paired_difference(after: Strata, before: Strata) -> tuple[float, float, float]:
    """Score of `after` minus score of `before`, with its 95 % interval.

    Both are resampled with the same queries, so what makes a query hard for both cancels.

    Raises:
        ValueError: the two were not scored on the same queries.
    """
    if {k: set(v) for k, v in after.items()} != {k: set(v) for k, v in before.items()}:
        raise ValueError("two results to compare hold different queries")
    strata = [
        np.array([after[name][query] - before[name][query] for query in sorted(after[name])])
        for name in sorted(after)
    ]
    low, high = _confidence_interval(strata)
    return float(np.mean([stratum.mean() for stratum in strata])), low, high


def _confidence_interval(strata: list[np.ndarray]) -> tuple[float, float]:
    generator = np.random.default_rng(_SEED)
    means_R = np.zeros(_RESAMPLES)
    for values in strata:
        # Multinomial counts are the resampled queries without their order: (R, Q) stays small.
        counts_RQ = generator.multinomial(
            len(values), np.full(len(values), 1 / len(values)), size=_RESAMPLES
        )
        means_R += counts_RQ @ values / len(values)
    low, high = np.quantile(means_R / len(strata), (0.025, 0.975))
    return float(low), float(high)


Table = tuple[list[str], list[list[str]]]


def score_rows(models: Sequence[str], tasks: Sequence[dict[str, Any]]) -> Table:
    """One row per task: every model's score, chance, and the difference with its interval."""
    header = ["task", "metric", *models, "chance"]
    if len(models) > 1:
        header += ["difference", "95 % interval"]
    rows = []
    for task in tasks:
        row = [task["name"], task["metric"], *(f"{task[model]:.4f}" for model in models)]
        row.append("" if task["chance"] is None else f"{task['chance']:.4f}")
        if len(models) > 1:
            row += [f"{task['difference']:+.4f}", _interval(task)]
        rows.append(row)
    return header, rows


def card_rows(model: str, tasks: Sequence[dict[str, Any]]) -> Table:
    """One row per task for the card of a single model."""
    rows = []
    for task in tasks:
        low, high = task["intervals"][model]
        cells = [f"{task[model]:.4f}", f"[{low:.4f}, {high:.4f}]", str(task["max_length"])]
        rows.append([task["name"], task["metric"], *cells])
    return ["task", "metric", "score", "95 % interval", "max length"], rows


def card_results(model: str, tasks: Sequence[dict[str, Any]]) -> list[EvalResult]:
    """Return the scores of a single model as metadata of its card."""
    return [
        EvalResult(
            task_type="Retrieval",
            dataset_type=task["task"],
            dataset_name=task["name"],
            metric_type=task["metric"],
            metric_value=task[model],
            metric_args={"max_length": task["max_length"]},
        )
        for task in tasks
    ]


def pair_rows(tasks: Sequence[dict[str, Any]]) -> Table | None:
    """One row per pair of models: their difference on every task; None for less than three."""
    if "pairs" not in tasks[0]:
        return None
    rows = []
    for number, pair in enumerate(tasks[0]["pairs"]):
        found = [task["pairs"][number] for task in tasks]
        cells = [f"{entry['difference']:+.4f} {_interval(entry)}" for entry in found]
        rows.append([f"{pair['model']} - {pair['minus']}", *cells])
    return ["models", *(task["name"] for task in tasks)], rows


def _interval(entry: dict[str, Any]) -> str:
    mark = "" if entry["significant"] else " ns"
    return f"[{entry['ci_low']:+.4f}, {entry['ci_high']:+.4f}]{mark}"


def with_splits(tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tasks that have several splits, one per document length."""
    return [task for task in tasks if len(next(iter(task["by_split"].values()))) > 1]


def split_rows(models: Sequence[str], tasks: Sequence[dict[str, Any]]) -> Table | None:
    """Scores by split for the tasks that have several, with the difference; None for no such task.

    A split is usually a document length.
    """
    header = ["task", "split", *models]
    if len(models) > 1:
        header += ["difference", "95 % interval"]
    rows = []
    for task in with_splits(tasks):
        for split in task["by_split"][models[0]]:
            scores = (f"{task['by_split'][model][split]:.4f}" for model in models)
            row = [task["name"], split, *scores]
            if len(models) > 1:
                found = task["split_differences"][split]
                row += [f"{found['difference']:+.4f}", _interval(found)]
            rows.append(row)
    return (header, rows) if rows else None


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a LaTeX tabular of the booktabs package."""
    lines = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in [header, *rows]]
    columns = "l" + "r" * (len(header) - 1)
    body = [lines[0], r"\midrule", *lines[1:]]
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]
    )


def _latex(cell: str) -> str:
    for symbol in "&%$#_{}":
        cell = cell.replace(symbol, "\\" + symbol)
    return cell


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column left, the others right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        for row in [header, rule, *rows]
    )


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as columns of spaces, for a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    )


# Further kinds of batches are drawn in gray, without a name.
_NAMED_KINDS = 10


def plot_scores(path: Path, models: Sequence[str], tasks: Sequence[dict[str, Any]]) -> Path:
    """Bars per task and model with 95 % intervals; a dash at chance level."""
    figure = Figure(figsize=(max(6.0, 1.6 * len(tasks)), 4.2), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(tasks))
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        scores = np.array([task[model] for task in tasks])
        bounds = np.array([task["intervals"][model] for task in tasks])
        # A percentile interval need not hold the score itself.
        reach = np.maximum([scores - bounds[:, 0], bounds[:, 1] - scores], 0)
        at = places + (number - (len(models) - 1) / 2) * width
        axes.bar(at, scores, width, yerr=reach, capsize=2, label=model)
    for place, task in zip(places, tasks, strict=True):
        if task["chance"] is not None:
            axes.hlines(task["chance"], place - 0.45, place + 0.45, "black", "dashed", linewidth=1)
    labels = [f"{task['name'].removesuffix('Retrieval')}\n{task['metric']}" for task in tasks]
    axes.set_xticks(places, labels, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("score (dashes: chance)")
    axes.legend()
    return _save(figure, path)


def plot_splits(path: Path, models: Sequence[str], tasks: Sequence[dict[str, Any]]) -> Path:
    """A panel per task: every model's score by split, that is by document length."""
    figure = Figure(figsize=(5.5 * len(tasks), 4.0), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for model in models:
            scores = task["by_split"][model]
            names = [split.removeprefix("test_") for split in scores]
            axes.plot(names, list(scores.values()), marker="o", markersize=3, label=model)
        axes.set_title(task["name"].removesuffix("Retrieval"), fontsize=10)
        axes.set_xlabel("split")
        axes.set_ylabel(task["metric"])
        axes.set_ylim(bottom=0)
        axes.tick_params(axis="x", rotation=45)
    panels[0].legend(fontsize=8)
    return _save(figure, path)


def plot_loss(path: Path, curve: Sequence[Mapping[str, Any]]) -> Path:
    """Loss by step, a line of running means for each kind of batch, and the learning rate."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (kind, lines) in enumerate(by_kind(curve).items()):
        steps = [line["step"] for line in lines]
        losses = np.array([line["loss"] for line in lines])
        color = f"C{number % 10}" if number < _NAMED_KINDS else "lightgray"
        axes.plot(steps, losses, ".", color=color, markersize=2, alpha=0.4)
        label = kind if number < _NAMED_KINDS else None
        axes.plot(steps, running_mean(losses), color=color, linewidth=1.5, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (dots: batches, lines: running means)")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)
    if all("lr" in line for line in curve):
        right = axes.twinx()
        steps = [line["step"] for line in curve]
        right.plot(steps, [line["lr"] for line in curve], color="black", linewidth=0.7, alpha=0.5)
        right.set_ylabel("learning rate")
    return _save(figure, path)


def by_kind(curve: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Lines of a curve by the kind of their batch, the most frequent kind first."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for line in curve:
        kinds.setdefault(line.get("kind", ""), []).append(line)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) means over a twentieth of the values around each one, fewer at the ends."""
    reach = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - reach, 0)
    high = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    means: NDArray[np.float64] = (sums[high] - sums[low]) / (high - low)
    return means


def plot_steps(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Scores of checkpoints against their step, with 95 % intervals; one line per task."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for task, points in curves.items():
        steps = [point["step"] for point in points]
        (line,) = axes.plot(steps, [point["score"] for point in points], marker="o", label=task)
        low, high = ([point[key] for point in points] for key in ("ci_low", "ci_high"))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("score")
    axes.legend(fontsize=7)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
