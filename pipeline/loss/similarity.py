"""Embeddings into the rows whose plain dot product is the score, and gradients back."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from pipeline.loss.tiles import SLICE_ROWS

# As torch.nn.functional.normalize: a zero row stays zero instead of becoming nan.
_SMALLEST_NORM = 1e-12
# Length of a document row under cosine. Any length that is no power of two would do: rounding must
# act afresh on every number, or a document that is already of unit length within float32 keeps its
# last-bit error of length, which moves all its scores together (1e-5 of a probability at 0.01).
DOCUMENT_LENGTH = math.sqrt(2)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRows:
    """Rows `x * scale` or `x / |x| * scale`; norm and product in float64, rounded once."""

    rows_BE: Tensor  # float32
    factor_B: Tensor  # float64: rows = x * factor
    scale: float
    cosine: bool

    @classmethod
    def build(cls, x_BE: Tensor, *, scale: float, cosine: bool) -> ScoreRows:
        """Prepare the embeddings of one side."""
        rows_BE = torch.empty(x_BE.shape, dtype=torch.float32, device=x_BE.device)
        factor_B = torch.full((x_BE.shape[0],), scale, dtype=torch.float64, device=x_BE.device)
        for start in range(0, x_BE.shape[0], SLICE_ROWS):
            here = slice(start, start + SLICE_ROWS)
            wide = x_BE[here].double()
            if cosine:
                factor_B[here] /= wide.norm(dim=1).clamp_min(_SMALLEST_NORM)
            rows_BE[here] = wide * factor_B[here, None]
        return cls(rows_BE=rows_BE, factor_B=factor_B, scale=scale, cosine=cosine)

    def become_gradient_(self, grad_RE: Tensor, rows: slice) -> None:
        """Overwrite rows that are done with: d(loss) / d(rows) in, d(loss) / d(embeddings) kept.

        With r = scale * x / |x|: g_x = factor * (g_r - r (r . g_r) / scale^2).
        """
        for start in range(0, grad_RE.shape[0], SLICE_ROWS):
            grad = grad_RE[start : start + SLICE_ROWS].double()
            here = slice(rows.start + start, rows.start + start + grad.shape[0])
            if self.cosine:
                wide = self.rows_BE[here].double()
                grad -= wide * ((wide * grad).sum(1, keepdim=True) / self.scale**2)
            self.rows_BE[here] = grad * self.factor_B[here, None]
