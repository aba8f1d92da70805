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

from pipeline.config import LossConfig

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
# float64 work is done on this many rows, or bytes of gathered rows, at one time: what a CPU's
# cache holds; on a GPU enough that starting the kernels costs less than running them.
SLICE_ROWS = 512
SLICE_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
# float64 tensors of a slice that exist at one time: rows, their gradient, and a product of the two.
_SLICE_COPIES = 3
# Of an element of a projection: weight, moments and gradient in float32, two copies in float64.
PROJECTION_BYTES = 4 * _FLOAT_BYTES + 2 * 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TilePlan:
    """Sizes of blocks and tiles, and the number of tiles whose scores exist at one time."""

    rows: int
    columns: int
    num_slots: int
    keep_scores: bool  # keep a block's scores for the gradient instead of computing them again
    teacher_slots: int = 0  # tiles of a teacher's scores, and of what is computed from them

    @property
    def score_bytes(self) -> int:
        """Memory of the scores."""
        return (self.num_slots + self.teacher_slots) * self.rows * self.columns * _FLOAT_BYTES


def plan_tiles(
    *,
    num_queries: int,
    num_rank_documents: int,
    score_bytes: int,
    symmetric: bool = False,
    teacher_slots: int = 0,
) -> TilePlan:
    """Choose blocks and tiles whose scores fit in the budget.

    Args:
        num_queries: most queries of one rank; a block never spans two ranks.
        num_rank_documents: most documents of one rank.
        score_bytes: memory for scores.
        symmetric: the document's sums need every block first, so no block's scores can be kept.
        teacher_slots: further tiles of the same size, for terms of a teacher.
    """
    budget = score_bytes // _FLOAT_BYTES
    num_queries, num_documents = max(num_queries, 1), max(num_rank_documents, 1)
    columns = min(TILE_COLUMNS, num_documents)
    num_tiles = -(-num_documents // columns)
    num_slots = num_tiles + teacher_slots
    rows = min(budget // (num_slots * columns), num_queries, _MAX_ROWS)
    keep_scores = not symmetric and rows >= min(_MIN_KEPT_ROWS, num_queries)
    if not keep_scores:
        num_slots = (2 if symmetric else 1) + teacher_slots
        # Square where the budget is small: the fewest rows are read for that many scores.
        columns = min(columns, max(math.isqrt(budget // num_slots), 1))
        rows = max(min(budget // (num_slots * columns), num_queries, _MAX_ROWS), 1)
    return TilePlan(
        rows=rows,
        columns=columns,
        num_slots=num_slots - teacher_slots,
        keep_scores=keep_scores,
        teacher_slots=teacher_slots,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TeacherTerms:
    """The terms of a loss that read a teacher's stored vectors."""

    width: int = 0  # of these vectors; 0 without such a term
    guide: bool = False
    batch_distillation: bool = False
    projection: bool = False

    @classmethod
    def of(cls, config: LossConfig, *, width: int) -> TeacherTerms:
        """Return the terms of a loss; `width` of the vectors."""
        return cls(
            width=width if config.needs_vectors else 0,
            guide=config.guide is not None,
            batch_distillation=config.distils_batch,
            projection=config.projection is not None,
        )

    @property
    def num_slots(self) -> int:
        """Tiles in addition to the scores: the teacher's scores, the model's, their difference."""
        return 3 if self.batch_distillation else int(self.guide)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossCost:
    """Cost of one global batch's loss on the fullest rank, in addition to the embeddings."""

    tiles: TilePlan
    teacher: TeacherTerms
    num_blocks: int  # of queries, over all ranks; as many rounds of collectives
    num_tiles: int  # scored by one rank
    score_bytes: int
    row_bytes: int  # score rows of both sides; query gradients later share the queries' buffer
    teacher_bytes: int  # a teacher's vectors of both sides, and the projection to them
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
            + self.teacher_bytes
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
    teacher: TeacherTerms | None = None,
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
        teacher: terms that read a teacher's stored vectors.
    """
    teacher = teacher or TeacherTerms()
    queries, documents = -(-num_queries // world_size), -(-num_documents // world_size)
    tiles = plan_tiles(
        num_queries=queries,
        num_rank_documents=documents,
        score_bytes=score_bytes,
        symmetric=symmetric,
        teacher_slots=teacher.num_slots,
    )
    num_blocks = world_size * -(-queries // tiles.rows)
    row = width * _FLOAT_BYTES
    # A symmetric loss keeps every block's queries until the sums of the documents are complete.
    held = world_size * queries if symmetric else tiles.rows
    # Matrix products of a tile: the scores, once or again, and the gradients of both sides.
    products = 3 if tiles.keep_scores else 5 if symmetric else 4
    teacher_row = teacher.width * _FLOAT_BYTES
    teacher_products = teacher.guide * (products - 2)  # as often as the scores
    if teacher.batch_distillation:
        # Both scores for the sums and again for the gradient, and the gradients of both sides.
        products += 4
        teacher_products += 2
    matrix = teacher.projection * width * teacher.width
    foreign = (world_size - 1) * queries if world_size > 1 else 0
    return LossCost(
        tiles=tiles,
        teacher=teacher,
        num_blocks=num_blocks,
        num_tiles=num_blocks * -(-documents // tiles.columns),
        score_bytes=tiles.score_bytes,
        row_bytes=(queries + documents) * row,
        # As they arrive, as rows whose products are scores, and of a block's queries.
        teacher_bytes=(2 * (queries + documents) + held) * teacher_row + matrix * PROJECTION_BYTES,
        gradient_bytes=documents * row,
        block_bytes=(held + tiles.rows) * row,
        index_bytes=8 * (num_queries + num_documents + queries + documents),
        work_bytes=max(_SLICE_COPIES * 2 * SLICE_ROWS * row, SLICE_BYTES[device]),
        received_bytes=foreign * (2 * row + teacher_row),
        matmul_flops=2
        * num_queries
        * documents
        * (products * width + teacher_products * teacher.width)
        # Forward, and the gradients by rows and matrix.
        + 6 * (queries + documents) * matrix,
    )
