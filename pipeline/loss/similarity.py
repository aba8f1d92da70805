"""Embeddings into the rows whose plain dot product is the score, and gradients back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# As torch.nn.functional.normalize: a zero row stays zero instead of becoming nan.
_SMALLEST_NORM = 1e-12
# Rows whose float64 copies exist at one time.
_SLICE_ROWS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRows:
    """Rows `x * scale` or `x / |x| * scale`, rounded once.

    A norm rounded to float32 would shift all of a row's scores together, by 1e-6 of a probability
    and more at temperature 0.01; so norm, scale and product are taken in float64.
    """

    rows_BE: Tensor  # float32
    factor_B: Tensor  # float64: rows = x * factor
    scale: float
    cosine: bool

    @classmethod
    def build(cls, x_BE: Tensor, *, scale: float, cosine: bool) -> ScoreRows:
        """Prepare the embeddings of queries (with the scale of the scores) or documents (1)."""
        rows_BE = torch.empty(x_BE.shape, dtype=torch.float32, device=x_BE.device)
        factor_B = torch.full((x_BE.shape[0],), scale, dtype=torch.float64, device=x_BE.device)
        for start in range(0, x_BE.shape[0], _SLICE_ROWS):
            here = slice(start, start + _SLICE_ROWS)
            wide = x_BE[here].double()
            if cosine:
                factor_B[here] /= wide.norm(dim=1).clamp_min(_SMALLEST_NORM)
            rows_BE[here] = wide * factor_B[here, None]
        return cls(rows_BE=rows_BE, factor_B=factor_B, scale=scale, cosine=cosine)

    def gradient_(self, grad_BE: Tensor) -> Tensor:
        """d(loss) / d(rows) to d(loss) / d(embeddings), in place.

        With r = scale * x / |x|: g_x = factor * (g_r - r (r . g_r) / scale^2).
        """
        for start in range(0, grad_BE.shape[0], _SLICE_ROWS):
            here = slice(start, start + _SLICE_ROWS)
            grad = grad_BE[here].double()
            if self.cosine:
                rows = self.rows_BE[here].double()
                grad -= rows * ((rows * grad).sum(1, keepdim=True) / self.scale**2)
            grad_BE[here] = grad * self.factor_B[here, None]
        return grad_BE
