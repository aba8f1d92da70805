"""Configure the mining of hard negatives."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from pipeline.config.data import DecontaminateConfig, SourceConfig, Template
from pipeline.config.evaluation import Precision
from pipeline.config.loading import PathText, UserPath, require, strict

BM25 = "bm25"
# Documents that a search returns for a query.
MAX_DEPTH = 1000
# Candidates that are stored for a query.
MAX_CANDIDATES = 2048


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MarginConfig:
    """How much lower than a positive a negative must score; every given rule must hold.

    With several positives the one with the lowest score counts.
    """

    absolute: NonNegativeFloat | None = None
    """The score must be lower than the positive's by at least this much."""
    relative: Annotated[float, Field(gt=0, le=1)] | None = None
    """The score must be at most this share of the positive's; NV-Retriever (arXiv 2407.15831) takes
    0.95.
    """
    percentile: Annotated[float, Field(gt=0, lt=100)] | None = None
    """The score must be at most this percentile of the scores of all positives of the dataset."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """An approximate index by faiss, for corpora that are too large to compare all pairs."""

    factory: str
    """Description of the index in faiss's words, such as `IVF65536,SQ8`."""
    parameters: str = "nprobe=64"
    """Search parameters of faiss; `efSearch=128` for HNSW, empty for an index without any."""
    train: PositiveInt = 1_000_000
    """Documents that the index is trained on, evenly spaced."""
    sample: PositiveInt = 256
    """Queries that are searched exactly as well, to measure the recall."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RetrieverConfig:
    """One model, or BM25, whose best documents become candidates."""

    name: str
    """The retriever's name in counts; no slash."""
    path: PathText
    """An export, a sentence-transformers folder, its name in the local cache, or `bm25`."""
    template: Template | None = None
    """Replaces the template of the folder, which folders of other packages may not have."""
    max_length: PositiveInt | None = None
    """Tokens after which a text is cut; null: the model's own limit."""
    precision: Precision = "auto"
    """Of weights and arithmetic."""
    margin: MarginConfig | None = None
    """Replaces the margin of the whole config for this retriever's scores."""
    index: IndexConfig | None = None
    """Search an index by faiss; null: compare all pairs."""

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "retrievers.name", self.name, "no slash")
        require(
            self.path != BM25 or (self.template is None and self.max_length is None),
            f"retrievers.{self.name}",
            "template or max_length",
            "neither with path: bm25, which reads whole texts",
        )
        require(
            self.path != BM25 or self.index is None,
            f"retrievers.{self.name}",
            "index",
            "none with path: bm25, which has an index of its own",
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """Further documents to search, after the documents of the shards."""

    name: str
    """The corpus's name in counts; no slash."""
    path: PathText
    """Like a source's."""
    format: Literal["lines", "mteb"] = "lines"
    """A text in each record (the field `text`) or line, or a folder with `corpus` in mteb's layout.
    """
    split: str | None = None
    """The split of a data set that has several; by default train."""
    document_instruction: str = ""
    """The instruction of its documents, for tasks that compare like with like."""
    where: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    """Keep only records whose fields equal these values; for `lines`."""
    max_rows: PositiveInt | None = None
    """Use only this many records from the start; for `lines`."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """Stop at a record that cannot be used, or drop and count it."""

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "corpora.name", self.name, "no slash")
        require(
            self.format == "lines" or not (self.where or self.max_rows),
            f"corpora.{self.name}",
            "where or max_rows",
            "neither with format: mteb, whose corpus is read whole",
        )

    def as_source(self) -> SourceConfig:
        """Return the source whose documents these are."""
        return SourceConfig(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig:
    """Ranks of a retriever's list that negatives are taken from.

    A rank counts the documents that may be negatives: the query's own positives have none.
    """

    first: Annotated[int, Field(ge=1, le=MAX_DEPTH)] = 1
    """The best rank; a higher number skips documents that are likely to be unlabelled answers."""
    last: Annotated[int, Field(ge=1, le=MAX_DEPTH)] = 100
    """The last rank."""

    def __post_init__(self) -> None:
        require(
            self.first <= self.last,
            "window.first",
            self.first,
            f"at most window.last, {self.last}: the window is empty",
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BandConfig:
    """Neighbouring places of the merged list of candidates, and their share of the negatives."""

    name: str
    """The band's name in counts, such as `hard`."""
    last: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)]
    """The last place of the band, from 1; the next band follows."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Share of a query's negatives that is drawn from this band."""


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """A stronger model that scores positives and candidates."""

    path: PathText | None = None
    """A cross-encoder or bi-encoder: a folder, or a name in the local cache; null with `url`."""
    kind: Literal["cross_encoder", "bi_encoder", "endpoint"] = "cross_encoder"
    """The model in `path`, or a server's `/rerank` at `url`."""
    url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """Of an endpoint: the address of its rerank route, such as `http://host:8000/v1/rerank`."""
    model: str | None = None
    """Of an endpoint: the name that the server gives to the model."""
    key_variable: str | None = None
    """Of an endpoint: the environment variable that holds its key; null: no key."""
    template: Template | None = None
    """Of a bi-encoder: replaces the template of the folder."""
    max_length: PositiveInt | None = None
    """Tokens after which a text is cut; null: the model's own limit."""
    precision: Precision = "auto"
    """Of weights and arithmetic."""
    vectors: bool = False
    """Of a bi-encoder: store the vectors of all documents and queries with the dataset."""
    margin: MarginConfig | None = None
    """Candidates that the teacher scores above this are false negatives; null: keep all."""

    def __post_init__(self) -> None:
        is_endpoint = self.kind == "endpoint"
        require(
            is_endpoint == (self.url is not None) == (self.path is None),
            "teacher",
            f"kind {self.kind!r} with {'url' if self.url else 'no url'}"
            f" and {'path' if self.path else 'no path'}",
            "path for a cross_encoder or bi_encoder, url for an endpoint",
        )
        require(
            is_endpoint or (self.model is None and self.key_variable is None),
            "teacher.model",
            self.model or self.key_variable,
            "model and key_variable for an endpoint only",
        )
        require(
            not is_endpoint or self.model is not None,
            "teacher.model",
            self.model,
            "the name of the endpoint's model",
        )
        require(
            self.kind == "bi_encoder" or not (self.vectors or self.template),
            "teacher.vectors",
            self.vectors,
            "vectors and template for a bi_encoder only",
        )


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MineConfig:
    """Shards to shards with hard negatives: `diffembed mine CONFIG`."""

    data: UserPath
    """The folder of shards whose examples get new negatives."""
    output: UserPath
    """The folder of shards to write; `diffembed train` opens it like any other."""
    retrievers: Annotated[tuple[RetrieverConfig, ...], Field(min_length=1, description="retriever")]
    """The models that propose candidates."""
    store: UserPath | None = None
    """The folder of vectors and search results, which later minings reuse; null: `mining` next to
    the output.
    """
    corpora: tuple[CorpusConfig, ...] = ()
    """Further documents to search, which the output holds in addition."""
    texts: Literal["exact", "decoded"] = "exact"
    """`exact` refuses shards from whose tokens a retriever's texts cannot be restored; `decoded`
    takes what the tokenizer makes of them.
    """
    decontaminate: DecontaminateConfig | None = None
    """Evaluation sets whose texts never become negatives."""
    near_duplicates: Annotated[float, Field(ge=0.5, le=1)] | None = 0.9
    """Documents of at least this Jaccard similarity to a positive never become its negatives; null:
    exact duplicates only.
    """
    window: WindowConfig = dataclasses.field(default_factory=WindowConfig)
    """Ranks of each retriever's list."""
    margin: MarginConfig = dataclasses.field(default_factory=MarginConfig)
    """Distance of a negative's score to the positive's."""
    merge: Literal["reciprocal", "round_robin"] = "reciprocal"
    """Order of the candidates of several retrievers: by the sum of 1 / (60 + rank), or each
    retriever's first, then each one's second.
    """
    negatives: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] = 8
    """Negatives of a query."""
    candidates: Annotated[int, Field(ge=0, le=MAX_CANDIDATES)] = 0
    """Candidates to store for each query, from which a run may draw other negatives in each epoch;
    0: none.
    """
    choose: Literal["top", "random", "bands"] = "top"
    """Take the best candidates, a random choice, or a random choice in each band."""
    bands: tuple[BandConfig, ...] = ()
    """Bands of the merged list, from hard to easy."""
    short: Literal["fewer", "fill"] = "fewer"
    """A query with too few candidates gets fewer negatives, or more from other bands and then from
    behind the window.
    """
    keep_negatives: bool = False
    """Keep the negatives that an example has already, before the mined ones."""
    teacher: TeacherConfig | None = None
    """Scores for distillation, and against false negatives."""
    seed: NonNegativeInt = 0
    """Seed of random choices."""

    def __post_init__(self) -> None:
        for key, entries in (
            ("retrievers", self.retrievers),
            ("corpora", self.corpora),
            ("bands", self.bands),
        ):
            names = [entry.name for entry in entries]
            require(len(set(names)) == len(names), key, names, "names that differ")
        # The name of the teacher in the manifest's list of models.
        taken = self.teacher is not None and any(r.name == "teacher" for r in self.retrievers)
        require(not taken, "retrievers.name", "teacher", "another name: `teacher` has this one")
        require(
            (self.choose == "bands") == bool(self.bands),
            "bands",
            [band.name for band in self.bands],
            "bands with choose: bands, and only then",
        )
        lasts = [band.last for band in self.bands]
        require(
            all(one < other for one, other in itertools.pairwise(lasts)),
            "bands.last",
            lasts,
            "numbers that increase",
        )
        total = sum(band.share for band in self.bands)
        require(not self.bands or abs(total - 1) < 1e-6, "bands.share", total, "a sum of 1")
        require(
            self.candidates == 0 or self.candidates >= self.negatives,
            "candidates",
            self.candidates,
            f"0, or at least {self.negatives} as there are negatives",
        )
        require(self.output != self.data, "output", str(self.output), "another folder than data")

    @property
    def store_folder(self) -> UserPath:
        """The folder of vectors and search results."""
        return self.store or self.output.parent / "mining"

    @property
    def depth(self) -> int:
        """Documents to search for each query: room for positives among the best, and to fill."""
        return min(MAX_DEPTH, self.window.last + 64)

    @property
    def num_kept(self) -> int:
        """Candidates of a query that are kept; a teacher that removes some needs more."""
        spare = 2 if self.teacher is not None and self.teacher.margin is not None else 1
        return max(self.candidates, spare * self.negatives)

    def margin_of(self, retriever: RetrieverConfig) -> MarginConfig:
        """Return the margin that holds for a retriever's scores."""
        return retriever.margin or self.margin
