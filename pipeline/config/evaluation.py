"""Exports and the tasks they are scored on."""

from __future__ import annotations

import dataclasses
from typing import Literal

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
    # Instructions by task name for this model alone.
    instructions: dict[str, str] = dataclasses.field(default_factory=dict)
    # For texts longer than the export was trained on.
    rope_scaling: RopeScaling | None = None
    # Of weights and arithmetic.
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        # The name is a folder of the results and a key of report.json.
        plain = self.name.replace("-", "").replace("_", "").replace(".", "")
        require(
            plain.isalnum() and self.name not in _REPORT_KEYS,
            "models.name",
            self.name,
            f"letters, digits and . _ - only, and not {', '.join(_REPORT_KEYS)}",
        )


_REPORT_KEYS = (
    "name", "task", "benchmark", "metric", "chance", "intervals", "by_split", "other_scores",
    "num_queries", "max_length", "difference", "ci_low", "ci_high", "significant", "published",
    "pairs", "replica",
)  # fmt: skip


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Exports to scores: `diffembed evaluate run CONFIG`."""

    output_dir: UserPath
    models: tuple[EvaluatedModel, ...]
    tasks: tuple[str, ...]
    snapshots: UserPath | None = None
    max_length: int = 4096
    max_tokens: int = 16384
    training_run: UserPath | None = None
    # Instructions by task name; they replace those of pipeline/evaluation/tasks/instructions.py.
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
