"""The whole configuration as frozen dataclasses, and the one border where YAML becomes them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from pipeline.errors import UserError

T = TypeVar("T")

# Unknown keys are refused: a misspelt key that is ignored trains the wrong model.
_strict = with_config(ConfigDict(extra="forbid"))

Attention = Literal["bidirectional", "causal"]
Pooling = Literal["mean", "weighted_mean", "last_token", "first_token"]


def _require(condition: bool, key: str, value: object, allowed: str, fix: str = "") -> None:
    if not condition:
        raise UserError(f"{key}: {value!r}", allowed=allowed, fix=fix)


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """How an instruction and a text become the string that is tokenised.

    One object serves training, export and evaluation, so the strings cannot differ.
    """

    query: str = "Instruct: {instruction}\nQuery: {text}"
    document: str = "{text}"

    def __post_init__(self) -> None:
        for key, template in (("query", self.query), ("document", self.document)):
            _require(
                template.count("{text}") == 1 and template.endswith("{text}"),
                f"template.{key}",
                template,
                "a string that ends with {text} and names it once",
            )

    def query_prefix(self, instruction: str) -> str:
        """What stands before the query text; empty when there is no instruction."""
        if not instruction:
            return ""
        return self.query.removesuffix("{text}").replace("{instruction}", instruction)

    def document_prefix(self, instruction: str = "") -> str:
        """What stands before a document's text. Only symmetric sets give documents one."""
        if instruction:
            return self.query_prefix(instruction)
        return self.document.removesuffix("{text}")

    def format_query(self, text: str, instruction: str = "") -> str:
        """The string of a query."""
        return self.query_prefix(instruction) + text

    def format_document(self, text: str, instruction: str = "") -> str:
        """The string of a document."""
        return self.document_prefix(instruction) + text


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al., arXiv 2106.09685)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    rslora: bool = False

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "model.lora.rank", self.rank, "an integer >= 1")
        _require(0 <= self.dropout < 1, "model.lora.dropout", self.dropout, "0 <= dropout < 1")


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The backbone, how it attends, and how its hidden states become one vector."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    attention: Attention = "bidirectional"
    pooling: Pooling = "mean"
    normalize: bool = True
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention_dropout: float | None = None
    gradient_checkpointing: bool = False
    # A peft adapter to start from: merged into the weights, or trained further.
    adapter: str | None = None
    adapter_use: Literal["merge", "continue"] = "merge"
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        _require(
            self.adapter_use == "merge" or (self.adapter is not None and self.lora is None),
            "model.adapter_use",
            self.adapter_use,
            "continue only with model.adapter and without model.lora",
            "the adapter to continue brings its own rank and targets",
        )
        _require(
            not self.trust_remote_code or self.revision is not None,
            "model.trust_remote_code",
            True,
            "true only together with model.revision (a pinned commit)",
            "set model.revision, so that the code you reviewed is the code that runs",
        )


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which shards, and what one global batch is made of.

    Args:
        global_batch_size: queries contrasted per optimizer step, over all ranks.
        num_positives: documents taken per query, from those its example lists.
        num_hard_negatives: hard negatives taken per query, where its example lists as many.
        homogeneous: whether a batch holds one instruction, one source, or a mixture.
        weights: share of a source relative to its size; sources not named keep the weight they
            were prepared with.
        mixture_temperature: sources are drawn by weight * size ** (1 / mixture_temperature).
        mixture_cap: examples beyond this many do not add to a source's share.
    """

    path: Path
    global_batch_size: int = 1024
    num_positives: int = 1
    num_hard_negatives: int = 1
    homogeneous: Literal["none", "source", "instruction"] = "instruction"
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    mixture_temperature: float = 1.0
    mixture_cap: int | None = None
    prefetch: bool = True

    def __post_init__(self) -> None:
        size = self.global_batch_size
        _require(size >= 2, "data.global_batch_size", size, "an integer >= 2 (queries)")
        positives = self.num_positives
        _require(positives >= 1, "data.num_positives", positives, "an integer >= 1")
        negatives = self.num_hard_negatives
        _require(negatives >= 0, "data.num_hard_negatives", negatives, "an integer >= 0")
        for source, weight in self.weights.items():
            _require(
                math.isfinite(weight) and weight >= 0,
                f"data.weights.{source}",
                weight,
                "a number >= 0",
            )
        temperature = self.mixture_temperature
        _require(temperature > 0, "data.mixture_temperature", temperature, "a number > 0")
        cap = self.mixture_cap
        _require(cap is None or cap >= 1, "data.mixture_cap", cap, "an integer >= 1")


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """Learning a teacher's scores of a query's positives and own negatives.

    KL(teacher || model) over that list (Hinton et al., arXiv 1503.02531, with the list of one query
    in the place of the classes). Its share of the loss is `weight`, the contrastive term keeps the
    rest. `temperature` divides the teacher's scores.
    """

    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        key = "loss.distillation"
        _require(0 < self.weight <= 1, f"{key}.weight", self.weight, "0 < weight <= 1")
        _require(self.temperature > 0, f"{key}.temperature", self.temperature, "a number > 0")


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """InfoNCE over the global batch (van den Oord et al., arXiv 1807.03748, eq. 4).

    The defaults are cosine / 0.02 against every document of the batch. RepLLaMA's loss is
    `{similarity: scaled_dot, temperature: 1, negatives: own}`.
    """

    temperature: float = 0.02
    learn_temperature: bool = False
    # cosine normalises inside the loss; scaled_dot divides the dot product by the width.
    similarity: Literal["cosine", "dot", "scaled_dot"] = "cosine"
    negatives: Literal["batch", "own"] = "batch"
    symmetric: bool = False
    # Widths trained beside the full one; the loss is the mean over all of them.
    matryoshka_dims: tuple[int, ...] = ()
    # A negative more similar than the query's best positive by more than this does not count.
    false_negative_margin: float | None = None
    distillation: DistillationConfig | None = None

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "loss.temperature", self.temperature, "a number > 0")
        _require(
            not (self.symmetric and self.negatives == "own"),
            "loss.symmetric",
            True,
            "true only with loss.negatives: batch",
            "a document has no negatives of its own; set loss.symmetric: false",
        )
        dims = self.matryoshka_dims
        _require(
            all(dim >= 1 for dim in dims) and list(dims) == sorted(set(dims)),
            "loss.matryoshka_dims",
            list(dims),
            "ascending integers >= 1, each once",
        )


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), warm-up and decay."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    decay: Literal["linear", "cosine", "constant"] = "linear"

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optimizer.lr", self.lr, "a number > 0")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, ">= 0")
        _require(
            self.max_grad_norm >= 0,
            "optimizer.max_grad_norm",
            self.max_grad_norm,
            "a number > 0, or 0 for no clipping",
        )


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChunkConfig:
    """How a rank's share of the global batch is cut into cached forwards."""

    max_tokens: int = 8192
    min_chunks: int = 1
    # schedule cache: this many chunks keep their graph and are spared the second forward.
    keep_graphs: int = 0
    # schedule sweep: where the inputs of all layers wait for the backward.
    boundaries: Literal["device", "host"] = "device"

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "chunks.max_tokens", self.max_tokens, "an integer >= 1")
        _require(self.min_chunks >= 1, "chunks.min_chunks", self.min_chunks, "an integer >= 1")
        _require(self.keep_graphs >= 0, "chunks.keep_graphs", self.keep_graphs, "an integer >= 0")


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the run saves itself and how many saves are kept."""

    every: int = 100
    keep_last: int = 2

    def __post_init__(self) -> None:
        _require(self.every >= 1, "checkpoint.every", self.every, "an integer >= 1 (steps)")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "an integer >= 1")


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run: `pipeline/train.py CONFIG`."""

    output_dir: Path
    num_steps: int
    model: ModelConfig
    data: DataConfig
    seed: int = 42
    schedule: Literal["plain", "cache", "sweep"] = "cache"
    chunks: ChunkConfig = dataclasses.field(default_factory=ChunkConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    # A loss or gradient that is not finite: end the run with a dump, or leave the step out.
    non_finite: Literal["stop", "skip"] = "stop"
    log_every: int = 1
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()

    def __post_init__(self) -> None:
        _require(self.num_steps >= 1, "num_steps", self.num_steps, "an integer >= 1")
        _require(
            self.optimizer.warmup_steps < self.num_steps,
            "optimizer.warmup_steps",
            self.optimizer.warmup_steps,
            f"less than num_steps ({self.num_steps})",
        )
        _require(
            self.schedule == "cache" or self.chunks.keep_graphs == 0,
            "chunks.keep_graphs",
            self.chunks.keep_graphs,
            "0 unless schedule is cache",
            "schedule plain keeps all graphs, sweep keeps none",
        )
        _require(
            self.schedule != "sweep" or not self.model.gradient_checkpointing,
            "model.gradient_checkpointing",
            True,
            "false with schedule sweep",
            "a sweep already computes one layer at a time again",
        )


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One data set: where it is, how to read it, how much of it to take.

    Args:
        path: a file, a folder of files, a glob, an fsspec URL, or `hub:OWNER/NAME[:CONFIG]`.
        columns: for the format `columns`, which field holds query, positives, negatives,
            instruction, concept and scores; a dotted path reaches inside a field.
        documents: for `reasonir_hq`, the BRIGHT documents its positives are ids of.
        where: keep only records whose fields equal these values.
        max_rows: take only the first so many records (of each file that is a source of its own).
        max_negatives: keep at most so many hard negatives per query.
        weight: share of this source in the mixture, relative to its size.
    """

    name: str
    format: str
    path: str
    split: str = "train"
    instruction: str = ""
    document_instruction: str = ""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    documents: str | None = None
    where: dict[str, str] = dataclasses.field(default_factory=dict)
    max_rows: int | None = None
    max_negatives: int | None = None
    require_negatives: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        key = f"sources.{self.name}"
        known = ("query", "positives", "negatives", "instruction", "concept", "scores")
        _require(bool(self.name) and "/" not in self.name, "sources.name", self.name, "no slash")
        for column in self.columns:
            _require(column in known, f"{key}.columns", column, ", ".join(known))
        _require(
            self.max_rows is None or self.max_rows >= 1, f"{key}.max_rows", self.max_rows, ">= 1"
        )
        _require(
            self.max_negatives is None or self.max_negatives >= 0,
            f"{key}.max_negatives",
            self.max_negatives,
            ">= 0",
        )
        _require(
            math.isfinite(self.weight) and self.weight >= 0,
            f"{key}.weight",
            self.weight,
            "a number >= 0",
        )


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSetConfig:
    """Texts of an evaluation set that must not be trained on.

    Args:
        path: like a source's.
        fields: which fields of a record hold its texts.
        queries: whether they are queries, with which training queries are compared in full.
    """

    name: str
    path: str
    split: str = "test"
    fields: tuple[str, ...] = ("text",)
    queries: bool = True


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecontaminateConfig:
    """When a training text counts as part of an evaluation set.

    Args:
        ngram: words in a run.
        max_overlap: share of a text's runs that may occur in the evaluation sets.
        max_ratio: matching ratio (difflib's) that a training query may have with an evaluation
            query.
    """

    sets: tuple[EvaluationSetConfig, ...]
    ngram: int = 13
    max_overlap: float = 0.1
    max_ratio: float = 0.5

    def __post_init__(self) -> None:
        names = [evaluation.name for evaluation in self.sets]
        _require(len(names) > 0, "decontaminate.sets", "an empty list", "at least one set")
        _require(len(set(names)) == len(names), "decontaminate.sets", names, "names that differ")
        _require(self.ngram >= 1, "decontaminate.ngram", self.ngram, "an integer >= 1 (words)")
        for key in ("max_overlap", "max_ratio"):
            value = getattr(self, key)
            _require(0 <= value <= 1, f"decontaminate.{key}", value, "0 to 1")


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Raw data to shards: `diffembed prepare CONFIG`.

    Args:
        append_eos: end every text with EOS, also where the tokenizer would not.
        decontaminate: evaluation sets whose texts are dropped.
        near_duplicates: documents of at least this Jaccard similarity become one; None keeps all.
        reuse: an earlier dataset; its documents that were not cut are not tokenised again.
        shard_bytes: size of a shard file.
        block_bytes: input that one task reads at a time.
    """

    output_dir: Path
    tokenizer: str
    sources: tuple[SourceConfig, ...]
    template: Template = dataclasses.field(default_factory=Template)
    max_query_length: int = 512
    max_document_length: int = 4096
    append_eos: bool = False
    decontaminate: DecontaminateConfig | None = None
    near_duplicates: float | None = None
    reuse: Path | None = None
    shard_bytes: int = 256 * 2**20
    block_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        _require(len(names) > 0, "sources", "an empty list", "at least one source")
        _require(len(set(names)) == len(names), "sources", names, "names that differ")
        for key in ("max_query_length", "max_document_length"):
            _require(getattr(self, key) >= 4, key, getattr(self, key), "an integer >= 4 (tokens)")
        near = self.near_duplicates
        _require(near is None or 0.5 <= near <= 1, "near_duplicates", near, "0.5 to 1, or null")
        for key in ("shard_bytes", "block_bytes"):
            _require(getattr(self, key) >= 1024, key, getattr(self, key), "an integer >= 1024")


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedModel:
    """An export folder and the name it has in the report."""

    name: str
    path: Path

    def __post_init__(self) -> None:
        # The name is a folder of the results and a key of report.json.
        plain = self.name.replace("-", "").replace("_", "").replace(".", "")
        _require(
            plain.isalnum() and self.name not in _REPORT_KEYS,
            "models.name",
            self.name,
            f"letters, digits and . _ - only, and not {', '.join(_REPORT_KEYS)}",
        )


_REPORT_KEYS = (
    "name", "task", "benchmark", "metric", "chance", "intervals", "by_split", "other_scores",
    "num_queries", "max_length", "difference", "ci_low", "ci_high", "significant", "published",
)  # fmt: skip


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Exports to scores: `diffembed evaluate run CONFIG`."""

    output_dir: Path
    models: tuple[EvaluatedModel, ...]
    tasks: tuple[str, ...]
    snapshots: Path | None = None
    max_length: int = 4096
    max_tokens: int = 16384
    training_run: Path | None = None
    # Instructions by task name; they replace those of pipeline/evaluation/instructions.py.
    instructions: dict[str, str] = dataclasses.field(default_factory=dict)
    # Memory of one GPU, so that planning can refuse texts that would not fit it.
    gpu_memory_gib: float | None = None
    # Several maximum lengths by task or benchmark name; max_length holds for all others.
    lengths: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(len(self.models) > 0, "models", "an empty list", "at least one model")
        names = [model.name for model in self.models]
        _require(len(set(names)) == len(names), "models", names, "names that differ")
        for key, lengths in {"max_length": (self.max_length,), **self.lengths}.items():
            _require(
                len(lengths) > 0 and min(lengths) >= 1 and len(set(lengths)) == len(lengths),
                key if key == "max_length" else f"lengths.{key}",
                lengths,
                "integers >= 1 (tokens), each once",
            )
            _require(
                self.max_tokens >= max(lengths),
                "max_tokens",
                self.max_tokens,
                f"at least {max(lengths)}: one forward must hold the longest text",
            )
        _require(len(self.tasks) > 0, "tasks", "an empty list", "at least one mteb task name")


@_strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StarterConfig:
    """A small model to begin from, and its tokenizer: `diffembed starter CONFIG`."""

    output_dir: Path
    corpus: tuple[Path, ...]
    vocab_size: int = 4096
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 384
    max_position_embeddings: int = 4096
    seed: int = 0


def load_config(kind: type[T], path: str | Path, overrides: tuple[str, ...] = ()) -> T:
    """Read a YAML file, apply `key.sub=value` overrides, and build `kind` from it.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, a value has a wrong type or
            breaks a rule; the message names the file and the whole key path.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file", fix="give the path of a YAML config")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {type(tree).__name__} at the top", allowed="a mapping of keys")
    for override in overrides:
        _apply_override(tree, override)
    return build_config(kind, tree, origin=str(path))


def build_config(kind: type[T], tree: dict[str, Any], *, origin: str) -> T:
    """Validate a plain tree of values into `kind`; `origin` names it in messages."""
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        raise _explain(kind, error, origin) from error
    except UserError as error:
        raise UserError(f"{origin}: {error.found}", allowed=error.allowed, fix=error.fix) from error


def as_tree(config: Any) -> dict[str, Any]:
    """The resolved config as nested dicts of plain values."""
    tree: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return tree


def dump_config(config: Any) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(as_tree(config), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}", allowed="key.sub=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        node = tree.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent!r} holds a value, not keys")
        tree = node
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: value is not YAML ({error})") from error


def _explain(kind: type, error: ValidationError, origin: str) -> UserError:
    """The first fault of a pydantic report, in the user's words."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        return UserError(
            f"{origin}: unknown key {key!r}", allowed=", ".join(_keys_beside(kind, first["loc"]))
        )
    if first["type"] in ("missing", "missing_keyword_only_argument"):
        return UserError(f"{origin}: key {key!r} is missing", fix=f"add {key} to the file")
    return UserError(f"{origin}: {key} = {first['input']!r}", allowed=first["msg"])


def _keys_beside(kind: type, location: tuple[int | str, ...]) -> list[str]:
    """Names allowed where an unknown key was found."""
    schema = TypeAdapter(kind).json_schema()
    node: dict[str, Any] = schema
    for part in location[:-1]:
        child = node["items"] if isinstance(part, int) else node["properties"][part]
        node = _resolve(schema, child)
    return list(_resolve(schema, node)["properties"])


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Follow references and optional branches of a JSON schema to the object they mean."""
    for branch in node.get("anyOf", []):
        if branch.get("type") != "null":
            return _resolve(schema, branch)
    if "$ref" in node:
        return dict(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]])
    return node
