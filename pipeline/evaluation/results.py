"""Read, check and merge the results of elements, and delete the exports that they no longer need.

    results/MODEL/TASK/LENGTH/result.json   a `Result`: written once by the element, sealed
    results/MODEL/TASK/LENGTH/mteb/         mteb's own files of the element
    mteb/results/MODEL/REVISION/TASK.json   merged from all elements, for the leaderboard

One process merges after the array has ended: elements that share a cache of mteb lose lines of
`run_settings.jsonl`. A result counts as long as everything that it was computed from is unchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from pipeline.config import EvaluateConfig, load_config
from pipeline.errors import UserError
from pipeline.evaluation.tables import interval
from pipeline.evaluation.tasks import Element, instruction_for, list_elements
from pipeline.files import check_kind, fingerprint_files, hash_files, read_json, unseal, write_text
from pipeline.model.export_folder import export_fingerprint, model_settings
from pipeline.run_folder import RunDir, checkpoint_name, checkpoint_step

# 1: no `version` key. 2: the same content with it.
RESULT_VERSION = 2


class Result(TypedDict, total=False):
    """The content of `result.json`; every key is written, and older files may lack some.

    Attributes:
        version: see `RESULT_VERSION`.
        by_split: the main metric by split.
        other_scores: metrics in addition to the main one.
        per_query: query scores by `subset/split`.
        worst_queries: examples for the report, by `subset/split`.
        dataset_revision: `local` for data that were not fetched by `prefetch`.
        inputs: see `inputs_of`.
        checkpoint: identity of the checkpoint that the export was made from.
        rope_scaling: only for models with rescaled positions.
        mteb_files: SHA-256 of the element's files of mteb by path.
    """

    version: int
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
    instruction: str
    query_template: str
    document_template: str
    max_length: int
    precision: str
    revision: str
    dataset_revision: str
    mteb_version: str | None
    inputs: dict[str, Any]
    checkpoint: str | None
    seconds: float
    rope_scaling: str
    mteb_files: dict[str, str]


def read_result(element: Element) -> Result | None:
    """Return the result of an element, or None if it has not finished.

    Raises:
        UserError: the file is damaged.
    """
    return read_result_file(element.result_path) if element.result_path.exists() else None


def read_result_file(path: Path) -> Result:
    """Read a `result.json`.

    Raises:
        UserError: the file is damaged, or a newer version of this package wrote it.
    """
    fix = f"delete {path.parent} and evaluate again: only missing results are computed"
    # Sealed: a changed digit must not become a published score.
    tree = unseal(read_json(path, fix=fix), path, fix=fix)
    check_kind(tree, Result, where=str(path), fix=fix)
    result: Result = tree
    # Files without a version are from before it was written.
    result.setdefault("version", 1)
    if result["version"] > RESULT_VERSION:
        raise UserError(
            f"{path}: version {result['version']}", allowed=f"up to {RESULT_VERSION}", fix=fix
        )
    return result


def results_digest(config: EvaluateConfig) -> str:
    """Hash the results of all finished elements: a report of other results has another hash."""
    digest = hashlib.sha256()
    for element in list_elements(config):
        if element.result_path.is_file():
            # The element counts too: swapped results are other results.
            digest.update(f"{element.model.name}\0{element.task}\0{element.max_length}\0".encode())
            digest.update(hashlib.sha256(element.result_path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def inputs_of(config: EvaluateConfig, element: Element, dataset: str | None) -> dict[str, Any]:
    """Return everything that an element's scores depend on, by name, ready for JSON.

    Data that are not in a local folder are identified only by their name: mteb pins the revision.

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


def changed_inputs(config: EvaluateConfig, element: Element, result: Result) -> tuple[str, ...]:
    """Return the names of the inputs that have changed since a result was computed; cheap.

    Data that have been deleted count as unchanged.

    Raises:
        UserError: there is no export.
    """
    recorded = result.get("inputs", {})
    # By its recorded name: only mteb knows the data set of a task, and it is slow to import.
    dataset = recorded.get("dataset")
    present = inputs_of(config, element, dataset)
    folder = _data_folder(config, element, dataset)
    if folder and not folder.is_dir():
        del present["data"]
    return tuple(name for name in present if (name, present[name]) not in recorded.items())


def _data_folder(config: EvaluateConfig, element: Element, dataset: str | None) -> Path | None:
    """Return the folder of a task's data; None where mteb keeps them."""
    if element.own:
        return element.own.path
    return config.snapshots / dataset if config.snapshots and dataset else None


