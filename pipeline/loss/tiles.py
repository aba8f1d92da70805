"""Plan the tiles of the loss, and its memory, traffic and work, from counts alone.

    queries of one rank      ->  blocks of `rows`; a block never spans two ranks
    documents of one rank    ->  tiles of `columns`
    scores of a tile         ->  one slot of (rows, columns) float32

A block's tiles are needed twice, for the sums and for the gradients. Where all of them fit into the
budget each has its own slot and is computed once; elsewhere they share one slot and are computed
again (two slots where the loss is symmetric, one per direction).
"""

from __future__ import annotations

import dataclasses
import math

_FLOAT_BYTES = 4
# Fewer rows than this make the matrix products so thin that scoring twice is cheaper.
_MIN_KEPT_ROWS = 64
# More rows than this gain nothing, and a block of them travels between ranks.
_MAX_ROWS = 4096
# A tile of this many columns keeps element-wise work in a CPU's cache and a GPU's cores busy.
TILE_COLUMNS = 2048
# Memory for scores per kind of device: a CPU's cache likes few, a GPU needs many to stay busy.
DEFAULT_SCORE_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}
# Memory for a tile of scores of a vocabulary. A CPU's cache likes few. On a GPU, every tile
# adds a gradient as large as the head to the fp32 sum (152,000 tokens x 3,584: 6.5 GB of traffic):
# 37 tiles of 512 MiB for 8,192 predictions would take 0.15 s of it (estimated), 10 take 0.04 s.
TOKEN_TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 2 * 2**30}
# float64 work is done on so many rows, or so many bytes of gathered rows, at one time: what a CPU's
# cache holds; on a GPU enough that starting the kernels costs less than running them.
SLICE_ROWS = 512
SLICE_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
_SLICE_COPIES = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TilePlan:
    """Sizes of blocks and tiles, and the number of tiles whose scores exist at one time."""

    rows: int
    columns: int
    num_slots: int
    keep_scores: bool  # keep a block's scores for the gradient instead of computing them again

    @property
    def score_bytes(self) -> int:
        """Memory of the scores."""
        return self.num_slots * self.rows * self.columns * _FLOAT_BYTES


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
        score_bytes: memory for scores.
        symmetric: the document's sums need every block first, so no block's scores can be kept.
    """
    budget = score_bytes // _FLOAT_BYTES
    num_queries, num_documents = max(num_queries, 1), max(num_rank_documents, 1)
    columns = min(TILE_COLUMNS, num_documents)
    num_tiles = -(-num_documents // columns)
    rows = min(budget // (num_tiles * columns), num_queries, _MAX_ROWS)
    if not symmetric and rows >= min(_MIN_KEPT_ROWS, num_queries):
        return TilePlan(rows=rows, columns=columns, num_slots=num_tiles, keep_scores=True)
    num_slots = 2 if symmetric else 1
    columns = min(columns, max(math.isqrt(budget // num_slots), 1))
    rows = max(min(budget // (num_slots * columns), num_queries, _MAX_ROWS), 1)
    return TilePlan(rows=rows, columns=columns, num_slots=num_slots, keep_scores=False)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossCost:
    """Cost of one global batch's loss on the fullest rank, in addition to the embeddings."""

    tiles: TilePlan
    num_blocks: int  # of queries, over all ranks; as many rounds of collectives
    num_tiles: int  # scored by one rank
    score_bytes: int
    row_bytes: int  # score rows of both sides; query gradients later share the queries' buffer
    gradient_bytes: int  # of its documents
    block_bytes: int  # queries of a block and their gradient; all queries where symmetric
    index_bytes: int  # positions of every query and document
    work_bytes: int  # float64 slices
    received_bytes: int  # per step: queries, and partial gradients of this rank's queries
    matmul_flops: int

    @property
    def peak_bytes(self) -> int:
        """All memory at once."""
        return (
            self.score_bytes
            + self.row_bytes
            + self.gradient_bytes
            + self.block_bytes
            + self.index_bytes
            + self.work_bytes
        )


def loss_cost(
    *,
    num_queries: int,
    num_documents: int,
    width: int,
    world_size: int,
    score_bytes: int,
    symmetric: bool = False,
    device: str = "cuda",
) -> LossCost:
    """Predict the cost of the loss with in-batch negatives, rows spread evenly over ranks.

    Args:
        num_queries: of the global batch.
        num_documents: of the global batch, hard negatives included.
        width: of the embeddings.
        world_size: ranks that share both.
        score_bytes: memory for scores on each rank.
        symmetric: both directions.
        device: kind of device.
    """
    queries, documents = -(-num_queries // world_size), -(-num_documents // world_size)
    tiles = plan_tiles(
        num_queries=queries,
        num_rank_documents=documents,
        score_bytes=score_bytes,
        symmetric=symmetric,
    )
    num_blocks = world_size * -(-queries // tiles.rows)
    row = width * _FLOAT_BYTES
    # A symmetric loss keeps every block's queries until the sums of the documents are complete.
    held = world_size * queries if symmetric else tiles.rows
    # Matrix products of a tile: the scores, once or again, and the gradients of both sides.
    products = 3 if tiles.keep_scores else 5 if symmetric else 4
    foreign = (world_size - 1) * queries if world_size > 1 else 0
    return LossCost(
        tiles=tiles,
        num_blocks=num_blocks,
        num_tiles=num_blocks * -(-documents // tiles.columns),
        score_bytes=tiles.score_bytes,
        row_bytes=(queries + documents) * row,
        gradient_bytes=documents * row,
        block_bytes=(held + tiles.rows) * row,
        index_bytes=8 * (num_queries + num_documents + queries + documents),
        work_bytes=max(_SLICE_COPIES * 2 * SLICE_ROWS * row, SLICE_BYTES[device]),
        received_bytes=2 * foreign * row,
        matmul_flops=products * 2 * num_queries * documents * width,
    )
