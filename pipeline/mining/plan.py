"""Name every file of a mining by what it was computed from.

    STORE/texts-KEY/      corpora/, documents/, queries/, known.npz   texts, known positives
    STORE/marks-KEY/      a file for each block, contamination/       duplicates, evaluation sets
    STORE/vectors-KEY/    documents/, queries/; index/ of BM25        one folder for each model
    STORE/index-KEY/      index.faiss                                 of an approximate retriever
    STORE/found-KEY/      a file for each block, recall-N.json        one folder for each retriever
    STORE/picked-KEY/     a file for each block, levels.json          candidates within all rules
    STORE/teacher-KEY/    a file for each block                       the teacher's scores of these
    .OUTPUT.building/     dataset/, summaries/, claims/               the shards until all are there
    .OUTPUT.plan.json                                                 the keys, until then

A KEY is a hash of everything that decides the files: content of the data, weights, settings and the
keys of earlier steps. So nothing stale is ever found, and a changed setting repeats only the steps
that depend on it. Tasks are blocks of rows; their number does not depend on the workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.config import (
    BM25,
    IndexConfig,
    MineConfig,
    RetrieverConfig,
    SourceConfig,
    TeacherConfig,
    as_tree,
)
from pipeline.data.batch import IntArray
from pipeline.data.manifest import FILE_NAME, LengthHistogram, Manifest, ShardInfo, read_manifest
from pipeline.data.prepare.recipe import identify_inputs
from pipeline.data.shards import DOCUMENT_SCHEMA, Dataset, Table
from pipeline.data.sources.corpus import corpus_files
from pipeline.errors import UserError, blame
from pipeline.exact_search import TILE
from pipeline.files import read_record
from pipeline.model.export_folder import export_fingerprint

T = TypeVar("T")
# Part of every key. Raise it when the same inputs would give other files: what older versions left
# in a store is then computed again instead of being mixed with new files.
_VERSION = 1
# Rows of one task: a block of documents is one tile of the search, whose scores against a block of
# queries are 8192 x 2048 in float32, 64 MiB.
BLOCK_ROWS = TILE
QUERY_ROWS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Some rows of one shard: numbers first..first+rows-1 of the dataset."""

    shard: int
    first: int
    rows: int

    @property
    def numbers(self) -> IntArray:
        """Numbers of the rows in the dataset."""
        return np.arange(self.first, self.first + self.rows, dtype=np.int64)

    def slice_of(self, numbers: IntArray) -> slice:
        """Return the slice of some ascending numbers of rows that lies in this block."""
        start, stop = np.searchsorted(numbers, [self.first, self.first + self.rows])
        return slice(int(start), int(stop))


def cut_into_blocks(shards: list[ShardInfo], rows: int) -> list[Block]:
    """Divide shards into blocks; none holds rows of two shards."""
    blocks, first = [], 0
    for number, shard in enumerate(shards):
        for start in range(0, shard.rows, rows):
            size = min(rows, shard.rows - start)
            blocks.append(Block(shard=number, first=first + start, rows=size))
        first += shard.rows
    return blocks


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CorpusReport:
    """The documents of the further corpora, as shards."""

    # File names are numbered from 0; `write.complete` numbers them on from the dataset's.
    shards: tuple[ShardInfo, ...]
    lengths: LengthHistogram
    read: dict[str, int]  # documents of each corpus
    repeated: dict[str, int]  # of these, documents that the dataset or an earlier corpus has
    # Records of each corpus that are no documents, by reason; in no store of an earlier version.
    left_out: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """A retriever or teacher: its folder on this machine, and the keys of its files.

    Attributes:
        folder: of the model; `bm25` or an endpoint's address for what has none.
        fingerprint: of its weights and settings, without the data.
        vectors: key of its vectors, or of its index for BM25.
        found: key of its search results, or of a teacher's scores.
        index: key of its approximate index; empty without one.
    """

    folder: str
    fingerprint: str
    vectors: str
    found: str = ""
    index: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MinePlan:
    """Everything the tasks must agree on; written once by the main process, read by all."""

    data: str  # fingerprint of the dataset
    texts: str
    marks: str
    retrievers: tuple[ModelPlan, ...]
    picked: str
    teacher: ModelPlan | None
    result: str  # fingerprint of the whole mining


