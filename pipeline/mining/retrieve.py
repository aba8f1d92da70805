"""Embed texts with each retriever, and find each query's best documents.

texts --embed_block--> vectors-KEY/documents/000000.npy --exact_search-> found-KEY/000000.npz
                                                        --approximate----> (the same)
      --index_words--> vectors-KEY/index                --bm25s----------> (the same)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Precision, RetrieverConfig, Role, TeacherConfig, Template
from pipeline.data.batch import Ragged
from pipeline.errors import UserError, blame
from pipeline.evaluation.models import (
    TemplatedEmbedder,
    device_here,
    load_here,
    not_finite_fix,
    require_finite,
    resolve_precision,
    share_cores,
)
from pipeline.exact_search import Corpus, VectorFile, top_of_row
from pipeline.files import (
    load_arrays,
    map_vectors,
    read_record,
    save_arrays,
    save_vectors,
    write_sealed,
    write_text,
)
from pipeline.mining.approximate import (
    build_index,
    indexed_retrievers,
    measure_recall,
    recall_files,
    search_index,
)
from pipeline.mining.plan import Mining, ModelPlan, delete_and_mine, is_bm25
from pipeline.mining.texts import positives_of, read_texts
from pipeline.model.load_export import is_computed, read_template

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Packed tokens of one forward.
_MAX_TOKENS = 16384
# Half the disk of float32. Every score is of these rounded values, by an index as by all pairs.
_STORED = "float16"


# One at a time: tasks come model by model, and two models may not fit on a GPU.
@functools.lru_cache(maxsize=1)
def _load(
    folder: str,
    fingerprint: str,
    template: Template | None,
    max_length: int | None,
    precision: Precision,
) -> TemplatedEmbedder:
    """Load a bi-encoder on this process's device; the fingerprint notices another one there."""
    if not is_computed(Path(folder)):
        return load_foreign(
            Path(folder), template=template, max_length=max_length, precision=precision
        )
    export = load_here(Path(folder), max_tokens=_MAX_TOKENS, precision=precision)
    if max_length is not None:
        export = export.with_max_length(max_length, key="max_length")
    return TemplatedEmbedder(
        encoder=export,
        template=template or export.template,
        name=folder,
        precision=export.encoder.config.dtype,
        normalize=export.similarity == "cosine" and not export.encoder.config.normalize,
    )


def embed_block(
    mining: Mining,
    model: ModelPlan,
    config: RetrieverConfig | TeacherConfig,
    role: str,
    block: int,
) -> None:
    """Write the vectors of a block of documents or queries by one model."""
    settings = config.template, config.max_length, config.precision
    embedder = _load(model.folder, model.fingerprint, *settings)
    _record_precision(mining, model, embedder.precision)
    texts = read_texts(mining, role, block)
    pairs = list(zip(texts["instruction"].to_pylist(), texts["text"].to_pylist(), strict=True))
    # Queries recur, with other positives; each text is embedded once. Sorted, because a set has
    # another order in every process, and other batches could change the last bits of a vector.
    distinct = sorted(set(pairs))
    place = {pair: number for number, pair in enumerate(distinct)}
    parts = []
    # By instruction, because each has its own prefix; in the order of `distinct`.
    for instruction in dict.fromkeys(name for name, _ in distinct):
        chosen = [text for name, text in distinct if name == instruction]
        as_role: Role = "document" if role == "documents" else "query"
        parts.append(embedder.embed(as_role, instruction, chosen))
    # Values beyond float16 become infinite without a warning; `require_finite` refuses them.
    with np.errstate(over="ignore"):
        vectors_ND = np.concatenate(parts).astype(_STORED)
    require_finite(
        vectors_ND,
        [text for _, text in distinct],
        source=f"{model.folder}: vectors stored as {_STORED}",
        fix=not_finite_fix(embedder.precision),
    )
    # Back to a vector per query, in the order of the block.
    rows = [place[pair] for pair in pairs]
    save_vectors(mining.vectors(model, role, block), vectors_ND[rows])


def _record_precision(mining: Mining, model: ModelPlan, precision: str) -> None:
    """Refuse to add vectors of another precision to a folder: `auto` depends on the machine."""
    path = mining.vectors_folder(model) / "precision.json"
    # Several processes may write it at once: on machines of one kind, the same value.
    if not path.is_file():
        write_sealed(path, {"precision": precision})
    found = read_record(path, dict[str, str], fix=f"delete {path.parent}")["precision"]
    if found != precision:
        raise UserError(
            f"{path.parent}: vectors in {found}; this machine computes in {precision}",
            fix="give the model a precision in the config, or continue on machines of one kind",
        )


