"""Find each query's best documents exactly, in memory that does not grow with the corpus.

    stored vectors --tiles in float32--> the best K + SLACK --float64--> the best K, ties by number

A product in float32 depends on the shape of its tile and on the device. So float32 only preselects:
every document that its rounding error could have moved across the border is scored again in
float64, in one fixed order of summation. A query with more such documents than the slack is
searched in float64 alone. The result is that of all pairs in float64, bit for bit, for any tile,
number of processes and device.

Letters: Q queries of a block, M documents of a tile, D width of a vector, K documents to find.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import UserError, blame

# Documents of one product; files of vectors hold as many.
TILE = 8192
# Documents that float32 finds in addition to the K wanted ones.
SLACK = 32
# The same, where those are too few because many documents are nearly equal.
_MOST_SLACK = 1024
# A product q d of D numbers is off by at most D u |q| |d| / (1 - D u) in float32, in any order of
# summation, where u = 2^-24 (Higham, "Accuracy and Stability of Numerical Algorithms", 3.1). Twice
# u covers the denominator.
_ERROR = 2.0**-23
# Numbers of the documents' vectors that are gathered at a time: 64 MiB in float32.
_GATHERED = 2**24

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VectorFile:
    """Some rows of a corpus: an npy file of float16 or float32 vectors, followed by their hash.

    Attributes:
        path: written by `files.save_vectors`.
        start: number of its first document.
        rows: number of its documents.
    """

    path: Path
    start: int
    rows: int

    def read(self) -> NDArray[np.floating]:
        """Map the vectors; once the caller drops the array, its pages leave the process."""
        with blame(f"{self.path}: damaged", fix=_fix(self.path)):
            vectors_MD: NDArray[np.floating] = np.load(self.path, mmap_mode="r")
        if vectors_MD.ndim != 2 or len(vectors_MD) != self.rows:
            raise UserError(
                f"{self.path}: damaged ({vectors_MD.shape}, not {self.rows} rows)",
                fix=_fix(self.path),
            )
        return vectors_MD


def _fix(path: Path) -> str:
    return f"delete {path} and run `diffembed mine` again"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """(Q, K) documents, best first, and their scores in float64; -1 after the last document."""

    documents: Numbers
    scores: Floats


class Corpus:
    """The vectors of all documents, in files that are read one after another.

    Args:
        files: in the order of their documents, without gaps.
        device: of the products in float32.
        tile: documents of one product.
    """

    def __init__(
        self, files: Sequence[VectorFile], *, device: torch.device | str = "cpu", tile: int = TILE
    ) -> None:
        self._files, self._device, self._tile = tuple(files), torch.device(device), tile
        self._starts = np.array([file.start for file in files], dtype=np.int64)
        self._verified: set[Path] = set()
        self._width: int | None = None

    def __len__(self) -> int:
        return self._files[-1].start + self._files[-1].rows

    def _open(self, file: VectorFile) -> NDArray[np.floating]:
        """Map a file; its hash is checked once, although every block of queries reads it again."""
        vectors_MD = file.read()
        if file.path not in self._verified:
            with file.path.open("rb") as handle:
                handle.seek(-32, os.SEEK_END)  # the SHA-256 that `files.save_vectors` appends
                seal = handle.read()
            if hashlib.sha256(vectors_MD.data).digest() != seal:
                raise UserError(
                    f"{file.path}: damaged (its content does not match its hash)",
                    fix=_fix(file.path),
                )
            self._verified.add(file.path)
        width = vectors_MD.shape[1]
        self._width = self._width or width
        _require_width(width, self._width, where=str(file.path))
        return vectors_MD

    def tiles(self) -> Iterator[tuple[int, NDArray[np.floating]]]:
        """Yield the first document and the (M, D) vectors of each tile, as they are stored.

        The next tile overwrites the array: fresh ones would leave holes in the heap, more of them
        with every file.
        """
        buffer_MD: NDArray[np.floating] = np.empty(0)
        for file in self._files:
            vectors_MD = self._open(file)
            if buffer_MD.shape[1:] != vectors_MD.shape[1:] or buffer_MD.dtype != vectors_MD.dtype:
                buffer_MD = np.empty((self._tile, vectors_MD.shape[1]), vectors_MD.dtype)
            for start in range(0, file.rows, self._tile):
                part_MD = vectors_MD[start : start + self._tile]
                tile_MD = buffer_MD[: len(part_MD)]
                tile_MD[:] = part_MD
                yield file.start + start, tile_MD

    def gather(self, documents: Numbers) -> NDArray[np.float32]:
        """(N,) ascending documents -> (N, D) float32; opens each file once."""
        parts = []
        owners = np.searchsorted(self._starts, documents, side="right") - 1
        for owner in np.unique(owners).tolist():
            file = self._files[owner]
            # Ascending, so that reads of the mapped file go forward.
            rows = documents[owners == owner] - file.start
            parts.append(self._open(file)[rows].astype(np.float32))
        return np.concatenate(parts)

    def search(self, queries_QD: NDArray[np.floating], k: int) -> Found:
        """Return the K documents of each query with the largest dot products.

        Raises:
            UserError: the vectors of queries and documents differ in width.
        """
        queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
        return self._search(queries_QD, min(k, len(self)), SLACK)

    def _search(self, queries_QD: NDArray[np.float32], k: int, slack: int) -> Found:
        # More than k: float32 may order nearly equal documents differently from float64.
        wanted = min(k + slack, len(self))
        values_QK, documents_QK, largest_norm = self._preselect(queries_QD, wanted)
        documents, scores = best_of(self._rescore(queries_QD, documents_QK), documents_QK, k)
        if wanted < len(self):
            # A document that was left out has at most the last kept value, plus its error. Equal is
            # doubtful, too: its number may be smaller.
            norms_Q = np.linalg.norm(queries_QD.astype(np.float64), axis=1)
            error_Q = _ERROR * queries_QD.shape[1] * largest_norm * norms_Q
            doubtful_Q = scores[:, -1] <= values_QK.min(axis=1) + error_Q
            if doubtful_Q.any():
                left_QD = queries_QD[doubtful_Q]
                # A longer list settles most ties cheaply; a whole pass in float64 is the last
                # resort.
                if slack < _MOST_SLACK:
                    again = self._search(left_QD, k, _MOST_SLACK)
                else:
                    again = self._search_in_float64(left_QD, k)
                documents[doubtful_Q], scores[doubtful_Q] = again.documents, again.scores
        return Found(documents=documents, scores=scores)

    def score(self, queries_QD: NDArray[np.floating], documents_QK: Numbers) -> Floats:
        """(Q, K) float64 products of each query with its own documents; NaN where one is -1."""
        return self._rescore(np.ascontiguousarray(queries_QD, dtype=np.float32), documents_QK)

    def _preselect(self, queries_QD: NDArray[np.float32], k: int) -> tuple[Floats, Numbers, float]:
        """Return (Q, K) values and documents of the best by float32, and the longest vector."""
        queries = torch.from_numpy(queries_QD).to(self._device)
        best = _Best(len(queries), k, self._device)
        product = tile = torch.empty(0, device=self._device)
        largest = 0.0
        for start, tile_MD in self.tiles():
            _require_width(tile_MD.shape[1], queries_QD.shape[1], where="the queries' vectors")
            # Buffers for all tiles: fresh pages for each would cost a tenth of the product.
            if tile.shape != tile_MD.shape:
                tile = torch.empty(tile_MD.shape, device=self._device)
                product = torch.empty(len(queries), len(tile), device=self._device)
            tile.copy_(torch.from_numpy(tile_MD).to(self._device))
            largest = max(largest, float(torch.linalg.vector_norm(tile, dim=1).max()))
            best.add(torch.mm(queries, tile.T, out=product), start)
        values, documents = best.finish()
        return values.double().cpu().numpy(), documents.cpu().numpy(), largest

    def _rescore(self, queries_QD: NDArray[np.float32], documents_QK: Numbers) -> Floats:
        """Score listed documents in float64; numpy sums each row alone, in one fixed order."""
        num_queries, k = documents_QK.shape
        scores = np.full((num_queries, k), np.nan)
        step = max(1, _GATHERED // max(1, k * queries_QD.shape[1]))
        for start in range(0, num_queries, step):
            listed_QK = documents_QK[start : start + step]
            known_QK = listed_QK >= 0
            # (N,) documents, each read once, and the place among them of each known pair, in the
            # order of the queries.
            unique, inverse = np.unique(listed_QK[known_QK], return_inverse=True)
            if not len(unique):
                continue
            vectors = self.gather(unique)
            # One query at a time: what it multiplies stays in the processor's cache.
            ends = np.cumsum(known_QK.sum(axis=1))[:-1]  # of each query's pairs
            for row, places in enumerate(np.split(inverse, ends), start):
                products = vectors[places].astype(np.float64)
                products *= queries_QD[row]
                scores[row, known_QK[row - start]] = products.sum(axis=1)
        return scores

    def _search_in_float64(self, queries_QD: NDArray[np.float32], k: int) -> Found:
        """Score all documents in float64, for queries with very many nearly equal scores."""
        documents = np.empty((len(queries_QD), k), dtype=np.int64)
        scores = np.empty((len(queries_QD), k))
        for row, query_D in enumerate(queries_QD.astype(np.float64)):
            best: tuple[Numbers, Floats] = (np.empty(0, np.int64), np.empty(0))
            for start, tile_MD in self.tiles():
                own = (tile_MD.astype(np.float64) * query_D).sum(axis=1)
                numbers = np.concatenate([best[0], np.arange(start, start + len(own))])
                values = np.concatenate([best[1], own])
                # The last key of lexsort leads: by score, then by number, whatever the tiles were.
                order = np.lexsort((numbers, -values))[:k]
                best = numbers[order], values[order]
            documents[row], scores[row] = best
        return Found(documents=documents, scores=scores)


def _require_width(found: int, expected: int, *, where: str) -> None:
    """Refuse vectors of another width than the others of a search."""
    if found != expected:
        raise UserError(
            f"{where}: vectors of width {found}, the others have {expected}",
            fix="two models have written into one store: delete it and run `diffembed mine` again",
        )


class _Best:
    """The K largest values of each query over the tiles seen so far, unordered among equals.

    Once some tiles have been seen, few values pass a query's border, its K-th value. So a tile is
    compared with it and never sorted whole; what passed is merged when it fills half of the lists.
    """

    def __init__(self, num_queries: int, k: int, device: torch.device) -> None:
        self._k, self._num_queries = k, num_queries
        self._values = torch.empty((num_queries, 0), device=device)
        self._documents = torch.empty((num_queries, 0), dtype=torch.int64, device=device)
        # Rows, documents and values that passed the border of the last merge.
        self._passed: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, scores_QM: torch.Tensor, start: int) -> None:
        """Take the scores of the documents from number `start`; the caller may overwrite them."""
        if self._values.shape[1] < self._k:
            values, places = scores_QM.topk(min(self._k, scores_QM.shape[1]), dim=1)
            self._merge(values, places + start)
            return
        # The border of the last merge: the true one is at least as high, so nothing is lost.
        places = _places_above(scores_QM, self._values[:, -1])
        rows = places // scores_QM.shape[1]
        documents = places % scores_QM.shape[1] + start
        self._passed.append((rows, documents, scores_QM.view(-1)[places]))
        if sum(len(rows) for rows, _, _ in self._passed) > self._num_queries * self._k // 2:
            self._merge_passed()

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (Q, K) values, largest first, and their documents."""
        self._merge_passed()
        return self._values, self._documents

    def _merge_passed(self) -> None:
        if not self._passed:
            return
        rows, documents, values = (torch.cat(parts) for parts in zip(*self._passed, strict=True))
        self._passed = []
        if not len(rows):
            return
        # By query: the table below needs each query's entries side by side.
        order = torch.argsort(rows, stable=True)
        rows, documents, values = rows[order], documents[order], values[order]
        counts = torch.bincount(rows, minlength=self._num_queries)
        # An entry's place within its query: its position minus that of the query's first.
        columns = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        shape = (self._num_queries, int(counts.max()))
        # Padding loses against every score.
        new = torch.full(shape, -torch.inf, device=values.device)
        numbers = torch.zeros(shape, dtype=torch.int64, device=values.device)
        new[rows, columns], numbers[rows, columns] = values, documents
        self._merge(new, numbers)

    def _merge(self, values: torch.Tensor, documents: torch.Tensor) -> None:
        values = torch.cat([self._values, values], dim=1)
        documents = torch.cat([self._documents, documents], dim=1)
        self._values, order = values.topk(min(self._k, values.shape[1]), dim=1)
        self._documents = documents.gather(1, order)