@dataclasses.dataclass(frozen=True)
class Mining:
    """A mining and the paths of its files. Picklable, so that worker processes can share it."""

    config: MineConfig

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: it maps files itself."""
        return {"config": self.config}

    @property
    def building(self) -> Path:
        """The folder of the shards before it gets its final name."""
        target = self.config.output.resolve()
        return target.with_name(f".{target.name}.building")

    @property
    def plan_path(self) -> Path:
        """The plan, next to the folder of the shards to be, which a start may delete."""
        target = self.config.output.resolve()
        return target.with_name(f".{target.name}.plan.json")

    @functools.cached_property
    def plan(self) -> MinePlan:
        """The plan on disk."""
        return read_record(self.plan_path, MinePlan, fix="run `diffembed mine` again")

    @property
    def teacher(self) -> tuple[TeacherConfig, ModelPlan]:
        """Config and plan of the teacher, for steps that no mining without a teacher has."""
        config, model = self.config.teacher, self.plan.teacher
        assert config is not None and model is not None
        return config, model

    @functools.cached_property
    def source(self) -> Dataset:
        """The dataset whose examples are mined."""
        return Dataset.open(self.config.data)

    @functools.cached_property
    def corpora(self) -> CorpusReport:
        """The documents of the further corpora."""
        path = self.store("texts") / "corpora.json"
        return read_record(path, CorpusReport, fix=f"delete {path.parent}")

    @functools.cached_property
    def added(self) -> Table:
        """The documents of the further corpora, numbered from 0."""
        return Table(self.store("texts") / "corpora", self.corpora.shards, DOCUMENT_SCHEMA)

    @functools.cached_property
    def document_blocks(self) -> list[Block]:
        """Blocks of all documents: the dataset's, then the corpora's, once these were read."""
        shards = [*self.source.manifest.document_shards, *self.corpora.shards]
        return cut_into_blocks(shards, BLOCK_ROWS)

    @functools.cached_property
    def query_blocks(self) -> list[Block]:
        """Blocks of all examples."""
        return cut_into_blocks(list(self.source.manifest.example_shards), QUERY_ROWS)

    def blocks(self, role: str) -> list[Block]:
        """Return the blocks of `documents` or `queries`."""
        return self.document_blocks if role == "documents" else self.query_blocks

    @property
    def text_blocks(self) -> list[tuple[str, int]]:
        """Role and number of each block of texts: of documents, then of queries."""
        roles = ("documents", "queries")
        return [(role, number) for role in roles for number in range(len(self.blocks(role)))]

    @property
    def num_documents(self) -> int:
        """Documents of the dataset and of the corpora."""
        last = self.document_blocks[-1]
        return last.first + last.rows

    def store(self, kind: str, retriever: int = 0) -> Path:
        """Return the folder of one kind of files; some kinds have one for each retriever."""
        plan = self.plan
        if kind in ("index", "found"):
            key = getattr(plan.retrievers[retriever], kind)
        elif kind == "teacher":
            key = self.teacher[1].found
        else:
            key = getattr(plan, kind)
        return self.config.store_folder / f"{kind}-{key}"

    def texts(self, role: str, block: int) -> Path:
        """Return the file of a block's texts: `text`, `instruction`, `key` (hash of the text)."""
        return self.store("texts") / role / f"{block:06d}.arrow"

    def marks(self, block: int) -> Path:
        """Return the file of a block's signatures, and which documents are in an evaluation set."""
        return self.store("marks") / f"{block:06d}.npz"

    def vectors_folder(self, model: ModelPlan) -> Path:
        """Return the folder of a model's vectors, or of the index of BM25."""
        return self.config.store_folder / f"vectors-{model.vectors}"

    def vectors(self, model: ModelPlan, role: str, block: int) -> Path:
        """Return the file of a model's vectors of a block of documents or queries."""
        return self.vectors_folder(model) / role / f"{block:06d}.npy"

    def block_file(self, kind: str, block: int, retriever: int = 0) -> Path:
        """Return the file of a block of queries in the folder `found`, `picked` or `teacher`."""
        return self.store(kind, retriever) / f"{block:06d}.npz"

    def summary(self, kind: str, task: int) -> Path:
        """Return the file whose existence means that a task of `examples` or `vectors` is done."""
        return self.building / "summaries" / f"{kind}-{task:05d}.json"


def delete_and_mine(path: Path) -> str:
    """Return the fix for a damaged file: every file of a store can be computed again."""
    return f"delete {path} and run `diffembed mine` again"


