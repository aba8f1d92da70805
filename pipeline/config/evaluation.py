"""Configure evaluations, word probes, and the jobs of a Slurm chain."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.config.data import Template
from pipeline.config.loading import UserPath, build_config, require, strict
from pipeline.config.model import RopeScaling

# `auto`: the fastest on this machine that is exact enough for scores.
Precision = Literal["auto", "float32", "bfloat16"]


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedModel:
    """An export folder, its name in the report, and the wording of its queries."""

    name: str
    """The model's name in results and report: letters, digits and . _ - only."""
    path: UserPath
    """An export, or any sentence-transformers folder."""
    template: Template | None = None
    """Replaces the template of the export's training; folders by other packages may have none."""
    instruction_set: Literal["diffembed", "paper"] = "diffembed"
    """`paper`: the sentences of arXiv 2505.15045, for comparison with its tables."""
    instructions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Instructions by task or benchmark name for this model alone."""
    rope_scaling: RopeScaling | None = None
    """For texts longer than in the export's training."""
    precision: Precision = "auto"
    """Of weights and arithmetic."""

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
    """A retrieval task of the user, scored by nDCG@10 like mteb's retrieval tasks."""

    name: str
    """Its name in results and report; no task of mteb may have it."""
    path: UserPath
    """A folder with corpus, queries and qrels, in the layout of BEIR or of the hub."""
    split: str = "test"
    """The judgements to score."""

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
    """The folder of results, stored vectors and report."""
    models: Annotated[tuple[EvaluatedModel, ...], Field(min_length=1, description="model")]
    """The models to score."""
    tasks: Annotated[tuple[Task, ...], Field(min_length=1, description="mteb task name")]
    """Names of mteb's tasks and benchmarks, and own tasks as `{name: mine, path: FOLDER}`."""
    snapshots: UserPath | None = None
    """The folder of the tasks' data, filled by `diffembed evaluate prefetch`; null: the cache of
    the hub.
    """
    max_length: Annotated[int, Field(ge=1, description="tokens")] = 4096
    """Longer texts are cut."""
    max_tokens: PositiveInt = 16384
    """Packed tokens of one forward; at least the longest text."""
    training_run: UserPath | None = None
    """A training run's folder, for the loss plot of the report."""
    instructions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Instructions by task or benchmark name, in place of the built-in ones."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of one GPU, so that planning can refuse texts that would not fit."""
    lengths: dict[str, tuple[PositiveInt, ...]] = dataclasses.field(default_factory=dict)
    """Several maximum lengths by task or benchmark name; max_length holds for all others."""

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
    """

    output_dir: UserPath
    """The folder of the probe's result."""
    model: UserPath
    """An export; `diffembed export --checkpoint init` makes one of an untrained model."""
    train: UserPath
    """Words and tags to train on, in CoNLL-2003's columns (word, pos, chunk, ner) or as JSON lines
    with `tokens` and `pos_tags`, `chunk_tags` or `ner_tags`.
    """
    test: UserPath
    """Words and tags to score, in the same form."""
    task: Literal["pos", "chunk", "ner"]
    """The tags to predict."""
    labels: Literal["same_token", "next_token"] = "same_token"
    """Classify a word by its own tokens, or by the token before each of them."""
    merge_subwords: bool = True
    """Use the mean over a word's tokens, not only its first token."""
    max_length: PositiveInt = 512
    """Tokens after which a sentence is cut."""
    max_tokens: PositiveInt = 16384
    """Packed tokens of one forward."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on the classifier's input."""
    lr: PositiveFloat = 5e-4
    """The learning rate of the classifier."""
    num_epochs: PositiveInt = 5
    """Passes over the training words."""
    batch_size: PositiveInt = 256
    """Words per update of the classifier."""
    seed: NonNegativeInt = 42
    """Seed of initial weights, order and dropout."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportStep:
    """One export of the trained run: `diffembed export --checkpoint … --output …`."""

    checkpoint: str = "latest"
    """`latest`, a name like `step-000100`, or `init` (the untrained model)."""
    output: UserPath | None = None
    """The export's folder; null: the run's own."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChainConfig:
    """One experiment from raw data to its report: `diffembed submit all CONFIG`."""

    train: UserPath
    """Config of the training run."""
    prepare: UserPath | None = None
    """Config of the shards; null: they exist already."""
    mine: UserPath | None = None
    """Config of the mining of hard negatives, whose output the run trains on; null: none."""
    synthesize: UserPath | None = None
    """Config of a synthesis by a language model that writes rows for the shards; null: none."""
    deepspeed: UserPath = Path("ds_configs/zero3.json")
    """Its DeepSpeed JSON."""
    exports: tuple[ExportStep, ...] = (ExportStep(),)
    """The exports of the run that the evaluation needs."""
    evaluate: UserPath | None = None
    """Config of the evaluation; null: the chain ends with the exports."""
    text_elements: PositiveInt | None = None
    """Array elements that share the texts of all tasks; null: one element for each model and task.
    """

    def __post_init__(self) -> None:
        require(
            self.synthesize is None or self.prepare is not None,
            "synthesize",
            str(self.synthesize),
            "null without prepare, whose shards hold the rows",
        )
