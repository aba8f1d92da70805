"""The report's pictures: loss curve, scores with their intervals, scores by document length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


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


def plot_loss(path: Path, curve: Sequence[dict[str, float]]) -> Path:
    """Loss and learning rate by step."""
    figure = Figure(figsize=(6.5, 4.0), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in curve]
    axes.plot(steps, [line["loss"] for line in curve], color="tab:blue")
    axes.set_xlabel("step")
    axes.set_ylabel("loss", color="tab:blue")
    if all("lr" in line for line in curve):
        right = axes.twinx()
        right.plot(steps, [line["lr"] for line in curve], color="tab:gray", linewidth=1)
        right.set_ylabel("learning rate", color="tab:gray")
    return _save(figure, path)


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
