"""Vectors that are not finite are never stored or scored: they would be found by no query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Precision
from pipeline.errors import UserError


def require_finite(
    vectors_ND: NDArray[np.floating], texts: Sequence[str], *, source: str, fix: str
) -> None:
    """Refuse NaN and infinity.

    Args:
        vectors_ND: one row per text.
        texts: (N,) the first one with such a vector is quoted.
        source: what gave the vectors.
        fix: what to do about it.

    Raises:
        UserError: a vector is not finite.
    """
    broken_N = ~np.isfinite(vectors_ND).all(axis=1)
    if broken_N.any():
        first = texts[int(np.argmax(broken_N))][:60]
        raise UserError(
            f"{source}: {broken_N.sum()} of {len(texts)} vectors are not finite, the first of "
            f"{first!r}",
            fix=fix,
        )


def not_finite_fix(precision: Precision) -> str:
    """What to do about a model whose vectors are not finite."""
    if precision == "bfloat16":
        return "compute in precision float32, or export an earlier checkpoint"
    return "export an earlier checkpoint: the weights of this one are damaged, or diverged"
