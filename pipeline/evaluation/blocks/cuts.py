"""Blocks of texts on disk, named by what they hold: never changed, used by many plans.

output_dir/plan/cut-1a2b3c4d5e6f/{texts.arrow,index.npz}
output_dir/store/MODEL/cut-1a2b3c4d5e6f/block-00000.npy       its vectors
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import EvaluateConfig, EvaluatedModel
from pipeline.evaluation.blocks.distinct import SCHEMA, DistinctTexts
from pipeline.evaluation.blocks.keys import TextKey
from pipeline.evaluation.models.fingerprints import model_fingerprint
from pipeline.sealed import batch_writer, load_arrays, read_batch, save_arrays

# Enough that 64 elements get 32 blocks each; a killed element loses at most one.
_NUM_BLOCKS = 2048
_MIN_BLOCK_COST = 32_768.0
_TEXTS = "texts.arrow"
_INDEX = "index.npz"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Texts cut into blocks; letters: N texts.

    Attributes:
        digests: (N, 2) what each text is known by, sorted for `find_digests`.
        places: (N, 2) its block, and its row there.
        costs: of each block, in tokens of a short text.
    """

    folder: Path
    digests: NDArray[np.uint64]
    places: NDArray[np.int32]
    costs: NDArray[np.float64]

    @property
    def name(self) -> str:
        """Of its folders; a hash of what it holds."""
        return self.folder.name


def write_cut(parent: Path, texts: DistinctTexts) -> Cut:
    """Cut texts into blocks of about equal cost, longest texts first."""
    blocks = cut_blocks(texts.costs.tolist())
    sizes = np.array([len(rows) for rows in blocks])
    starts = np.cumsum(sizes) - sizes
    rows = np.arange(sizes.sum()) - np.repeat(starts, sizes)
    places = np.stack([np.repeat(np.arange(len(blocks)), sizes), rows], axis=1).astype(np.int32)
    content = hashlib.sha256(texts.digests.tobytes() + sizes.tobytes()).hexdigest()[:12]
    digests, places = sort_by_digest(texts.digests, places)
    cut = Cut(
        folder=parent / f"cut-{content}",
        digests=digests,
        places=places,
        costs=np.add.reduceat(texts.costs, starts),
    )
    with batch_writer(cut.folder / _TEXTS, SCHEMA) as write:
        for block in blocks:
            write(texts.block(block))
    # Last: its presence means that the cut is whole.
    save_arrays(cut.folder / _INDEX, digests=cut.digests, places=cut.places, costs=cut.costs)
    return cut


def read_cuts(parent: Path) -> list[Cut]:
    """All whole cuts, in the order of their names."""
    found = []
    for path in sorted(parent.glob(f"cut-*/{_INDEX}")):
        arrays = load_arrays(path, "digests", "places", "costs", fix=f"delete {path.parent}")
        found.append(Cut(folder=path.parent, **arrays))
    return found


def read_block(folder: Path, block: int) -> list[TextKey]:
    """The texts of a block, longest first; reads no other block.

    Args:
        folder: the cut's.
    """
    fix = f"delete {folder} and run `diffembed evaluate plan` again"
    rows = read_batch(folder / _TEXTS, block, fix=fix).to_pylist()
    return [TextKey(**row) for row in rows]


def cut_blocks(costs: Sequence[float]) -> list[range]:
    """Consecutive texts of about equal cost: a 2048th of all, but no less than a useful forward."""
    target = max(sum(costs) / _NUM_BLOCKS, _MIN_BLOCK_COST)
    blocks, start, cost = [], 0, 0.0
    for place, own in enumerate(costs):
        if place > start and cost + own > target:
            blocks.append(range(start, place))
            start, cost = place, 0.0
        cost += own
    if start < len(costs):
        blocks.append(range(start, len(costs)))
    return blocks


def sort_by_digest(
    digests_N2: NDArray[np.uint64], places_N2: NDArray[np.int32]
) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Both in the order that `find_digests` needs: an index is sorted once, when it is written.

    The digests lie column by column, in files too, so that a lookup searches the first as it is.
    """
    order_N = np.argsort(digests_N2[:, 0], kind="stable")
    return np.asfortranarray(digests_N2[order_N]), places_N2[order_N]


def find_digests(known_N2: NDArray[np.uint64], wanted_M2: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(M,) row of each wanted digest among the known ones, -1 where it is none of them.

    Args:
        known_N2: as `sort_by_digest` leaves them; M binary searches, whatever N is.
    """
    if len(known_N2) == 0:
        return np.full(len(wanted_M2), -1)
    at_M = np.searchsorted(known_N2[:, 0], wanted_M2[:, 0]).clip(max=len(known_N2) - 1)
    return np.where((known_N2[at_M] == wanted_M2).all(axis=1), at_M, -1)


def store_folder(config: EvaluateConfig, model: EvaluatedModel) -> Path:
    """Where a model's vectors are; another export has another folder.

    Raises:
        UserError: there is no export.
    """
    return config.output_dir / "store" / f"{model.name}-{model_fingerprint(model)}"


def block_path(store: Path, cut: str, block: int) -> Path:
    """Vectors of a cut's block, (texts, D) float16.

    Args:
        store: the model's.
    """
    return store / cut / f"block-{block:05d}.npy"
