"""Configure evaluations, word probes, and the jobs of a Slurm chain."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from pipeline.config.data import Template
from pipeline.config.loading import build_config
from pipeline.config.model import RopeScaling
from pipeline.config.rules import UserPath, require, strict

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
    # pipeline/evaluation/tasks.py.
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


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """A linear classifier of words on a frozen model: `diffembed probe CONFIG`.

    The word task of LLM2Vec (arXiv 2404.05961, section 4.1).

    Args:
        model: an export; `diffembed export --checkpoint init` makes one of an untrained model.
        train, test: words and tags, in CoNLL-2003's columns (word, pos, chunk, ner) or as JSON
            lines with `tokens` and `pos_tags`, `chunk_tags` or `ner_tags`.
        labels: whether a word is classified by its own tokens, or by the token before each of them.
        merge_subwords: take the mean over a word's tokens, not its first token alone.
        max_length: tokens after which a sentence is cut.
        max_tokens: packed tokens of one forward.
        batch_size: words per update of the classifier.
    """

    output_dir: UserPath
    model: UserPath
    train: UserPath
    test: UserPath
    task: Literal["pos", "chunk", "ner"]
    labels: Literal["same_token", "next_token"] = "same_token"
    merge_subwords: bool = True
    max_length: int = 512
    max_tokens: int = 16384
    dropout: float = 0.1
    lr: float = 5e-4
    num_epochs: int = 5
    batch_size: int = 256
    seed: int = 42

    def __post_init__(self) -> None:
        for key in ("max_length", "max_tokens", "num_epochs", "batch_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "an integer >= 1")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "0 <= dropout < 1")
        require(self.lr > 0, "lr", self.lr, "a number > 0")


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
