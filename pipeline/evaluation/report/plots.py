"""The report's pictures: loss curve, scores with their intervals, scores by document length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

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
