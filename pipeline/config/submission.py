"""The parts of a chain of Slurm jobs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.config.rules import UserPath, require, strict


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportStep:
    """One export of the trained run: `diffembed export --checkpoint … --output …`.

    Args:
        checkpoint: `latest`, a name like `step-000100`, or `init` (the untrained model).
        output: the export's folder; null: the run's own.
    """

    checkpoint: str = "latest"
    output: UserPath | None = None


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChainConfig:
    """One experiment from raw data to its report: `diffembed submit all CONFIG`.

    Args:
        prepare: config of the shards; null: they are there.
        train: config of the training run.
        deepspeed: its DeepSpeed JSON.
        exports: what is made of the run for the evaluation.
        evaluate: config of the evaluation; null: the chain ends with the exports.
        text_elements: array elements that share the texts of all tasks; null: one element for each
            model and task.
    """

    train: UserPath
    prepare: UserPath | None = None
    deepspeed: UserPath = Path("ds_configs/zero3.json")
    exports: tuple[ExportStep, ...] = (ExportStep(),)
    evaluate: UserPath | None = None
    text_elements: int | None = None

    def __post_init__(self) -> None:
        elements = self.text_elements
        require(
            elements is None or elements >= 1, "text_elements", elements, "an integer >= 1, or null"
        )
