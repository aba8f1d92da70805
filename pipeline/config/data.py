"""Configure where data comes from, how it is cleaned, and what a batch holds."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from pipeline.config.rules import PathText, UserPath, require, strict

_TEXT, _INSTRUCTION = "{text}", "{instruction}"


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """How an instruction and a text become the string that is tokenised.

    One object serves training, export and evaluation, so the strings cannot differ. A query without
    an instruction is written without what its template says around one: `Instruct: {instruction}`
    up to the text is left out as a whole. What wraps all of it stays, as in
    `[INST] {instruction}; {text} [/INST]`: where something follows the text, so does what stands
    before the instruction. What follows the text is kept when the text is cut.
    """

    query: str = "Instruct: {instruction}\nQuery: {text}"
    document: str = "{text}"

    def __post_init__(self) -> None:
        for key, template in (("query", self.query), ("document", self.document)):
            require(
                template.count(_TEXT) == 1,
                f"template.{key}",
                template,
                "a string that names {text} once",
            )
        require(
            _INSTRUCTION not in self.query.partition(_TEXT)[2],
            "template.query",
            self.query,
            "a string that names {instruction} before {text} only",
        )
        require(
            _INSTRUCTION not in self.document,
            "template.document",
            self.document,
            "a string without {instruction}; a document that has one is written as a query",
        )

    def query_prefix(self, instruction: str) -> str:
        """Return what stands before the query text."""
        before, _, after = self.query.partition(_TEXT)
        if instruction or _INSTRUCTION not in before:
            return before.replace(_INSTRUCTION, instruction)
        return before.partition(_INSTRUCTION)[0] if after else ""

    def query_suffix(self) -> str:
        """Return what stands behind the query text, with an instruction and without."""
        return self.query.partition(_TEXT)[2]

    def document_prefix(self, instruction: str = "") -> str:
        """Return what stands before a document's text. Only symmetric sets give documents one."""
        if instruction:
            return self.query_prefix(instruction)
        return self.document.partition(_TEXT)[0]

    def document_suffix(self, instruction: str = "") -> str:
        """Return what stands behind a document's text."""
        return self.query_suffix() if instruction else self.document.partition(_TEXT)[2]

    def frame(self, role: Literal["query", "document"], instruction: str = "") -> tuple[str, str]:
        """Return what stands before and behind a text of one role."""
        if role == "query":
            return self.query_prefix(instruction), self.query_suffix()
        return self.document_prefix(instruction), self.document_suffix(instruction)

    def format_query(self, text: str, instruction: str = "") -> str:
        """Return the string of a query."""
        return self.query_prefix(instruction) + text + self.query_suffix()

    def format_document(self, text: str, instruction: str = "") -> str:
        """Return the string of a document."""
        return self.document_prefix(instruction) + text + self.document_suffix(instruction)


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which shards, and what one global batch is made of.

    Args:
        global_batch_size: queries contrasted, or texts whose tokens are predicted, per optimizer
            step over all ranks.
        num_positives: documents taken per query, from those its example lists.
        num_hard_negatives: hard negatives taken per query, where its example lists as many.
        homogeneous: whether a batch holds one instruction, one source, or a mixture.
        weights: share of a source relative to its size; sources not named keep the weight they
            were prepared with.
        mixture_temperature: sources are drawn by weight * size ** (1 / mixture_temperature).
        mixture_cap: examples beyond this many do not add to a source's share.
        block_length: with an objective, join a source's texts in their order and cut the result
            into texts of so many tokens; by default a text is what the source gave.
    """

    path: UserPath
    global_batch_size: int = 1024
    num_positives: int = 1
    num_hard_negatives: int = 1
    homogeneous: Literal["none", "source", "instruction"] = "instruction"
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    mixture_temperature: float = 1.0
    mixture_cap: int | None = None
    block_length: int | None = None
    prefetch: bool = True

    def __post_init__(self) -> None:
        size = self.global_batch_size
        require(size >= 2, "data.global_batch_size", size, "an integer >= 2 (queries)")
        positives = self.num_positives
        require(positives >= 1, "data.num_positives", positives, "an integer >= 1")
        negatives = self.num_hard_negatives
        require(negatives >= 0, "data.num_hard_negatives", negatives, "an integer >= 0")
        for source, weight in self.weights.items():
            require(
                math.isfinite(weight) and weight >= 0,
                f"data.weights.{source}",
                weight,
                "a number >= 0",
            )
        temperature = self.mixture_temperature
        require(temperature > 0, "data.mixture_temperature", temperature, "a number > 0")
        cap = self.mixture_cap
        require(cap is None or cap >= 1, "data.mixture_cap", cap, "an integer >= 1")
        block = self.block_length
        require(block is None or block >= 2, "data.block_length", block, "an integer >= 2 (tokens)")


_COLUMNS = (
    "query",
    "positives",
    "negatives",
    "documents",
    "labels",
    "instruction",
    "concept",
    "scores",
)
# Which of them may be joined from several fields.
_SEVERAL = ("positives", "negatives", "documents", "labels", "scores")


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One data set: where it is, how to read it, how much of it to take.

    Args:
        path: a file, a folder of files, a glob, an fsspec URL, a folder of `save_to_disk`, or
            `hub:OWNER/NAME[:CONFIG]`.
        split: which split of a data set that has several; by default train.
        columns: for the format `columns`, which field holds query, positives, negatives, documents
            and their labels, instruction, concept and scores; a dotted path reaches inside a field,
            a list or a glob joins several.
        documents: for `reasonir_hq`, the BRIGHT documents its positives are ids of.
        where: keep only records whose fields equal these values.
        max_rows: take only the first so many records (of each file that is a source of its own).
        max_negatives: keep at most so many hard negatives per query.
        on_bad_row: whether records that cannot be used stop the build or are dropped and counted.
        weight: share of this source in the mixture, relative to its size.
    """

    name: str
    format: str
    path: PathText
    split: str | None = None
    instruction: str = ""
    document_instruction: str = ""
    columns: dict[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
    documents: PathText | None = None
    where: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    max_rows: int | None = None
    max_negatives: int | None = None
    require_negatives: bool = False
    on_bad_row: Literal["stop", "drop"] = "stop"
    weight: float = 1.0

    def __post_init__(self) -> None:
        key = f"sources.{self.name}"
        require(bool(self.name) and "/" not in self.name, "sources.name", self.name, "no slash")
        self._check_columns(f"{key}.columns")
        require(
            self.max_rows is None or self.max_rows >= 1, f"{key}.max_rows", self.max_rows, ">= 1"
        )
        require(
            self.max_negatives is None or self.max_negatives >= 0,
            f"{key}.max_negatives",
            self.max_negatives,
            ">= 0",
        )
        require(
            math.isfinite(self.weight) and self.weight >= 0,
            f"{key}.weight",
            self.weight,
            "a number >= 0",
        )

    def _check_columns(self, key: str) -> None:
        require(
            not self.columns or self.format == "columns",
            key,
            self.columns,
            "only with format: columns",
            f"the format {self.format!r} knows its fields; leave `columns` out",
        )
        for column, names in self.columns.items():
            require(column in _COLUMNS, key, column, ", ".join(_COLUMNS))
            is_list = not isinstance(names, str)
            require(bool(names), f"{key}.{column}", names, "the name of a field")
            require(
                not is_list or column in _SEVERAL,
                f"{key}.{column}",
                names,
                f"one field; several for {', '.join(_SEVERAL)}",
            )
        judged = {"documents", "labels"} & set(self.columns)
        require(
            len(judged) != 1 and not (judged and {"positives", "negatives"} & set(self.columns)),
            key,
            sorted(self.columns),
            "documents with labels, or positives and negatives",
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSetConfig:
    """Texts of an evaluation set that must not be trained on.

    Args:
        path: like a source's.
        split: which split of a data set that has several; by default test.
        fields: which fields of a record hold its texts.
        queries: whether they are queries, with which training queries are compared in full.
    """

    name: str
    path: PathText
    split: str | None = None
    fields: tuple[str, ...] = ("text",)
    queries: bool = True

    def __post_init__(self) -> None:
        require(
            len(self.fields) > 0,
            f"decontaminate.sets.{self.name}.fields",
            "an empty list",
            "at least one field",
        )


@strict
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
        require(len(names) > 0, "decontaminate.sets", "an empty list", "at least one set")
        require(len(set(names)) == len(names), "decontaminate.sets", names, "names that differ")
        require(self.ngram >= 1, "decontaminate.ngram", self.ngram, "an integer >= 1 (words)")
        for key in ("max_overlap", "max_ratio"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"decontaminate.{key}", value, "0 to 1")


@strict
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

    output_dir: UserPath
    tokenizer: PathText
    sources: tuple[SourceConfig, ...]
    template: Template = dataclasses.field(default_factory=Template)
    max_query_length: int = 512
    max_document_length: int = 4096
    append_eos: bool = False
    decontaminate: DecontaminateConfig | None = None
    near_duplicates: float | None = None
    reuse: UserPath | None = None
    shard_bytes: int = 256 * 2**20
    block_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        require(len(names) > 0, "sources", "an empty list", "at least one source")
        require(len(set(names)) == len(names), "sources", names, "names that differ")
        for key in ("max_query_length", "max_document_length"):
            require(getattr(self, key) >= 4, key, getattr(self, key), "an integer >= 4 (tokens)")
        near = self.near_duplicates
        require(near is None or 0.5 <= near <= 1, "near_duplicates", near, "0.5 to 1, or null")
        for key in ("shard_bytes", "block_bytes"):
            require(getattr(self, key) >= 1024, key, getattr(self, key), "an integer >= 1024")
