"""What a finished element wrote, and whether it is still what its inputs would give."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from pipeline.config import EvaluateConfig
from pipeline.evaluation.models.fingerprints import (
    export_fingerprint,
    fingerprint,
    model_settings,
)
from pipeline.evaluation.tasks.elements import Element, list_elements
from pipeline.evaluation.tasks.instructions import instruction_for
from pipeline.files import check_kind, read_json, unseal


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
    return fingerprint(
        folder,
        (
            path
            for path in folder.rglob("*")
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        ),
    )
