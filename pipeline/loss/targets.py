"""What the loss is told about a global batch, and what it answers."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RaggedIndex:
    """Rows of differing length: row i holds `values[offsets[i]:offsets[i + 1]]`."""

    offsets: Tensor  # (rows + 1,) int64
    values: Tensor  # (entries,) int64

    def entries(self, rows_R: Tensor) -> tuple[Tensor, Tensor]:
        """Every entry of the chosen rows.

        Args:
            rows_R: (R,) which rows.

        Returns:
            (P,) place within `rows_R` that the entry belongs to, ascending, and (P,) its position
            in `values`.
        """
        starts_R = self.offsets[rows_R]
        counts_R = self.offsets[rows_R + 1] - starts_R
        row_P = torch.repeat_interleave(counts_R)
        first_R = counts_R.cumsum(0) - counts_R
        within_P = torch.arange(row_P.numel(), device=row_P.device) - first_R[row_P]
        return row_P, starts_R[row_P] + within_P


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Which documents each query of the global batch should and should not find.

    The three ragged tables have one row per global query and hold global document indices; they
    are the same on every rank. Together the ranks hold each query and each document exactly once.
    """

    num_queries: int
    num_documents: int
    query_index: Tensor  # (B,) int64: global index of each query row of this rank
    document_index: Tensor  # (K,) int64: global index of each document row of this rank
    positives: RaggedIndex  # at least one each
    negatives: RaggedIndex  # each query's own hard negatives, any number
    masked: RaggedIndex  # documents that must not count as negatives; a positive is always exempt
    teacher_positives: Tensor | None = None  # a teacher's score of every `positives.values`
    teacher_negatives: Tensor | None = None  # and of every `negatives.values`


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """The loss of the global batch and its gradient by the embeddings of this rank.

    The gradients are exactly d(global mean loss) / d(own embeddings). They are *not* multiplied by
    the world size: whoever averages gradients over ranks has to undo that.
    """

    loss: Tensor  # () float32, the same on every rank
    query_grad: Tensor  # (B, E) float32
    document_grad: Tensor  # (K, E) float32
    temperature_grad: float | None  # d(loss) / d(temperature) where it is learned, on every rank
    metrics: dict[str, float]  # the same on every rank
