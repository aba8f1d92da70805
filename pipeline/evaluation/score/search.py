"""Exact search over candidates with bounded memory, as mteb's `SearchProtocol`.

mteb re-ranks query by query and copies nearly the whole corpus for each (measured: 8 s and three
copies of 6.8 GB per query on BRIGHT's largest set). Here documents pass once, block by block: one
matrix product for all queries, candidates kept by a mask, a running top k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.models.encoder import MtebEncoder
from pipeline.evaluation.tasks.texts import document_texts, query_texts

# Documents per block. Bounds memory: 8192 x 4096 dimensions x 4 bytes = 128 MiB.
_BLOCK_DOCUMENTS = 8192

Rankings = dict[str, dict[str, float]]


class ExactSearch:
    """Ranks documents by dot product; keeps the rankings that per-query scores are made of.

    Args:
        encoder: embeds queries and documents.
        block_documents: documents embedded and scored at a time.
    """

    def __init__(self, encoder: MtebEncoder, block_documents: int = _BLOCK_DOCUMENTS) -> None:
        self._encoder = encoder
        self._block_documents = block_documents
        self._corpus: Any = None
        self.mteb_model_meta = encoder.mteb_model_meta
        self.rankings: dict[tuple[str, str], Rankings] = {}

    def index(self, corpus: Any, **kwargs: Any) -> None:
        """Take the corpus; it is embedded while it is searched."""
        self._corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> Rankings:
        """Best `top_k` documents of every query, with scores.

        Args:
            top_ranked: the documents each query may find (FollowIR's candidates, BRIGHT's corpus
                without the excluded ones); all documents where it is None.
        """
        query_ids = list(queries["id"])
        document_ids = list(self._corpus["id"])
        candidates = _candidate_rows(query_ids, document_ids, top_ranked)
        query_QD = self._encoder.embed_queries(query_texts(queries))
        best = TopK(num_queries=len(query_ids), k=top_k)
        for start in range(0, len(document_ids), self._block_documents):
            rows = range(start, min(start + self._block_documents, len(document_ids)))
            block = document_texts(self._corpus.select(rows))
            scores_QM = query_QD @ self._encoder.embed_documents(block).T
            if np.isnan(scores_QM).any():
                raise ValueError(f"{task_metadata.name}: the model returned NaN")
            if candidates is not None:
                scores_QM[~_candidate_mask(candidates, rows)] = -np.inf
            best.add(scores_QM, first_document=start)
        rankings = {
            query_id: {document_ids[row]: score for row, score in found}
            for query_id, found in zip(query_ids, best.rows(), strict=True)
        }
        self.rankings[hf_subset, hf_split] = rankings
        return rankings


class TopK:
    """The k best documents of every query over blocks of documents."""

    def __init__(self, *, num_queries: int, k: int) -> None:
        self._k = k
        self._scores_QK = np.empty((num_queries, 0), dtype=np.float32)
        self._documents_QK = np.empty((num_queries, 0), dtype=np.int64)

    def add(self, scores_QM: np.ndarray, *, first_document: int) -> None:
        """Take a block's scores; -inf marks documents that a query must not find."""
        documents_M = np.arange(first_document, first_document + scores_QM.shape[1])
        scores = np.concatenate([self._scores_QK, scores_QM], axis=1)
        documents = np.concatenate(
            [self._documents_QK, np.broadcast_to(documents_M, scores_QM.shape)], axis=1
        )
        if scores.shape[1] > self._k:
            kept_QK = np.argpartition(-scores, self._k - 1, axis=1)[:, : self._k]
            scores = np.take_along_axis(scores, kept_QK, axis=1)
            documents = np.take_along_axis(documents, kept_QK, axis=1)
        self._scores_QK, self._documents_QK = scores, documents

    def rows(self) -> list[list[tuple[int, float]]]:
        """Per query its (document row, score) pairs, in no particular order."""
        return [
            [
                (int(document), float(score))
                for document, score in zip(documents, scores, strict=True)
                if score > -np.inf
            ]
            for documents, scores in zip(self._documents_QK, self._scores_QK, strict=True)
        ]


def _candidate_rows(
    query_ids: Sequence[str],
    document_ids: Sequence[str],
    top_ranked: Mapping[str, Sequence[str]] | None,
) -> list[np.ndarray] | None:
    """Sorted document rows that each query may find, or None for all."""
    if top_ranked is None:
        return None
    row_of = {document_id: row for row, document_id in enumerate(document_ids)}
    return [
        np.sort(np.array([row_of[d] for d in top_ranked.get(query_id, ())], dtype=np.int64))
        for query_id in query_ids
    ]


def _candidate_mask(candidates: Sequence[np.ndarray], rows: range) -> np.ndarray:
    """(Q, len(rows)) True where the query may find the document."""
    mask = np.zeros((len(candidates), len(rows)), dtype=bool)
    for query, documents in enumerate(candidates):
        first, last = np.searchsorted(documents, (rows.start, rows.stop))
        mask[query, documents[first:last] - rows.start] = True
    return mask
