"""Exports and the tasks they are scored on."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from pipeline.config.border import build_config
from pipeline.config.model import RopeScaling
from pipeline.config.rules import UserPath, require, strict
from pipeline.config.text import Template

# `auto`: what is fastest on the machine at the exactness that scores need.
Precision = Literal["auto", "float32", "bfloat16"]


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedModel:
    """An export folder, the name it has in the report, and how its queries are worded."""

    name: str
    path: UserPath
    # Replaces the template that the export was trained with; a folder of others may have none.
    template: Template | None = None
    # `paper`: the sentences of arXiv 2505.15045, for comparison with its tables.
    instruction_set: Literal["diffembed", "paper"] = "diffembed"
    # Instructions by task or benchmark name for this model alone.
    instructions: dict[str, str] = dataclasses.field(default_factory=dict)
    # For texts longer than the export was trained on.
    rope_scaling: RopeScaling | None = None
    # Of weights and arithmetic.
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        # The name is a folder of the results and a key of report.json.
        require(
            _is_plain(self.name) and self.name not in _REPORT_KEYS,
            "models.name",
            self.name,
            f"letters, digits and . _ - only, and not {', '.join(_REPORT_KEYS)}",
        )


def _is_plain(name: str) -> bool:
    """Whether a name may be that of a folder on any file system."""
    return name.replace("-", "").replace("_", "").replace(".", "").isalnum()


_REPORT_KEYS = (
    "name", "task", "benchmark", "metric", "chance", "intervals", "by_split", "other_scores",
    "num_queries", "max_length", "difference", "ci_low", "ci_high", "significant", "published",
    "pairs", "replica", "split_differences",
)  # fmt: skip


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OwnTask:
    """A retrieval task of the user's own, scored by nDCG@10 like those of mteb.

    Args:
        name: its name in results and report; not that of a task of mteb.
        path: a folder with corpus, queries and qrels, as of BEIR or of the hub.
        split: which judgements are scored.
    """

    name: str
    path: UserPath
    split: str = "test"

    def __post_init__(self) -> None:
        require(_is_plain(self.name), "tasks.name", self.name, "letters, digits and . _ - only")


def _read_task(value: Any) -> Any:
    """Build an own task here: pydantic would report the faults of both kinds of tasks."""
    return build_config(OwnTask, value, origin="tasks") if isinstance(value, dict) else value


Task = Annotated[str | OwnTask, BeforeValidator(_read_task)]


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Exports to scores: `diffembed evaluate run CONFIG`."""

    output_dir: UserPath
    models: tuple[EvaluatedModel, ...]
    # Names of mteb's tasks and benchmarks, and own tasks as `{name: mine, path: FOLDER}`.
    tasks: tuple[Task, ...]
    snapshots: UserPath | None = None
    max_length: int = 4096
    max_tokens: int = 16384
    training_run: UserPath | None = None
    # Instructions by task or benchmark name; they replace those of
    # pipeline/evaluation/tasks/instructions.py.
    instructions: dict[str, str] = dataclasses.field(default_factory=dict)
    # Memory of one GPU, so that planning can refuse texts that would not fit it.
    gpu_memory_gib: float | None = None
    # Several maximum lengths by task or benchmark name; max_length holds for all others.
    lengths: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require(len(self.models) > 0, "models", "an empty list", "at least one model")
        names = [model.name for model in self.models]
        require(len(set(names)) == len(names), "models", names, "names that differ")
        for key, lengths in {"max_length": (self.max_length,), **self.lengths}.items():
            require(
                len(lengths) > 0 and min(lengths) >= 1 and len(set(lengths)) == len(lengths),
                key if key == "max_length" else f"lengths.{key}",
                lengths,
                "integers >= 1 (tokens), each once",
            )
            require(
                self.max_tokens >= max(lengths),
                "max_tokens",
                self.max_tokens,
                f"at least {max(lengths)}: one forward must hold the longest text",
            )
        require(len(self.tasks) > 0, "tasks", "an empty list", "at least one mteb task name")
        own = [task.name for task in self.tasks if isinstance(task, OwnTask)]
        mteb = [task for task in self.tasks if isinstance(task, str)]
        require(
            len({*own, *mteb}) == len(own) + len(set(mteb)),
            "tasks",
            own,
            "names of own tasks that differ from all others",
        )
