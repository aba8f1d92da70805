"""Configure evaluations, word probes, and the jobs of a Slurm chain."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from pipeline.config.data import Template
from pipeline.config.loading import build_config
from pipeline.config.model import RopeScaling
from pipeline.config.rules import UserPath, require, strict

# `auto`: the fastest on this machine that is exact enough for scores.
Precision = Literal["auto", "float32", "bfloat16"]


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedModel:
    """An export folder, its name in the report, and the wording of its queries."""

    name: str
    path: UserPath
    # Replaces the template of the export's training; folders by other packages may have none.
    template: Template | None = None
    # `paper`: the sentences of arXiv 2505.15045, for comparison with its tables.
    instruction_set: Literal["diffembed", "paper"] = "diffembed"
    # Instructions by task or benchmark name for this model alone.
    instructions: dict[str, str] = dataclasses.field(default_factory=dict)
    # For texts longer than in the export's training.
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
    """Return True for a name that a folder may have on any file system."""
    return name.replace("-", "").replace("_", "").replace(".", "").isalnum()


_REPORT_KEYS = (
    "name", "task", "benchmark", "metric", "chance", "intervals", "by_split", "other_scores",
    "num_queries", "max_length", "difference", "ci_low", "ci_high", "significant", "published",
    "pairs", "replica", "split_differences",
)  # fmt: skip


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OwnTask:
    """A retrieval task of the user, scored by nDCG@10 like mteb's retrieval tasks.

    Args:
        name: its name in results and report; no task of mteb may have it.
        path: a folder with corpus, queries and qrels, in the layout of BEIR or of the hub.
        split: the judgements to score.
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
    models: Annotated[tuple[EvaluatedModel, ...], Field(min_length=1, description="model")]
    # Names of mteb's tasks and benchmarks, and own tasks as `{name: mine, path: FOLDER}`.
    tasks: Annotated[tuple[Task, ...], Field(min_length=1, description="mteb task name")]
    snapshots: UserPath | None = None
    max_length: Annotated[int, Field(ge=1, description="tokens")] = 4096
    max_tokens: int = 16384
    training_run: UserPath | None = None
    # Instructions by task or benchmark name, in place of the built-in ones.
    instructions: dict[str, str] = dataclasses.field(default_factory=dict)
    # Memory of one GPU, so that planning can refuse texts that would not fit.
    gpu_memory_gib: float | None = None
    # Several maximum lengths by task or benchmark name; max_length holds for all others.
    lengths: dict[str, tuple[PositiveInt, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        require(len(set(names)) == len(names), "models", names, "names that differ")
        for name, lengths in self.lengths.items():
            require(
                len(lengths) > 0 and len(set(lengths)) == len(lengths),
                f"lengths.{name}",
                lengths,
                "integers >= 1 (tokens), each once",
            )
        # Texts are packed into forwards whole.
        longest = max([self.max_length, *itertools.chain(*self.lengths.values())])
        require(
            self.max_tokens >= longest,
            "max_tokens",
            self.max_tokens,
            f"at least {longest}: one forward must hold the longest text",
        )
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
        labels: classify a word by its own tokens, or by the token before each of them.
        merge_subwords: use the mean over a word's tokens, not only its first token.
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
    max_length: PositiveInt = 512
    max_tokens: PositiveInt = 16384
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    lr: PositiveFloat = 5e-4
    num_epochs: PositiveInt = 5
    batch_size: PositiveInt = 256
    seed: int = 42


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
        prepare: config of the shards; null: they exist already.
        train: config of the training run.
        deepspeed: its DeepSpeed JSON.
        exports: the exports of the run that the evaluation needs.
        evaluate: config of the evaluation; null: the chain ends with the exports.
        text_elements: array elements that share the texts of all tasks; null: one element for each
            model and task.
    """

    train: UserPath
    prepare: UserPath | None = None
    deepspeed: UserPath = Path("ds_configs/zero3.json")
    exports: tuple[ExportStep, ...] = (ExportStep(),)
    evaluate: UserPath | None = None
    text_elements: PositiveInt | None = None
