"""Scores of a run's checkpoints, made while it was training, against their step.

What made them takes as much room as the model, for each step: it goes when the scores are there.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import EvaluateConfig, load_config
from pipeline.evaluation.report.bootstrap import interval
from pipeline.evaluation.report.tables import Table
from pipeline.evaluation.score.results import read_result, read_result_file
from pipeline.evaluation.tasks.elements import list_elements
from pipeline.run_dir import RunDir, checkpoint_name, checkpoint_step

# Task, with @LENGTH where it ran at several -> one point per scored step, ascending.
Curves = dict[str, list[dict[str, Any]]]


def read_curves(training_run: Path | None) -> Curves:
    """Every finished score of every checkpoint of a run; empty without a run or a score.

    Elements may be running meanwhile: what they have not finished is not there yet. Nor are scores
    of checkpoints that the run was taken back from.
    """
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    if training_run is not None:
        evaluations = RunDir(training_run).evaluations
        for path in sorted(RunDir(evaluations).results.glob("*/*/*/result.json")):
            name, task, length, _ = path.parts[-4:]
            step, result = checkpoint_step(name), read_result_file(path)
            if step is not None and _is_of(evaluations / name, result):
                found.setdefault((task, int(length)), []).append(_point(step, result))
    lengths: dict[str, int] = {}
    for task, _ in found:
        lengths[task] = lengths.get(task, 0) + 1
    return {
        task if lengths[task] == 1 else f"{task}@{length}": sorted(
            points, key=lambda point: int(point["step"])
        )
        for (task, length), points in sorted(found.items())
    }


def _is_of(folder: Path, result: Mapping[str, Any]) -> bool:
    """Whether a result was made of the checkpoint that this folder of a step is for."""
    own = None
    # Training may take it away at any moment.
    with contextlib.suppress(FileNotFoundError):
        own = RunDir(folder).checkpoint_digest.read_text()
    return bool(result.get("checkpoint") == own)


def _point(step: int, result: Mapping[str, Any]) -> dict[str, Any]:
    low, high = interval(result["per_query"])
    return {
        "step": step,
        "score": result["score"],
        "ci_low": low,
        "ci_high": high,
        "metric": result["metric"],
        "revision": result["revision"],
    }


def step_rows(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """One row per task, one column per step; empty where a step has no score yet."""
    steps = sorted({point["step"] for points in curves.values() for point in points})
    rows = []
    for task, points in curves.items():
        scores = {point["step"]: f"{point['score']:.4f}" for point in points}
        rows.append([task, points[0]["metric"], *(scores.get(step, "") for step in steps)])
    return ["task", "metric", *(f"step {step}" for step in steps)], rows


def give_back(evaluations: Path) -> None:
    """Delete exports and vectors of steps that are scored, but for the newest and the best.

    The best has the highest mean of its tasks' scores, among steps with as many as the newest. What
    an export was made from goes for all of them.

    Args:
        evaluations: the folder of a run that holds `step-000100` and so on.
    """
    scores: dict[int, list[float]] = {}
    for path in evaluations.glob("step-*/evaluate.yaml"):
        step = checkpoint_step(path.parent.name)
        config = load_config(EvaluateConfig, path)
        results = [read_result(element) for element in list_elements(config)]
        scored = [float(r["score"]) for r in results if r is not None and _is_of(path.parent, r)]
        if step is not None and len(scored) == len(results):
            scores[step] = scored
    newest = max(scores, default=0)
    best = max(
        (step for step in scores if len(scores[step]) == len(scores[newest])),
        key=lambda step: (sum(scores[step]), step),
        default=0,
    )
    for step in scores:
        folder = evaluations / checkpoint_name(step)
        _delete(RunDir(folder).checkpoints)
        if step not in (newest, best):
            _delete(RunDir(folder).export)
            for vectors in (evaluations / "store").glob(f"{folder.name}-*"):
                _delete(vectors)


def _delete(folder: Path) -> None:
    # Renamed first, so that a kill in the middle leaves no half export under its name.
    doomed = folder.with_name(f".{folder.name}.deleted")
    if folder.exists():
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
