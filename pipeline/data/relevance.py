"""Who answers whom in a global batch: chosen documents, and known false negatives."""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.data.batch import IntArray, Ragged
from pipeline.data.keyed import make_key, mix


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Relevance:
    """The documents of a batch and three index lists per query; see `GlobalBatch`."""

    document_ids: IntArray  # (M,) ids in the document store, ascending
    positives: Ragged
    negatives: Ragged
    masked: Ragged


def num_negatives(
    *, positives: Ragged, negatives: Ragged, masked: Ragged, num_documents: int, own: bool
) -> IntArray:
    """(N,) documents that each query of a batch is told apart from: its own ones, or all."""
    if own:
        return negatives.lengths
    return num_documents - positives.lengths - masked.lengths


def choose(lists: Ragged, count: int, *, num_first: IntArray | None, key: int) -> IntArray:
    """Choose up to `count` values of each row: the first `num_first` ones, then others by chance.

    Args:
        lists: (R rows) what there is to choose from.
        count: how many to take where a row has as many.
        num_first: (R,) values of each row that come before the others; None for no such values.
        key: decides the choice.

    Returns:
        (nnz,) places in `lists.values`, ascending.
    """
    lengths = lists.lengths
    if not len(lengths) or lengths.max() <= count:
        return np.arange(len(lists.values), dtype=np.int64)
    rows, places = lists.rows, np.arange(len(lists.values), dtype=np.int64)
    rank = mix(places.astype(np.uint64) ^ np.uint64(make_key(key)))
    late = np.zeros(len(places), dtype=bool)
    if num_first is not None:
        late = places - lists.offsets[:-1][rows] >= num_first[rows]
    order = np.lexsort((rank, late, rows))
    # Within each row the order is now: first values by chance, then the others by chance.
    taken = places < lists.offsets[:-1][rows] + count
    return np.sort(order[taken])


def relate(
    *,
    positives: Ragged,
    negatives: Ragged,
    all_positives: Ragged,
    concept: IntArray,
    query_key: IntArray,
) -> Relevance:
    """Number the documents of a batch and find its known false negatives.

    A document of the batch is masked for a query that it answers by the data, though not chosen:
    it is another positive of the example, or a positive of an example with the same query or the
    same concept. Negatives listed by the example itself stay negatives.

    Args:
        positives, negatives: (N rows) chosen document ids.
        all_positives: (N rows) every positive the example lists.
        concept: (N,) hash of what the example is about, -1 for unknown.
        query_key: (N,) hash of the query's text.
    """
    num_queries = len(positives)
    ids, inverse = np.unique(
        np.concatenate([positives.values, negatives.values]), return_inverse=True
    )
    split = len(positives.values)
    chosen = Ragged(offsets=positives.offsets, values=inverse[:split].astype(np.int64))
    against = Ragged(offsets=negatives.offsets, values=inverse[split:].astype(np.int64))
    place = np.searchsorted(ids, all_positives.values)
    place = np.minimum(place, len(ids) - 1)
    present = ids[place] == all_positives.values
    pairs = [_pairs(all_positives.rows[present], place[present], len(ids))]
    for label in (concept, query_key):
        pairs.append(_shared(label, chosen, len(ids)))
    known = np.unique(np.concatenate(pairs))
    own = [_pairs(lists.rows, lists.values, len(ids)) for lists in (chosen, against)]
    masked = np.setdiff1d(known, np.concatenate(own), assume_unique=False)
    return Relevance(
        document_ids=ids.astype(np.int64),
        positives=chosen,
        negatives=against,
        masked=Ragged.from_pairs(masked // len(ids), masked % len(ids), num_queries),
    )


def _pairs(rows: IntArray, documents: IntArray, num_documents: int) -> IntArray:
    """(query, document) pairs as single numbers."""
    return rows.astype(np.int64) * num_documents + documents


def _shared(label: IntArray, chosen: Ragged, num_documents: int) -> IntArray:
    """Pairs of each query with the positives of all queries that carry its label (not -1)."""
    labels, groups, counts = np.unique(label, return_inverse=True, return_counts=True)
    rows = np.flatnonzero((label[chosen.rows] >= 0) & (counts[groups[chosen.rows]] > 1))
    # Each label's documents once, though several of its queries may share one.
    owned = np.unique(groups[chosen.rows[rows]] * num_documents + chosen.values[rows])
    per_label = Ragged.from_pairs(owned // num_documents, owned % num_documents, len(labels))
    lengths = per_label.lengths[groups]
    starts = per_label.offsets[:-1][groups]
    ends = np.cumsum(lengths)
    places = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(
        starts - (ends - lengths), lengths
    )
    queries = np.repeat(np.arange(len(label), dtype=np.int64), lengths)
    return _pairs(queries, per_label.values[places], num_documents)