# By folder and name. Not in `Mining`: a child process gets a new copy of that with every task.
_opened: dict[tuple[Path, str], Any] = {}


def once(folder: Path, name: str, make: Callable[[], T]) -> T:
    """Return what `make` returned for a folder of the store when it was first called here."""
    if (folder, name) not in _opened:
        # One of a kind at a time: a process that mines again must not keep the earlier arrays.
        for key in [key for key in _opened if key[1] == name]:
            del _opened[key]
        _opened[folder, name] = make()
    found: T = _opened[folder, name]
    return found


def key_of(*parts: Any) -> str:
    """Return a short hash of JSON values."""
    text = json.dumps([_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan_mining(config: MineConfig) -> MinePlan:
    """Identify data, models and settings; nothing is computed.

    Raises:
        UserError: something is missing.
    """
    tree, data = as_tree(config), read_manifest(config.data).fingerprint
    with corpora_named():
        corpora = identify_inputs(_corpus_parts(config), None)
    texts = key_of("texts", data, tree["corpora"], corpora)
    sets = identify_inputs((), config.decontaminate)
    # A key holds the keys of what it is computed from: a change reaches what depends on it, and
    # nothing else.
    marks = key_of("marks", texts, tree["decontaminate"], sets, config.near_duplicates)
    retrievers = tuple(_plan_retriever(each, texts, config.depth) for each in config.retrievers)
    # Margins only from here on: with another margin, vectors and search results are used again.
    margins = [as_tree(config.margin_of(retriever)) for retriever in config.retrievers]
    # A teacher that removes candidates needs some to spare.
    spare = config.teacher is not None and config.teacher.margin is not None
    rules = [{key: tree[key] for key in _RULES}, margins, spare]
    picked = key_of("picked", marks, [model.found for model in retrievers], rules)
    teacher = None
    if config.teacher is not None:
        folder, fingerprint = _identify(config.teacher, key="teacher.path")
        teacher = ModelPlan(
            folder=folder,
            fingerprint=fingerprint,
            vectors=key_of("vectors", texts, fingerprint),
            found=key_of("teacher", picked, fingerprint, config.keep_negatives),
        )
    # Only the manifest and the audit have the names of retrievers.
    names = [retriever.name for retriever in config.retrievers]
    result = [picked, teacher and teacher.found, tree["teacher"], names, config.keep_negatives]
    return MinePlan(
        data=data,
        texts=texts,
        marks=marks,
        retrievers=retrievers,
        picked=picked,
        teacher=teacher,
        result=key_of("result", *result),
    )


def _plan_retriever(retriever: RetrieverConfig, texts: str, depth: int) -> ModelPlan:
    """Identify a retriever, and name its vectors of these texts and its results of this depth."""
    folder, fingerprint = _identify(retriever, key=f"retrievers.{retriever.name}.path")
    # Of the model, not of its name in the config: retrievers of one model share vectors.
    vectors = key_of("vectors", texts, fingerprint)
    index, searched = "", [vectors]
    if retriever.index is not None:
        require_index(retriever.index, key=f"retrievers.{retriever.name}.index")
        # Without `sample`, which changes no result: the file of a recall is named by it.
        index = key_of("index", vectors, retriever.index.factory, retriever.index.train)
        searched = [index, retriever.index.parameters]
    found = key_of("found", *searched, depth)
    return ModelPlan(
        folder=folder, fingerprint=fingerprint, vectors=vectors, found=found, index=index
    )


def _corpus_parts(config: MineConfig) -> Iterator[SourceConfig]:
    """Yield sources that consist of the files of the corpora, and of no others."""
    for corpus in config.corpora:
        source = corpus.as_source()
        if corpus.format == "lines":
            yield source
        else:
            # A source in mteb's layout also has queries and judgements, which no mining reads.
            for file in corpus_files(source):
                yield SourceConfig(name=corpus.name, format="lines", path=file)


# Keys that decide which candidates are kept. Were one missing here, a mining with another value of
# it would find the candidates of the earlier one.
_RULES = (
    *("window", "merge", "negatives", "candidates", "choose", "bands", "short", "seed"),
    "near_duplicates",
)


def _identify(model: RetrieverConfig | TeacherConfig, *, key: str) -> tuple[str, str]:
    """Return the folder of a model, and a hash of its weights and settings."""
    if model.path is None:
        assert isinstance(model, TeacherConfig)
        # A server's weights cannot be hashed: another model needs another name, or another store.
        return str(model.url), key_of(model.url, model.model)
    if model.path == BM25:
        # Its version in place of weights: tokens and formula are the package's own.
        return BM25, key_of(BM25, require_bm25(key=key))
    folder = local_folder(model.path, key=key)
    weights = export_fingerprint(Path(folder))
    settings = [as_tree(model)[name] for name in ("template", "max_length", "precision")]
    return folder, key_of(weights, *settings)


def require_bm25(*, key: str) -> str:
    """Return the version of bm25s.

    Raises:
        UserError: it is not installed.
    """
    try:
        return version("bm25s")
    except PackageNotFoundError as error:
        raise UserError(
            f"{key}: {BM25} needs the package bm25s", fix="pip install 'diffembed[mine]'"
        ) from error


# Width of a trial index; the real one is not known before the model is loaded. A multiple of the
# common numbers of parts that an index divides vectors into, which faiss requires.
_ANY_WIDTH = 6720


def require_index(settings: IndexConfig, *, key: str) -> None:
    """Refuse an index that faiss does not know, before anything is embedded for it.

    Raises:
        UserError: faiss is not installed, or cannot read the factory or the parameters.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"{key}: needs the package faiss", fix="pip install 'diffembed[faiss]'"
        ) from error
    allowed = "https://github.com/facebookresearch/faiss/wiki/The-index-factory"
    with blame(f"{key}.factory: {settings.factory!r}", allowed=allowed):
        index = faiss.index_factory(_ANY_WIDTH, settings.factory, faiss.METRIC_INNER_PRODUCT)
    with blame(
        f"{key}.parameters: {settings.parameters!r}",
        allowed="a parameter of this kind of index: nprobe=64 for IVF, efSearch=128 for HNSW",
    ):
        faiss.ParameterSpace().set_index_parameters(index, settings.parameters)


def local_folder(path: str, *, key: str) -> str:
    """Return the folder of a model: the path, or the hub's cache of that name.

    Raises:
        UserError: there is no such folder.
    """
    if Path(path).is_dir():
        return str(path)
    from huggingface_hub import snapshot_download

    with blame(
        f"{key}: {path}",
        allowed="a folder, or the name of a model in the local cache",
        fix="fetch the model with `hf download` on a machine with network",
    ):
        return str(snapshot_download(path, local_files_only=True))


@contextlib.contextmanager
def corpora_named() -> Iterator[None]:
    """Name the key `corpora` in errors of sources: their readers know `sources` only."""
    try:
        yield
    except UserError as error:
        found, fix = (text.replace("sources.", "corpora.") for text in (error.found, error.fix))
        raise UserError(found, allowed=error.allowed, fix=fix) from error


def is_bm25(retriever: RetrieverConfig) -> bool:
    """Return True for the retriever that needs no model."""
    return retriever.path == BM25


def find_change(config: MineConfig, plan: MinePlan, manifest: Manifest) -> str:
    """Describe how a dataset differs from the one that a plan would give."""
    info = manifest.mining
    if info is None:
        return "a dataset that was not mined"
    if info.source != plan.data:
        return f"negatives mined from other data than {config.data} holds now"
    models = dict(zip([r.name for r in config.retrievers], plan.retrievers, strict=True))
    if plan.teacher is not None:
        models["teacher"] = plan.teacher
    for name in sorted(models.keys() | info.models.keys()):
        if name not in models or info.models.get(name) != models[name].fingerprint:
            return f"negatives mined with another model {name!r}: its weights or settings changed"
    now = as_tree(config)
    changed = [key for key, value in info.settings.items() if now.get(key) != value]
    if changed:
        return f"negatives mined with other settings ({', '.join(changed)})"
    # Everything that is recorded is equal, so bytes of an input differ; of these there is one hash.
    paths = [str(corpus.path) for corpus in config.corpora]
    if config.decontaminate is not None:
        paths += [str(each.path) for each in config.decontaminate.sets]
    return f"negatives mined from other inputs (of {', '.join(paths)})"


def is_mined(config: MineConfig) -> bool:
    """Return True if the output was mined from the current data and models by these settings.

    Raises:
        UserError: it holds another dataset.
    """
    if not (config.output / FILE_NAME).is_file():
        return False
    plan, manifest = plan_mining(config), read_manifest(config.output)
    if manifest.recipe == plan.result:
        return True
    raise UserError(
        f"output: {config.output} holds {find_change(config, plan, manifest)}",
        fix="choose another output, or remove it",
    )