def _places_above(scores_QM: torch.Tensor, border_Q: torch.Tensor) -> torch.Tensor:
    """Return the flat places of the scores above each query's border, ascending."""
    if scores_QM.device.type != "cpu":
        return torch.nonzero((scores_QM > border_Q[:, None]).view(-1)).squeeze(1)
    # On a CPU, numpy finds the few true values of a large mask ten times as fast.
    above = scores_QM.numpy() > border_Q.numpy()[:, None]
    return torch.from_numpy(np.flatnonzero(above))


def best_of(scores_QN: Floats, documents_QN: Numbers, k: int) -> tuple[Numbers, Floats]:
    """Return the K best of each row, ties by number."""
    order = np.lexsort((documents_QN, -scores_QN), axis=1)[:, :k]
    return (
        np.take_along_axis(documents_QN, order, axis=1),
        np.take_along_axis(scores_QN, order, axis=1),
    )


def top_of_row(scores: NDArray[np.floating], k: int) -> Numbers:
    """Return the numbers of the K largest positive scores, best first, ties by number."""
    positive = np.flatnonzero(scores > 0)
    if len(positive) > k:
        border = np.partition(scores[positive], len(positive) - k)[len(positive) - k]
        # At least k of them: equal scores at the border stay, so that their numbers decide.
        positive = positive[scores[positive] >= border]
    order = np.lexsort((positive, -scores[positive]))[:k]
    found: Numbers = positive[order]
    return found
