"""What one rank receives for one optimizer step: packed tokens and who belongs to whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """Rows of differing length in one array: row i is `values[offsets[i]:offsets[i + 1]]`.

    offsets is (R + 1,) int64; values is (nnz,) int64 for indices, float32 for scores.
    """

    offsets: IntArray
    values: NDArray[Any]

    @classmethod
    def from_lengths(cls, lengths: IntArray, values: NDArray[Any]) -> Ragged:
        """Rows of the given (R,) lengths, laid one after another in `values`."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(offsets=offsets, values=values)

    @classmethod
    def from_pairs(cls, rows: IntArray, values: IntArray, num_rows: int) -> Ragged:
        """Group (row, value) pairs by row, keeping the order of the pairs within a row."""
        order = np.argsort(rows, kind="stable")
        lengths = np.bincount(rows, minlength=num_rows).astype(np.int64)
        return cls.from_lengths(lengths, values[order])

    @property
    def lengths(self) -> IntArray:
        """(R,) number of values in each row."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> IntArray:
        """(nnz,) the row each value belongs to."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[row] for row in range(len(self)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Rows of one cached forward, packed without padding.

    input_ids is (T,) int64; lengths is (C,) int64 with sum T; texts is (C,) int64, the global text
    index of each row: queries are 0..N-1, documents N..N+M-1. instruction_tokens is (C,) int64, the
    tokens at the front of each row that are the instruction's; None where no row has any. A dummy
    chunk, which only keeps the number of chunks equal on every rank, has one row of one token and
    texts = [-1].
    """

    input_ids: IntArray
    lengths: IntArray
    texts: IntArray
    instruction_tokens: IntArray | None = None

    @property
    def is_dummy(self) -> bool:
        """Whether the chunk holds no text of the batch."""
        return bool(self.texts[0] < 0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """One rank's chunks of a global batch, and the relevance of the whole of it.

    Every text of the batch is in exactly one chunk of exactly one rank; every rank has the same
    number of chunks. All document indices are 0..num_documents-1.
    """

    step: int
    num_queries: int
    num_documents: int
    chunks: tuple[Chunk, ...]
    positives: Ragged  # (N rows) at least one document each
    negatives: Ragged  # (N rows) the query's own hard negatives
    masked: Ragged  # (N rows) known false negatives; never the row's positives or negatives
    example_ids: IntArray  # (N,)
    tokens: int  # real tokens of the global batch, over all ranks
    kind: str = ""  # what its examples have in common (see Order.kinds); empty for a mixture
    # Teacher scores beside `positives` and `negatives`, value for value; None without a teacher.
    positive_scores: Ragged | None = None
    negative_scores: Ragged | None = None
