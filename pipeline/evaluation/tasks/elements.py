"""The array of an evaluation: one (model, task, length) per element, each with its own folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.config import EvaluateConfig, EvaluatedModel
from pipeline.errors import UserError
from pipeline.evaluation.tasks.benchmarks import benchmark_of, expand


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
