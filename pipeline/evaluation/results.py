"""Read results, check that they are current, and merge them.

One process does this after the array: elements that wrote to one cache at the same time lost lines
of `run_settings.jsonl`.

What made them takes as much room as the model, for each step: it goes when the scores are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from pipeline.checkpoint_folder import checkpoint_name, checkpoint_step
from pipeline.config import EvaluateConfig, load_config
from pipeline.errors import UserError
from pipeline.evaluation.tables import Table, interval
from pipeline.evaluation.tasks import Element, instruction_for, list_elements
from pipeline.files import check_kind, fingerprint_files, hash_files, read_json, unseal, write_text
from pipeline.model.export_folder import export_fingerprint, model_settings
from pipeline.run_folder import RunDir


def inputs_of(config: EvaluateConfig, element: Element, dataset: str | None) -> dict[str, Any]:
    """Everything an element's scores depend on, by name, ready for JSON.

    Data that no folder of ours holds are those of the revision that mteb pins.

    Args:
        dataset: the task's data set, by its name on the hub; ignored for an own task.

    Raises:
        UserError: there is no export.
    """
    return {
        "export": export_fingerprint(element.model.path),
        **model_settings(element.model),
        "instruction": instruction_for(element.task, element.model, config),
        "max_length": element.max_length,
        "dataset": f"own, split {element.own.split}" if element.own else dataset,
        "data": _data_fingerprint(_data_folder(config, element, dataset)),
    }


def changed_inputs(
    config: EvaluateConfig, element: Element, result: dict[str, Any]
) -> tuple[str, ...]:
    """Names of the inputs that are not any more what a result was computed from; cheap.

    Data that are gone have not changed.

    Raises:
        UserError: there is no export.
    """
    recorded = result.get("inputs", {})
    # By its recorded name: which data set a task has, only mteb knows, and it is slow to import.
    dataset = recorded.get("dataset")
    present = inputs_of(config, element, dataset)
    folder = _data_folder(config, element, dataset)
    if folder and not folder.is_dir():
        del present["data"]
    return tuple(name for name in present if (name, present[name]) not in recorded.items())


class Result(TypedDict, total=False):
    """What the report reads of `result.json`, which holds more."""

    model: str
    task: str
    benchmark: str
    metric: str
    score: float
    chance: float | None
    by_split: dict[str, float]
    other_scores: dict[str, float]
    per_query: dict[str, dict[str, float]]
    worst_queries: dict[str, list[dict[str, Any]]]
    max_length: int
    precision: str
    revision: str
    dataset_revision: str
    query_template: str
    inputs: dict[str, Any]
    checkpoint: str | None


def read_result(element: Element) -> dict[str, Any] | None:
    """What a finished element wrote, or None.

    Raises:
        UserError: the file is damaged.
    """
    return read_result_file(element.result_path) if element.result_path.exists() else None


def read_result_file(path: Path) -> dict[str, Any]:
    """What an element wrote to its `result.json`.

    Raises:
        UserError: the file is damaged.
    """
    fix = f"delete {path.parent} and evaluate again: only what is missing is done"
    tree: dict[str, Any] = unseal(read_json(path, fix=fix), path, fix=fix)
    check_kind(tree, Result, where=str(path), fix=fix)
    return tree


def results_digest(config: EvaluateConfig) -> str:
    """Hash of all finished elements' results: tells a report of these from an older one."""
    digest = hashlib.sha256()
    for element in list_elements(config):
        if element.result_path.is_file():
            digest.update(f"{element.model.name}\0{element.task}\0{element.max_length}\0".encode())
            digest.update(hashlib.sha256(element.result_path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _data_folder(config: EvaluateConfig, element: Element, dataset: str | None) -> Path | None:
    """Where a task's data are on this machine; None where mteb keeps them."""
    if element.own:
        return element.own.path
    return config.snapshots / dataset if config.snapshots and dataset else None


def _data_fingerprint(folder: Path | None) -> str | None:
    if folder is None:
        return None
    # Hidden is what downloads note for themselves.
    return fingerprint_files(
        folder,
        (
            path
            for path in folder.rglob("*")
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        ),
    )


_SETTINGS = "run_settings.jsonl"


def merge_results(config: EvaluateConfig) -> Path:
    """Write `output_dir/mteb/results/MODEL/REVISION/TASK.json` for every finished element.

    Returns:
        The folder that `mteb.ResultCache` takes.
    """
    target = config.output_dir / "mteb"
    settings: dict[Path, list[str]] = {}
    for element in list_elements(config):
        source, result = element.folder / "mteb", read_result(element)
        if result is None:
            continue
        _check_files(source, result.get("mteb_files"))
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            place = target / path.relative_to(source)
            if path.name == _SETTINGS:
                settings.setdefault(place, []).extend(path.read_text().splitlines())
            else:
                write_text(place, path.read_text())
    for place, lines in settings.items():
        kept = sorted(set(lines), key=lambda line: str(json.loads(line)["task"]))
        write_text(place, "\n".join(kept) + "\n")
    return target


def _check_files(folder: Path, recorded: dict[str, str] | None) -> None:
    """Refuse mteb's files where they are not what the element wrote.

    Args:
        folder: the element's.
        recorded: hashes by path; None for a result from before they were noted.
    """
    found = hash_files(folder)
    for name in sorted({*found, *recorded} if recorded is not None else ()):
        if recorded is not None and found.get(name) != recorded.get(name):
            raise UserError(
                f"{folder / name}: damaged (not the file that was written with result.json)",
                fix=f"delete {folder.parent} and evaluate again: only what is missing is done",
            )


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
