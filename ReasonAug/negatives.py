"""Find hard negatives: the lexically nearest texts (BM25) that are not an answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), eq. 3.15
_K1 = 1.2
_B = 0.75


def words(text: str) -> list[str]:
    """Return the lower-case words and numbers of `text`."""
    return re.findall(r"[a-z]+|\d+", text.lower())


class Bm25:
    """BM25 scores of all queries against a fixed list of documents, by one matrix product."""

    def __init__(self, documents: Sequence[str]) -> None:
        counts = [Counter(words(document)) for document in documents]
        self._columns = {
            word: i for i, word in enumerate(sorted({w for count in counts for w in count}))
        }
        frequency = np.zeros((len(documents), len(self._columns)), dtype=np.float32)
        for row, count in enumerate(counts):
            for word, times in count.items():
                frequency[row, self._columns[word]] = times
        lengths = frequency.sum(axis=1, keepdims=True)
        containing = (frequency > 0).sum(axis=0)
        idf = np.log1p((len(documents) - containing + 0.5) / (containing + 0.5))
        saturation = frequency + _K1 * (1 - _B + _B * lengths / lengths.mean())
        self._weights = idf * frequency * (_K1 + 1) / saturation

    def scores(self, queries: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return scores, shape (number of queries, number of documents)."""
        asked = np.zeros((len(queries), len(self._columns)), dtype=np.float32)
        for row, query in enumerate(queries):
            for word in words(query):
                if word in self._columns:
                    asked[row, self._columns[word]] += 1
        product: npt.NDArray[np.float32] = (asked @ self._weights.T).astype(np.float32)
        return product


def nearest_others(
    queries: Sequence[str],
    query_labels: Sequence[str],
    documents: Sequence[str],
    document_labels: Sequence[str],
    *,
    count: int,
) -> list[list[int]]:
    """Return, for each query, the best-scoring documents with another label, best first.

    Returns:
        Per query, indices into `documents`, at most `count`.
    """
    scores = Bm25(documents).scores(queries)
    labels = np.asarray(document_labels)
    result = []
    for row, label in zip(scores, query_labels, strict=True):
        others = np.flatnonzero(labels != label)
        order = np.argsort(-row[others], kind="stable")[:count]
        result.append([int(i) for i in others[order]])
    return result