def _data_fingerprint(folder: Path | None) -> str | None:
    if folder is None:
        return None
    # Downloads keep their own notes in hidden files.
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
        # mteb's own files, and our result, which has their hashes.
        source, result = element.folder / "mteb", read_result(element)
        if result is None:
            continue
        _check_files(source, result.get("mteb_files"))
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            merged = target / path.relative_to(source)
            if path.name == _SETTINGS:
                # Elements with the same model and revision each wrote lines of one file.
                settings.setdefault(merged, []).extend(path.read_text().splitlines())
            else:
                write_text(merged, path.read_text())
    for merged, lines in settings.items():
        # A second merge must not double lines.
        kept = sorted(set(lines), key=lambda line: str(json.loads(line)["task"]))
        write_text(merged, "\n".join(kept) + "\n")
    return target


def _check_files(folder: Path, recorded: dict[str, str] | None) -> None:
    """Refuse files of mteb that have changed since the element wrote them.

    Args:
        folder: `mteb` in the element's folder.
        recorded: hashes by path; None for a result of a version that recorded none.
    """
    found = hash_files(folder)
    for name in sorted({*found, *recorded} if recorded is not None else ()):
        if recorded is not None and found.get(name) != recorded.get(name):
            raise UserError(
                f"{folder / name}: damaged (not the file that was written with result.json)",
                fix=f"delete {folder.parent} and evaluate again: only missing results are computed",
            )


# Task, with @LENGTH where it ran at several -> one point per scored step, ascending.
Curves = dict[str, list[dict[str, Any]]]


def read_curves(training_run: Path | None) -> Curves:
    """Read every finished score of every checkpoint of a run; empty without a run or a score.

    Elements may be running meanwhile, so that scores may be missing. Scores of checkpoints from
    before a rewind are ignored.
    """
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    if training_run is not None:
        evaluations = RunDir(training_run).evaluations
        for path in sorted(RunDir(evaluations).results.glob("*/*/*/result.json")):
            name, task, length, _ = path.parts[-4:]
            # Models of other names were scored by hand.
            step, result = checkpoint_step(name), read_result_file(path)
            if step is not None and _belongs_to(evaluations / name, result):
                found.setdefault((task, int(length)), []).append(_point(step, result))
    # A task's name needs a length only if it ran at several.
    lengths = Counter(task for task, _ in found)
    return {
        task if lengths[task] == 1 else f"{task}@{length}": sorted(
            points, key=lambda point: int(point["step"])
        )
        for (task, length), points in sorted(found.items())
    }


def _belongs_to(folder: Path, result: Result) -> bool:
    """Return True if a result was computed from the checkpoint that a step's folder is for."""
    digest = None
    # Training may delete it at any moment.
    with contextlib.suppress(FileNotFoundError):
        digest = RunDir(folder).checkpoint_digest.read_text()
    return result.get("checkpoint") == digest


def _point(step: int, result: Result) -> dict[str, Any]:
    low, high = interval(result["per_query"])
    return {
        "step": step,
        "score": result["score"],
        "ci_low": low,
        "ci_high": high,
        "metric": result["metric"],
        "revision": result["revision"],
    }


def delete_scored_exports(evaluations: Path) -> None:
    """Delete exports and vectors of scored steps, except the newest and the best.

    Each export is as large as the model. The best has the highest mean of its tasks' scores, among
    steps with as many tasks as the newest. The links to a step's checkpoint are deleted for all of
    them.

    Args:
        evaluations: the folder of a run that holds `step-000100` and so on.
    """
    scores: dict[int, list[float]] = {}
    for path in evaluations.glob("step-*/evaluate.yaml"):
        step = checkpoint_step(path.parent.name)
        config = load_config(EvaluateConfig, path)
        results = [read_result(element) for element in list_elements(config)]
        scored = [r["score"] for r in results if r is not None and _belongs_to(path.parent, r)]
        if step is not None and len(scored) == len(results):
            scores[step] = scored
    # Only steps with a score for every task.
    newest = max(scores, default=0)
    # Means over other tasks are not comparable: only steps with as many as the newest count.
    best = max(
        (step for step in scores if len(scores[step]) == len(scores[newest])),
        key=lambda step: (sum(scores[step]), step),
        default=0,
    )
    # Only steps that are scored as a whole: an element of another step may still need its export.
    for step in scores:
        folder = evaluations / checkpoint_name(step)
        _delete(RunDir(folder).checkpoints)
        if step not in (newest, best):
            _delete(RunDir(folder).export)
            for vectors in (evaluations / "store").glob(f"{folder.name}-*"):
                _delete(vectors)


def _delete(folder: Path) -> None:
    # Renamed first: a kill in the middle must not leave half an export under its name.
    doomed = folder.with_name(f".{folder.name}.deleted")
    if folder.exists():
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
