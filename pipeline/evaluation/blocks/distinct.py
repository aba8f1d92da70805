"""Every distinct text of several tasks once, in the order of their cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.evaluation.blocks.listing import Listing

# Columns of a block's texts.
SCHEMA = pa.schema(
    [
        ("role", pa.string()),
        ("instruction", pa.string()),
        ("max_length", pa.int32()),
        ("text", pa.large_string()),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DistinctTexts:
    """Each distinct text once, dearest first; letters: N texts.

    Attributes:
        listings: what the places refer to.
        texts: the texts of each listing.
        places: (N, 3) listing, row of its file, head.
        lengths: (N,) maximum length of each text.
        costs: (N,) descending.
        digests: (N, 2).
    """

    listings: Sequence[Listing]
    texts: Sequence[pa.LargeStringArray]
    places: NDArray[np.int64]
    lengths: NDArray[np.int32]
    costs: NDArray[np.float64]
    digests: NDArray[np.uint64]

    @classmethod
    def of(cls, listings: Sequence[Listing]) -> DistinctTexts:
        """Drop repetitions and sort.

        Raises:
            RuntimeError: two texts share the 8 bytes by which they are found.
        """
        digests_N2 = np.concatenate([listing.digests for listing in listings])
        _, first, inverse = np.unique(digests_N2[:, 0], return_index=True, return_inverse=True)
        if (digests_N2[first, 1][inverse] != digests_N2[:, 1]).any():
            raise RuntimeError("two texts share the first 8 bytes of their digest")
        costs = np.concatenate([listing.costs for listing in listings])
        # Ties by digest: the same texts give the same blocks, whatever the order of tasks.
        order = first[np.lexsort((digests_N2[first, 0], -costs[first]))]
        owner = np.repeat(np.arange(len(listings)), [len(listing.rows) for listing in listings])
        rows = np.concatenate([listing.rows for listing in listings])
        head = np.concatenate([listing.head for listing in listings])
        return cls(
            listings=listings,
            texts=[listing.texts() for listing in listings],
            places=np.stack([owner, rows, head], axis=1)[order],
            lengths=np.concatenate([listing.lengths for listing in listings])[order],
            costs=costs[order],
            digests=digests_N2[order],
        )

    def only(self, chosen_N: NDArray[np.bool_]) -> DistinctTexts:
        """Some of the texts, in the same order."""
        return dataclasses.replace(
            self,
            places=self.places[chosen_N],
            lengths=self.lengths[chosen_N],
            costs=self.costs[chosen_N],
            digests=self.digests[chosen_N],
        )

    def block(self, rows: range) -> pa.RecordBatch:
        """The texts of a block with what they are asked for."""
        places = self.places[rows.start : rows.stop]
        heads = [self.listings[owner].heads[head] for owner, _, head in places.tolist()]
        by_owner = np.argsort(places[:, 0], kind="stable")
        taken = [
            self.texts[owner].take(pa.array(places[places[:, 0] == owner, 1]))
            for owner in np.unique(places[:, 0])
        ]
        texts = pa.concat_arrays(taken).take(pa.array(np.argsort(by_owner)))
        return pa.RecordBatch.from_arrays(
            [
                pa.array([role for role, _ in heads]),
                pa.array([instruction for _, instruction in heads]),
                pa.array(self.lengths[rows.start : rows.stop]),
                texts,
            ],
            schema=SCHEMA,
        )
