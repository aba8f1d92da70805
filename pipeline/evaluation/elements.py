"""The array of an evaluation: one (model, task, length) per element, each with its own folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.config import EvaluateConfig, EvaluatedModel, as_tree
from pipeline.errors import UserError
from pipeline.evaluation.benchmarks import benchmark_of, expand
from pipeline.evaluation.instructions import instruction_for

# The files of an export that decide its vectors.
_EXPORT_SUFFIXES = {".safetensors", ".json", ".txt", ".model"}
# Keys of an evaluated model that do not.
_NOT_THE_MODEL = {"name", "path", "instruction_set", "instructions"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Element:
    """One element of the job array."""

    index: int
    model: EvaluatedModel
    task: str
    max_length: int
    folder: Path

    @property
    def result_path(self) -> Path:
        """Written last and by rename: its presence means that the element is finished."""
        return self.folder / "result.json"


def lengths_of(config: EvaluateConfig, task: str) -> tuple[int, ...]:
    """Maximum lengths a task is run at: its own, else its benchmark's, else the config's."""
    for name in (task, benchmark_of(task)):
        if name in config.lengths:
            return config.lengths[name]
    return (config.max_length,)


def list_elements(config: EvaluateConfig) -> tuple[Element, ...]:
    """All elements in array order: model by model, task by task, length by length."""
    triples = [
        (model, task, length)
        for model in config.models
        for task in expand(config.tasks)
        for length in lengths_of(config, task)
    ]
    return tuple(
        Element(
            index=index,
            model=model,
            task=task,
            max_length=length,
            folder=config.output_dir / "results" / model.name / task / str(length),
        )
        for index, (model, task, length) in enumerate(triples)
    )


def element_at(config: EvaluateConfig, index: int) -> Element:
    """The element an array job was started for.

    Raises:
        UserError: no element has that index; the array and the config do not belong together.
    """
    elements = list_elements(config)
    if not 0 <= index < len(elements):
        raise UserError(
            f"evaluation element {index}",
            allowed=f"0 to {len(elements) - 1} ({len(config.models)} models x "
            f"{len(elements) // len(config.models)} tasks and lengths)",
            fix="start the array with the length that `diffembed evaluate count` prints",
        )
    return elements[index]


def export_fingerprint(path: Path) -> str:
    """A short hash that changes whenever an export is written anew.

    Sizes and times of writing stand for the content: reading 15 GB per element would cost minutes.
    The model card is left out, because the report's scores may be added to it.

    Raises:
        UserError: the folder is missing or holds no weights.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _EXPORT_SUFFIXES)
    if not any(p.suffix == ".safetensors" for p in files):
        raise UserError(
            f"{path}: no export there",
            allowed="a folder with *.safetensors",
            fix="run `diffembed export`, or correct models.path",
        )
    lines = [f"{p.relative_to(path)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def model_fingerprint(model: EvaluatedModel) -> str:
    """A short hash of the export and of what the config changes about it.

    Instructions are no part of it: vectors are stored by instruction already.
    """
    export = export_fingerprint(model.path)
    tree, plain = (
        {key: value for key, value in as_tree(each).items() if key not in _NOT_THE_MODEL}
        for each in (model, EvaluatedModel(name=model.name, path=model.path))
    )
    if tree == plain:
        return export
    return hashlib.sha256(json.dumps([export, tree], sort_keys=True).encode()).hexdigest()[:12]


def element_key(config: EvaluateConfig, element: Element) -> str:
    """A hash of everything an element's scores depend on.

    A finished element with another key is stale and runs again.
    """
    inputs = {
        "model": model_fingerprint(element.model),
        "instruction": instruction_for(element.task, element.model, config),
        "max_length": element.max_length,
        "snapshots": str(config.snapshots),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def read_result(element: Element) -> dict[str, Any] | None:
    """What a finished element wrote, or None."""
    if not element.result_path.is_file():
        return None
    result: dict[str, Any] = json.loads(element.result_path.read_text())
    return result
