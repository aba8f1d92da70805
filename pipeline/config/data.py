"""Configure data: sources, cleaning, templates, and the composition of a batch."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.config.loading import PathText, UserPath, require, strict

_TEXT, _INSTRUCTION = "{text}", "{instruction}"


# A text is one of the two; a template has a form for each.
Role = Literal["query", "document"]


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """The string that is tokenised, made from an instruction and a text.

    One object serves training, export and evaluation, so the strings cannot differ. A query without
    an instruction loses its template up to the text: all of `Instruct: {instruction}\\nQuery: `.
    But if something follows the text, as in `[INST] {instruction}; {text} [/INST]`, the template
    wraps the whole query, and the part before the instruction stays: `[INST] ` and ` [/INST]`.
    The part after the text is kept when a long text is cut.
    """

    query: str = "Instruct: {instruction}\nQuery: {text}"
    """The string of a query; names {text} once, and {instruction} before it or not at all."""
    document: str = "{text}"
    """The string of a document; names {text} once."""

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
        """Return the characters before a query's text."""
        before, _, after = self.query.partition(_TEXT)
        # Without an instruction, "Instruct: " alone would be a prefix that no training has seen.
        if instruction or _INSTRUCTION not in before:
            return before.replace(_INSTRUCTION, instruction)
        return before.partition(_INSTRUCTION)[0] if after else ""

    def query_suffix(self) -> str:
        """Return the characters after a query's text, with or without an instruction."""
        return self.query.partition(_TEXT)[2]

    def document_prefix(self, instruction: str = "") -> str:
        """Return the characters before a document's text; symmetric sets have an instruction."""
        if instruction:
            return self.query_prefix(instruction)
        return self.document.partition(_TEXT)[0]

    def document_suffix(self, instruction: str = "") -> str:
        """Return the characters after a document's text."""
        return self.query_suffix() if instruction else self.document.partition(_TEXT)[2]

    def frame(self, role: Literal["query", "document"], instruction: str = "") -> tuple[str, str]:
        """Return the characters before and after a text of one role."""
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
class CandidatesConfig:
    """Hard negatives drawn from the candidates that mining stored with each example.

    `num_hard_negatives` of them are drawn by chance for each query. The draw is a function of seed,
    epoch and example: a query that comes again in another epoch gets other ones.
    """

    bands: dict[str, PositiveInt] = dataclasses.field(default_factory=dict)
    """Negatives per query from each band of the mining, in all `data.num_hard_negatives`; by
    default from all bands together.
    """


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The shards to train on, and the composition of one global batch."""

    path: UserPath
    """The folder of shards that `diffembed prepare` wrote."""
    global_batch_size: Annotated[int, Field(ge=2, description="queries")] = 1024
    """Queries contrasted, or texts whose tokens are predicted, per optimizer step over all ranks.
    """
    num_positives: PositiveInt = 1
    """Positives per query, taken from the list in its example."""
    num_hard_negatives: NonNegativeInt = 1
    """Hard negatives per query; fewer if its example lists fewer."""
    candidates: CandidatesConfig | None = None
    """Draw the hard negatives from mined candidates, other ones in each epoch; null: from the
    negatives that the example lists.
    """
    homogeneous: Literal["none", "source", "instruction"] = "instruction"
    """One instruction in a batch, one source, or a mixture."""
    weights: dict[str, NonNegativeFloat] = dataclasses.field(default_factory=dict)
    """Share of a source relative to its size; other sources keep the weight that they were prepared
    with.
    """
    mixture_temperature: PositiveFloat = 1.0
    """Sources are drawn by weight * size ** (1 / mixture_temperature)."""
    mixture_cap: PositiveInt | None = None
    """Examples beyond this many do not add to a source's share."""
    block_length: Annotated[int, Field(ge=2, description="tokens")] | None = None
    """With an objective, join a source's texts in their order and cut the result into texts of this
    many tokens; by default texts stay as they are.
    """
    prefetch: bool = True
    """Assemble the next batch in a thread while this one is trained."""

    def __post_init__(self) -> None:
        if self.candidates is None:
            return
        require(
            self.num_hard_negatives >= 1,
            "data.num_hard_negatives",
            self.num_hard_negatives,
            "at least 1 with data.candidates",
            "remove data.candidates to train without hard negatives",
        )
        bands = self.candidates.bands
        require(
            not bands or sum(bands.values()) == self.num_hard_negatives,
            "data.candidates.bands",
            bands,
            f"numbers that add up to data.num_hard_negatives ({self.num_hard_negatives})",
            f"set data.num_hard_negatives: {sum(bands.values())}",
        )


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
# Columns that may be joined from several fields.
_SEVERAL = ("positives", "negatives", "documents", "labels", "scores")


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One data set: its location, its format, and the part of it to use."""

    name: str
    """The source's name in counts, metrics and `data.weights`; no slash."""
    format: str
    """The layout of its records; docs/data.md lists them. `columns` reads any table."""
    path: PathText
    """A file, a folder of files, a glob, an fsspec URL, a folder of `save_to_disk`, or
    `hub:OWNER/NAME[:CONFIG]`.
    """
    split: str | None = None
    """The split of a data set that has several; by default train."""
    instruction: str = ""
    """The instruction of queries whose record has none."""
    document_instruction: str = ""
    """The instruction of documents, for tasks that compare like with like."""
    columns: dict[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """For the format `columns`, the fields that hold query, positives, negatives, documents and
    their labels, instruction, concept and scores; a dotted path reaches inside a field, also into
    the objects of a list or into one by its number; a list or a glob joins several.
    """
    documents: PathText | None = None
    """For `reasonir_hq`, the BRIGHT documents its positives are ids of."""
    where: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    """Keep only records whose fields equal these values."""
    max_rows: PositiveInt | None = None
    """Use only this many records from the start (of each file that is a source itself)."""
    max_negatives: NonNegativeInt | None = None
    """Keep at most this many hard negatives per query."""
    require_negatives: bool = False
    """Drop and count records without a hard negative."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """Stop the build at a record that cannot be used, or drop and count it."""
    weight: NonNegativeFloat = 1.0
    """Share of this source in the mixture, relative to its size."""

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "sources.name", self.name, "no slash")
        key = f"sources.{self.name}.columns"
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
    """Texts of an evaluation set that must not be trained on."""

    name: str
    """The set's name in counts."""
    path: PathText
    """Like a source's."""
    split: str | None = None
    """The split of a data set that has several; by default test."""
    fields: Annotated[tuple[str, ...], Field(min_length=1, description="field")] = ("text",)
    """The fields of a record that hold its texts."""
    queries: bool = True
    """These texts are queries, and training queries are compared with them in full."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecontaminateConfig:
    """The rule by which a training text counts as part of an evaluation set."""

    sets: Annotated[tuple[EvaluationSetConfig, ...], Field(min_length=1, description="set")]
    """The evaluation sets to compare with."""
    ngram: Annotated[int, Field(ge=1, description="words")] = 13
    """Words in a run."""
    max_overlap: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The largest allowed share of a text's runs that occur in an evaluation set."""
    max_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The largest allowed matching ratio (difflib's) of a training query with an evaluation query.
    """

    def __post_init__(self) -> None:
        names = [evaluation.name for evaluation in self.sets]
        require(len(set(names)) == len(names), "decontaminate.sets", names, "names that differ")


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Raw data to shards: `diffembed prepare CONFIG`."""

    output_dir: UserPath
    """The folder of shards to write."""
    tokenizer: PathText
    """The tokenizer: a folder, or a model name in the local cache. Training needs the same one."""
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1, description="source")]
    """The data sets to read, in this order."""
    template: Template = dataclasses.field(default_factory=Template)
    """The wording of queries and documents; exports and evaluations use the same."""
    max_query_length: Annotated[int, Field(ge=4, description="tokens")] = 512
    """Longer queries are cut, and counted."""
    max_document_length: Annotated[int, Field(ge=4, description="tokens")] = 4096
    """Longer documents are cut, and counted."""
    append_eos: bool = False
    """End every text with EOS, even if the tokenizer does not."""
    decontaminate: DecontaminateConfig | None = None
    """Evaluation sets whose texts are dropped."""
    holdout: Annotated[float, Field(gt=0, le=0.5)] | None = None
    """Keep this share of the documents, and the rows that ask for them, out of training; `holdout/`
    in the folder of shards then holds them as tasks for `diffembed evaluate`.
    """
    near_duplicates: Annotated[float, Field(ge=0.5, le=1)] | None = None
    """Merge documents of at least this Jaccard similarity; null keeps all."""
    reuse: UserPath | None = None
    """An earlier dataset; its documents that were not cut are not tokenised again."""
    shard_bytes: Annotated[int, Field(ge=1024)] = 256 * 2**20
    """Size of a shard file."""
    block_bytes: Annotated[int, Field(ge=1024)] = 16 * 2**20
    """Input that one task reads at a time."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        require(len(set(names)) == len(names), "sources", names, "names that differ")
