"""Search an index of faiss instead of all pairs, and measure what it misses.

    documents' vectors --train, add--> index-KEY/index.faiss --search--> 2K documents of each query
        --float64--> the best K;   sampled queries --exact_search--> found-KEY/recall-256.json

Only the choice of documents is approximate. Their scores are the float64 products of an exact
search, so margins and percentiles mean the same with and without an index.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import IndexConfig, MineConfig
from pipeline.data.batch import IntArray
from pipeline.errors import UserError, blame
from pipeline.exact_search import Corpus, Found, best_of
from pipeline.files import atomic_path, hash_file, map_vectors, read_record, write_sealed
from pipeline.mining.plan import Mining, delete_and_mine

# Documents to fetch for each wanted one: an index that stores shortened vectors orders its best
# documents badly, and the float64 scores put them in order.
_FETCHED = 2
# Recall is also measured among the first few, where most negatives come from.
_NEAREST = 10


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """Share of the exact search's documents that the index finds, over a sample of queries.

    Attributes:
        queries: searched both ways.
        depth: documents of a search.
        share: of the exact `depth` best that are among the index's.
        nearest: of the exact ten best that are among the index's ten best.
    """

    queries: int
    depth: int
    share: float
    nearest: float

    def __str__(self) -> str:
        return (
            f"{self.share:.1%} of the exact best {self.depth:,} and {self.nearest:.1%} of the best "
            f"{min(self.depth, _NEAREST)}, in {self.queries:,} queries"
        )


def indexed_retrievers(config: MineConfig) -> list[int]:
    """Return the numbers of the retrievers that search an index."""
    return [n for n, retriever in enumerate(config.retrievers) if retriever.index is not None]


def _settings(mining: Mining, number: int) -> IndexConfig:
    settings = mining.config.retrievers[number].index
    assert settings is not None
    return settings


def _record(mining: Mining, number: int) -> Path:
    """Return the file whose existence means that the index is complete; it holds its hash."""
    return mining.store("index", number) / "index.json"


def index_records(mining: Mining) -> list[Path]:
    """Return the last file of each index."""
    return [_record(mining, number) for number in indexed_retrievers(mining.config)]


def recall_files(mining: Mining) -> list[Path]:
    """Return the file of each index's recall."""
    return [
        mining.store("found", number) / f"recall-{_settings(mining, number).sample}.json"
        for number in indexed_retrievers(mining.config)
    ]


def build_index(mining: Mining, corpus: Corpus, number: int) -> None:
    """Train the index of a retriever on evenly spaced documents, and add all documents to it.

    Raises:
        UserError: faiss cannot build this index from these vectors.
    """
    import faiss

    settings = _settings(mining, number)
    name = mining.config.retrievers[number].name
    rows = _evenly_spaced(len(corpus), settings.train)
    sample_ND = corpus.gather(rows)
    # Left alone, faiss starts a thread for each core in every process of the machine.
    faiss.omp_set_num_threads(torch.get_num_threads())
    with blame(
        f"retrievers.{name}.index: {settings.factory} for {len(corpus):,} vectors of width "
        f"{sample_ND.shape[1]}, trained on {len(rows):,}",
        fix="give another factory; the vectors are kept",
    ):
        index = faiss.index_factory(
            sample_ND.shape[1], settings.factory, faiss.METRIC_INNER_PRODUCT
        )
        index.train(sample_ND)
        # A million rows of width 1024 are 4 GB, next to the index that grows below.
        del sample_ND
        for _, tile_MD in corpus.tiles():
            index.add(tile_MD.astype(np.float32))
    record = _record(mining, number)
    path = record.with_name("index.faiss")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        # Through Python's file, whose errors name a full disk; faiss's own have a text only.
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    # Last: a record means that the index is whole.
    write_sealed(record, {"content": hash_file(path)})


def _evenly_spaced(total: int, count: int) -> IntArray:
    """Return at most `count` of the numbers 0..total-1, ascending.

    From everywhere, because the documents of a corpus stand together, and so do a source's queries.
    """
    found: IntArray = np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
    return found


@functools.lru_cache(maxsize=1)
def _open(record: Path, parameters: str) -> Any:
    """Open an index once per process, which then compares its hash once."""
    import faiss

    fix = delete_and_mine(record.parent)
    path = record.with_name("index.faiss")
    # faiss does not check what it reads: damaged bytes would be other neighbours, or a crash.
    with blame(f"{path}: damaged", fix=fix):
        digest = hash_file(path)
    if digest != read_record(record, dict[str, str], fix=fix)["content"]:
        raise UserError(f"{path}: damaged (its content does not match its hash)", fix=fix)
    # Mapped where the kind of index allows, so that the processes of a machine share its pages.
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    faiss.ParameterSpace().set_index_parameters(index, parameters)
    return index


def search_index(
    mining: Mining, corpus: Corpus, number: int, queries_QD: NDArray[np.floating]
) -> Found:
    """Return the best documents that a retriever's index finds; -1 and NaN where it finds fewer."""
    import faiss

    depth = min(mining.config.depth, len(corpus))
    index = _open(_record(mining, number), _settings(mining, number).parameters)
    faiss.omp_set_num_threads(torch.get_num_threads())
    queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
    # (Q, 2K) numbers; an index with too few documents in the parts it looked at pads with -1, whose
    # score is NaN, so that they are sorted last.
    _, fetched_QK = index.search(queries_QD, min(_FETCHED * depth, len(corpus)))
    documents, scores = best_of(corpus.score(queries_QD, fetched_QK), fetched_QK, depth)
    return Found(documents=documents, scores=scores)


def measure_recall(mining: Mining, corpus: Corpus, number: int, path: Path) -> None:
    """Search evenly spaced queries both ways, and write how many documents the index found."""
    sample = _evenly_spaced(len(mining.source.examples), _settings(mining, number).sample)
    model, vectors = mining.plan.retrievers[number], []
    for place, block in enumerate(mining.query_blocks):
        own = sample[block.slice_of(sample)]
        # Most blocks have none, and mapping a file hashes it.
        if len(own):
            source = mining.vectors(model, "queries", place)
            mapped = map_vectors(source, fix=delete_and_mine(source))
            vectors.append(mapped[own - block.first])
    queries_QD = np.concatenate(vectors)
    exact = corpus.search(queries_QD, mining.config.depth).documents
    found = search_index(mining, corpus, number, queries_QD).documents
    recall = Recall(
        queries=len(sample),
        depth=exact.shape[1],
        share=_share(exact, found),
        nearest=_share(exact[:, :_NEAREST], found[:, :_NEAREST]),
    )
    write_sealed(path, dataclasses.asdict(recall))


def _share(exact_QK: NDArray[np.int64], found_QK: NDArray[np.int64]) -> float:
    # The exact search has no -1, so padding of the index is never a hit.
    hits = [len(np.intersect1d(a, b)) for a, b in zip(exact_QK, found_QK, strict=True)]
    return float(np.mean(hits) / exact_QK.shape[1])


def read_recalls(mining: Mining) -> dict[str, Recall]:
    """Return the recall of each index, by the retriever's name."""
    numbers = indexed_retrievers(mining.config)
    return {
        mining.config.retrievers[number].name: read_record(path, Recall, fix=f"delete {path}")
        for number, path in zip(numbers, recall_files(mining), strict=True)
    }