def embed_retriever_block(mining: Mining, task: int) -> None:
    """Embed one block by one retriever: task counts blocks of all of them."""
    number, role, block = embedding_tasks(mining)[task]
    model, retriever = mining.plan.retrievers[number], mining.config.retrievers[number]
    embed_block(mining, model, retriever, role, block)


def embedding_tasks(mining: Mining) -> list[tuple[int, str, int]]:
    """Return retriever, role and block of each task."""
    return [
        (number, role, block)
        for number, retriever in enumerate(mining.config.retrievers)
        if not is_bm25(retriever)
        for role, block in mining.text_blocks
    ]


# --- BM25 ------------------------------------------------------------------------------------


def _words(texts: list[str]) -> Any:
    """Return the words of each text, the same of documents and queries."""
    import bm25s

    # By default English stop words are dropped, but texts may be in any language.
    return bm25s.tokenize(texts, stopwords=[], return_ids=False, show_progress=False)


def bm25_index(mining: Mining, number: int) -> Path:
    """Return the file whose existence means that a retriever's index of words is complete."""
    return mining.vectors_folder(mining.plan.retrievers[number]) / "complete"


def index_words(mining: Mining, task: int) -> None:
    """Count the words of all documents; the index of a corpus is built in one process.

    Raises:
        UserError: there are none.
    """
    import bm25s

    number = bm25_retrievers(mining)[task]
    texts: list[str] = []
    for block in range(len(mining.document_blocks)):
        texts += read_texts(mining, "documents", block)["text"].to_pylist()
    words = _words(texts)
    if not any(words):  # the package fails on an empty vocabulary
        raise UserError(
            f"retrievers.{mining.config.retrievers[number].name}: no document has a word of two "
            "letters or more, the least that bm25 reads",
            fix="take an embedder as the retriever",
        )
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    path = bm25_index(mining, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    index.save(path.parent / "index", show_progress=False)
    # Last: an index without this file was cut short, and is built again.
    write_text(path, "")


def bm25_retrievers(mining: Mining) -> list[int]:
    """Return the numbers of the retrievers that are BM25."""
    return [n for n, retriever in enumerate(mining.config.retrievers) if is_bm25(retriever)]


@functools.lru_cache(maxsize=1)
def _open_index(folder: Path) -> Any:
    import bm25s

    # Mapped, so that the processes of a machine share its pages.
    return bm25s.BM25.load(folder, mmap=True, show_progress=False)


# --- search ----------------------------------------------------------------------------------


def search_block(mining: Mining, task: int) -> None:
    """Find the best documents of one block of queries by one retriever."""
    # Retriever by retriever, so that a process opens the vectors or the index of each only once.
    number, block = divmod(task, len(mining.query_blocks))
    positives = positives_of(mining, mining.query_blocks[block].numbers)
    search = _search_words if is_bm25(mining.config.retrievers[number]) else _search_vectors
    documents, scores, positive_scores = search(mining, number, block, positives)
    save_arrays(
        mining.block_file("found", block, number),
        documents=documents,
        scores=scores,
        positive_scores=positive_scores,
    )


# (Q, K) documents, best first and padded with -1; (Q, K) their scores; scores of all positives, in
# the order of the ragged positives: margins need them, however far behind the K best they are.
_Results = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]


def _search_vectors(mining: Mining, number: int, block: int, positives: Ragged) -> _Results:
    model = mining.plan.retrievers[number]
    corpus = open_corpus(mining, model)
    path = mining.vectors(model, "queries", block)
    queries_QD = map_vectors(path, fix=delete_and_mine(path))
    if model.index:
        found = search_index(mining, corpus, number, queries_QD)
    else:
        found = corpus.search(queries_QD, mining.config.depth)
    return found.documents, found.scores, score_listed(corpus, queries_QD, positives)


def index_vectors(mining: Mining, task: int) -> None:
    """Build one retriever's approximate index; in one process, which holds it in memory."""
    number = indexed_retrievers(mining.config)[task]
    build_index(mining, open_corpus(mining, mining.plan.retrievers[number]), number)


def compare_searches(mining: Mining, task: int) -> None:
    """Measure the recall of one retriever's index."""
    number = indexed_retrievers(mining.config)[task]
    corpus = open_corpus(mining, mining.plan.retrievers[number])
    measure_recall(mining, corpus, number, recall_files(mining)[task])


