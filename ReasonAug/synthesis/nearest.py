"""Find hard negatives: the texts of other concepts that are nearest, by BM25 or by vectors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from ReasonAug.negatives import words

_MAX_TOKENS = 4096  # packed tokens of one forward of an export


class Nearest(Protocol):
    """Documents of one shape and domain, to be searched."""

    def search(self, query: str, task: str, label: str, *, count: int) -> list[int]:
        """Return the nearest documents with another label, best first."""


class Finder:
    """Rank documents by score, except documents of the query's own concept."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._own: dict[str, list[int]] = defaultdict(list)
        for number, label in enumerate(labels):
            self._own[label].append(number)

    def best(self, scores_M: NDArray[Any], label: str, count: int) -> list[int]:
        """Return the `count` best of (M,) scores with another label; of equals the earlier."""
        scores_M = scores_M.astype(np.float64)
        own = self._own.get(label, [])
        scores_M[own] = -np.inf
        count = min(count, len(scores_M) - len(own))
        if count <= 0:
            return []
        limit = np.partition(scores_M, -count)[-count]
        (candidates,) = np.nonzero(scores_M >= limit)
        order = np.argsort(-scores_M[candidates], kind="stable")[:count]
        return [int(number) for number in candidates[order]]


class Bm25Nearest(Finder):
    """Nearest by BM25, with bm25s' sparse index."""

    def __init__(self, documents: Iterable[str], labels: Sequence[str]) -> None:
        super().__init__(labels)
        import bm25s

        self._vocabulary: dict[str, int] = {}
        ids = [
            [self._vocabulary.setdefault(word, len(self._vocabulary)) for word in words(text)]
            for text in documents
        ]
        self._count = len(ids)
        self._index = bm25s.BM25(k1=1.2, b=0.75)
        if self._vocabulary:
            tokens = bm25s.tokenization.Tokenized(ids=ids, vocab=self._vocabulary)
            self._index.index(tokens, show_progress=False, create_empty_token=False)

    def search(self, query: str, task: str, label: str, *, count: int) -> list[int]:
        """Return the nearest documents with another label, best first."""
        known = [self._vocabulary[word] for word in words(query) if word in self._vocabulary]
        scores_M = self._index.get_scores(known) if known else np.zeros(self._count)
        return self.best(scores_M, label, count)


class DenseNearest(Finder):
    """Nearest by the cosine of an export's vectors."""

    def __init__(self, embedder: Any, documents: Iterable[str], labels: Sequence[str]) -> None:
        super().__init__(labels)
        self._embedder = embedder
        self._vectors_MD = embedder.embed("document", "", list(documents)).astype(np.float32)

    def search(self, query: str, task: str, label: str, *, count: int) -> list[int]:
        """Return the nearest documents with another label, best first."""
        query_1D = self._embedder.embed("query", task, [query])
        return self.best(self._vectors_MD @ query_1D[0], label, count)


def load_embedder(export: Path) -> Any:
    """Return what embeds with an export.

    Raises:
        UserError: there is no export in this folder.
    """
    if not export.is_dir():
        raise UserError(f"negatives.export: {export}: no such folder")
    from pipeline.evaluation.models import TemplatedEmbedder, load_here

    model = load_here(export, max_tokens=_MAX_TOKENS)
    return TemplatedEmbedder(
        encoder=model, template=model.template, name=str(export), normalize=True
    )
