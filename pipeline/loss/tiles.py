"""How the scores of a global batch are cut into tiles, and what that costs; pure arithmetic."""

from __future__ import annotations

import dataclasses
import math

FLOAT_BYTES = 4
# Fewer rows than this make the matrix products so thin that scoring twice is cheaper.
_MIN_KEPT_ROWS = 64
# A tile of this many columns keeps element-wise work in a CPU's cache and a GPU's cores busy.
_TILE_COLUMNS = 1024
# Memory for scores per kind of device: a CPU's cache likes few, a GPU needs many to stay busy.
DEFAULT_SCORE_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TilePlan:
    """Queries come in blocks of `rows`; a block meets this rank's documents `columns` at a time."""

    rows: int
    columns: int
    keep_scores: bool  # keep a block's scores for the gradient instead of computing them again


def plan_tiles(
    *,
    num_queries: int,
    num_rank_documents: int,
    score_bytes: int,
    symmetric: bool = False,
) -> TilePlan:
    """Choose blocks and tiles whose scores fit in the budget.

    Args:
        num_queries: most queries of one rank; a block never spans two ranks.
        num_rank_documents: most documents of one rank.
        score_bytes: for the scores held at one time.
        symmetric: the column sums need every block first, so no block's scores can be kept.
    """
    budget = max(score_bytes // FLOAT_BYTES, 1)
    rows = min(budget // max(num_rank_documents, 1), num_queries)
    keep = not symmetric and rows >= min(_MIN_KEPT_ROWS, num_queries)
    columns = max(min(_TILE_COLUMNS, num_rank_documents), 1)
    if not keep:
        columns = min(columns, math.isqrt(budget) or 1)
        rows = min(budget // columns, num_queries)
    return TilePlan(rows=max(rows, 1), columns=columns, keep_scores=keep)