def score_listed(
    corpus: Corpus, queries_QD: NDArray[np.floating], listed: Ragged
) -> NDArray[np.float64]:
    """Score each query's own list of documents; return one value for each, in their order."""
    # A row per query, padded by -1: the (Q, K) table that `Corpus.score` reads.
    table_QK = np.full((len(listed), int(listed.lengths.max(initial=0))), -1, dtype=np.int64)
    is_listed = np.arange(table_QK.shape[1]) < listed.lengths[:, None]
    table_QK[is_listed] = listed.values
    return corpus.score(queries_QD, table_QK)[is_listed]


def open_corpus(mining: Mining, model: ModelPlan) -> Corpus:
    """Return the documents' vectors by one model."""
    share_cores()
    files = tuple(
        VectorFile(
            path=mining.vectors(model, "documents", number), start=block.first, rows=block.rows
        )
        for number, block in enumerate(mining.document_blocks)
    )
    return _corpus(files)


@functools.lru_cache(maxsize=1)
def _corpus(files: tuple[VectorFile, ...]) -> Corpus:
    """Open a corpus once per process, which then hashes each file once."""
    return Corpus(files, device=device_here())


def _search_words(mining: Mining, number: int, block: int, positives: Ragged) -> _Results:
    index = _open_index(bm25_index(mining, number).parent / "index")
    texts = read_texts(mining, "queries", block)["text"].to_pylist()
    depth = min(mining.config.depth, mining.num_documents)
    documents = np.full((len(texts), depth), -1, dtype=np.int64)
    scores = np.full((len(texts), depth), np.nan)
    own = []
    for row, words in enumerate(_words(texts)):
        # Words that no document has add nothing to a score, and bm25s takes no empty list.
        known = [word for word in words if word in index.vocab_dict]
        every = index.get_scores(known) if known else np.zeros(mining.num_documents, np.float32)
        best = top_of_row(every, depth)
        documents[row, : len(best)], scores[row, : len(best)] = best, every[best]
        # Every document has a score already, also positives far below the best.
        own.append(every[positives[row]].astype(np.float64))
    return documents, scores, np.concatenate(own)


def read_found(mining: Mining, retriever: int, block: int) -> dict[str, NDArray[Any]]:
    """Return what `search_block` found: `documents`, `scores`, `positive_scores`."""
    path = mining.block_file("found", block, retriever)
    return load_arrays(path, "documents", "scores", "positive_scores", fix=f"delete {path}")


# --- models that this package does not compute -----------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ForeignEncoder:
    """A `TextEncoder` that leaves everything to sentence-transformers.

    Slower than `LoadedExport`, because texts are padded; but any architecture and modules work.

    Attributes:
        model: in evaluation mode on its device.
    """

    model: SentenceTransformer

    def encode_texts(
        self, texts: Sequence[str], prefix: str = "", suffix: str = ""
    ) -> NDArray[np.float32]:
        """(N,) texts -> (N, D) float32; cut at the model's length.

        Raises:
            UserError: there is a suffix, which cutting would remove from long texts alone.
        """
        if suffix:
            raise UserError(
                f"template: {suffix!r} after the text, for a model that sentence-transformers runs",
                fix="give a template that ends with {text}",
            )
        # As a prompt, because some models leave its tokens out of the pooling.
        vectors = self.model.encode(list(texts), prompt=prefix, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)


def load_foreign(
    folder: Path, *, template: Template | None, max_length: int | None, precision: Precision
) -> TemplatedEmbedder:
    """Load a sentence-transformers folder on this process's device.

    Args:
        folder: in sentence-transformers layout; its own code is not run.
        template: in place of the folder's prompts.
        max_length: in tokens; None: the folder's.
        precision: of weights and arithmetic.

    Raises:
        UserError: sentence-transformers cannot load it, or has no positions for `max_length`.
    """
    # Imported here: it takes seconds, and most models do without.
    from sentence_transformers import SentenceTransformer

    share_cores()
    dtype = resolve_precision(precision)
    with blame(f"{folder}: sentence-transformers cannot load it", fix="take another model"):
        model = SentenceTransformer(
            str(folder),
            device=str(device_here()),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": dtype},
        )
    if max_length is not None:
        longest = model.max_seq_length
        if longest is not None and max_length > longest:
            raise UserError(
                f"max_length: {max_length}", allowed=f"at most {longest} tokens for {folder}"
            )
        model.max_seq_length = max_length
    return TemplatedEmbedder(
        encoder=ForeignEncoder(model=model),
        template=template or read_template(folder),
        name=str(folder),
        precision=dtype,
        # Cosine where the folder names no similarity, and in place of a distance: the search knows
        # dot products only.
        normalize=model.similarity_fn_name != "dot",
    )
