"""The array of an evaluation: one (model, task, length) per element, each with its own folder."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path

from pipeline.config import EvaluateConfig, EvaluatedModel, OwnTask
from pipeline.errors import UserError
from pipeline.evaluation.tasks.benchmarks import BENCHMARKS, benchmark_of, expand


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Element:
    """One element of the job array; `own` is its task's folder where the task is not mteb's."""

    index: int
    model: EvaluatedModel
    task: str
    max_length: int
    folder: Path
    own: OwnTask | None = None

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


def tasks_of(config: EvaluateConfig) -> dict[str, OwnTask | None]:
    """All tasks by name in order, benchmarks replaced by their tasks; None for those of mteb.

    Raises:
        UserError: an own task has the name of one of the benchmarks' tasks.
    """
    tasks: dict[str, OwnTask | None] = {}
    for task in config.tasks:
        if isinstance(task, str):
            tasks.update(dict.fromkeys(expand([task])))
        elif task.name in BENCHMARKS or benchmark_of(task.name) != "other":
            raise UserError(f"tasks: {task.name!r} is a name of mteb", fix="give it another name")
        else:
            tasks[task.name] = task
    return tasks


def check_names(config: EvaluateConfig) -> None:
    """Refuse lengths and instructions of tasks that are not evaluated.

    Raises:
        UserError: a key is no such task or benchmark, most likely because it is misspelt.
    """
    tasks = tasks_of(config)
    benchmarks = [name for name in BENCHMARKS if any(benchmark_of(task) == name for task in tasks)]
    allowed = [*tasks, *benchmarks]
    _refuse_unknown("lengths", config.lengths, allowed)
    _refuse_unknown("instructions", config.instructions, allowed)
    for number, model in enumerate(config.models):
        _refuse_unknown(f"models.{number}.instructions", model.instructions, allowed)


def _refuse_unknown(key: str, names: Iterable[str], allowed: list[str]) -> None:
    for name in names:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            raise UserError(
                f"{key}: {name!r} is not evaluated",
                allowed=", ".join(allowed),
                fix=f"write {near[0]}" if near else f"take it out, or add {name} to tasks",
            )


def list_elements(config: EvaluateConfig) -> tuple[Element, ...]:
    """All elements in array order: model by model, task by task, length by length.

    Raises:
        UserError: lengths or instructions are given for a task that is not evaluated.
    """
    check_names(config)
    tasks = tasks_of(config)
    triples = [
        (model, task, length)
        for model in config.models
        for task in tasks
        for length in lengths_of(config, task)
    ]
    return tuple(
        Element(
            index=index,
            model=model,
            task=task,
            max_length=length,
            folder=config.output_dir / "results" / model.name / task / str(length),
            own=tasks[task],
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
