"""Decide which documents may be a query's negatives, in which order, and which are chosen.

    found documents of each retriever
      --never a negative-->  its own positives, their duplicates, the query, evaluation sets
      --rank-->              only what is left has a rank; window.first to window.last
      --margin-->            as much lower than the positive as the config asks
      --merge-->             one list over all retrievers: places 1, 2, ...
      --choose-->            top, random, or shares of bands

All functions are pure: one query at a time, values in, values out.

Letters: K documents found by a retriever, C candidates of a query, R retrievers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config import MarginConfig, MineConfig
from pipeline.data.batch import IntArray
from pipeline.data.order import make_key, uniform

# Outcomes of a found document, in the order in which they are tested: if several rules hold, the
# first is counted. Files hold positions in this list, so another order needs another `_VERSION`.
OUTCOMES = (
    "candidate",
    "positive of the query",
    "positive of its concept",
    "duplicate of a positive",
    "near duplicate of a positive",
    "equals the query",
    "in an evaluation set",
    "before the window",
    "absolute margin",
    "relative margin",
    "percentile",
    "behind the window",
)
(
    CANDIDATE, POSITIVE, CONCEPT, DUPLICATE, NEAR, QUERY, IN_SET, BEFORE, ABSOLUTE, RELATIVE,
    PERCENTILE, BEHIND,
) = range(len(OUTCOMES))  # fmt: skip
# Of reciprocal rank fusion, 1 / (60 + rank): the constant of Cormack et al. (SIGIR 2009).
_FUSION = 60

Outcomes = NDArray[np.int8]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The largest scores that a negative of one query may have by one retriever."""

    absolute: float = np.inf
    relative: float = np.inf
    percentile: float = np.inf

    @classmethod
    def of(cls, margin: MarginConfig, positive: float, percentile: float) -> Limits:
        """Return the limits for the lowest score of the query's positives.

        Args:
            margin: the rules.
            positive: that score.
            percentile: value of `margin.percentile` over all positives; NaN without that rule.
        """
        relative = np.inf
        if margin.relative is not None:
            # 0.95 of a negative score would lie above it, and let through what scores higher.
            relative = positive - (1 - margin.relative) * abs(positive)
        return cls(
            absolute=np.inf if margin.absolute is None else positive - margin.absolute,
            relative=relative,
            percentile=np.inf if margin.percentile is None else percentile,
        )

    def exceeded(self, scores: NDArray[np.float64]) -> Outcomes:
        """(K,) the first rule that each score breaks; CANDIDATE if none."""
        outcomes = np.full(len(scores), CANDIDATE, dtype=np.int8)
        # From the last rule to the first, which overwrites the others.
        for outcome, limit in (
            (PERCENTILE, self.percentile),
            (RELATIVE, self.relative),
            (ABSOLUTE, self.absolute),
        ):
            outcomes[scores > limit] = outcome
        return outcomes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """The documents that one retriever found for a query, and the verdict on each.

    Attributes:
        documents: (K,) numbers, best first.
        scores: (K,) of this retriever.
        outcomes: (K,) positions in `OUTCOMES`.
        ranks: (K,) from 1 among the documents that may be negatives; 0 for the others.
    """

    documents: IntArray
    scores: NDArray[np.float64]
    outcomes: Outcomes
    ranks: IntArray


def judge(
    config: MineConfig,
    documents_K: IntArray,
    scores_K: NDArray[np.float64],
    forbidden_K: Outcomes,
    limits: Limits,
) -> Judged:
    """Rank the documents that one retriever found, and apply window and limits to them.

    Args:
        config: has the window.
        documents_K: numbers, best first.
        scores_K: of this retriever.
        forbidden_K: why a document may never be a negative; CANDIDATE where it may.
        limits: of the scores.
    """
    outcomes = forbidden_K.copy()
    allowed = outcomes == CANDIDATE
    # Forbidden documents have no rank: a query with many positives has as wide a window as others.
    ranks = np.cumsum(allowed)
    ranks[~allowed] = 0
    # Margins first: a false negative behind the window must not be taken to fill either.
    outcomes[allowed] = limits.exceeded(scores_K[allowed])
    left = outcomes == CANDIDATE
    outcomes[left & (ranks > config.window.last)] = BEHIND
    # Before the window no margin counts: these documents are skipped whatever they score.
    outcomes[allowed & (ranks < config.window.first)] = BEFORE
    return Judged(documents=documents_K, scores=scores_K, outcomes=outcomes, ranks=ranks)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The candidates of a query in their merged order.

    Attributes:
        documents: (C,) numbers.
        scores: (C, R) of each retriever; NaN where it did not find the document.
        bands: (C,) number of the band; the last one behind all bands.
        inside: (C,) False for candidates that only fill up: behind the window, or behind all bands.
    """

    documents: IntArray
    scores: NDArray[np.float64]
    bands: NDArray[np.int8]
    inside: NDArray[np.bool_]

    def take(self, order: IntArray) -> Candidates:
        """Return some of the candidates."""
        return Candidates(
            documents=self.documents[order],
            scores=self.scores[order],
            bands=self.bands[order],
            inside=self.inside[order],
        )


def merge(config: MineConfig, lists: Sequence[Judged]) -> Candidates:
    """Join the lists of all retrievers into one.

    A document that one retriever's list refuses is left out, although another one accepts it. It is
    inside the window if it is in that of any retriever.
    """
    # The entries of all lists, one list after another, and the U distinct documents among them.
    found = np.concatenate([part.documents for part in lists])
    scores = np.concatenate([part.scores for part in lists])
    outcome = np.concatenate([part.outcomes for part in lists])
    rank = np.concatenate([part.ranks for part in lists])
    owner = np.repeat(np.arange(len(lists)), [len(part.documents) for part in lists])
    unique, inverse = np.unique(found, return_inverse=True)
    refused = np.zeros(len(unique), dtype=bool)
    refused[inverse[~np.isin(outcome, (CANDIDATE, BEHIND))]] = True
    inside = np.zeros(len(unique), dtype=bool)
    inside[inverse[outcome == CANDIDATE]] = True
    # (U, R) scores and ranks of each document by each retriever; an infinite rank adds 0 below.
    table = np.full((len(unique), len(lists)), np.nan)
    table[inverse, owner] = scores
    ranked = np.full((len(unique), len(lists)), np.inf)
    ranked[inverse, owner] = np.where(rank > 0, rank, np.inf)
    if config.merge == "reciprocal":
        order_key = -(1 / (_FUSION + ranked)).sum(axis=1)
    else:
        # In turns: rank 1 of each retriever, in the order of the config, then rank 2 of each.
        order_key = (ranked * len(lists) + np.arange(len(lists))).min(axis=1)
    # What no list refuses is inside the window of a list, or behind the windows of all.
    kept = np.flatnonzero(~refused)
    # The last key of lexsort leads: first what is inside a window, and numbers break ties.
    order = kept[np.lexsort((unique[kept], order_key[kept], ~inside[kept]))]
    places = np.arange(1, len(order) + 1)
    # Without bands, one that holds all. A place behind the last band gets its number, but outside.
    lasts = [band.last for band in config.bands] or [len(order)]
    bands = np.searchsorted(lasts, places)
    return Candidates(
        documents=unique[order],
        scores=table[order],
        bands=np.minimum(bands, len(lasts) - 1).astype(np.int8),
        inside=inside[order] & (bands < len(lasts)),
    )


def choose(config: MineConfig, candidates: Candidates, count: int, example: int) -> IntArray:
    """Return the positions of at most `count` candidates, as `choose` and `short` ask.

    A random choice is a function of seed, example and document: it does not change when other
    candidates are left out.
    """
    if config.choose == "top":
        order = np.arange(len(candidates.documents))
    else:
        key = make_key(config.seed, example)
        order = np.argsort(uniform(key, candidates.documents), kind="stable")
    inside = order[candidates.inside[order]]
    if config.choose == "bands":
        shares = np.array([band.share for band in config.bands])
        quotas = apportion(shares, count)
        parts = [
            inside[candidates.bands[inside] == band][: quotas[band]] for band in range(len(quotas))
        ]
        chosen = np.concatenate(parts)
    else:
        chosen = inside[:count]
    if config.short == "fill" and len(chosen) < count:
        # By place: first what the window or other bands hold, then what lies behind.
        others = np.setdiff1d(np.arange(len(candidates.documents)), chosen)
        others = others[np.argsort(~candidates.inside[others], kind="stable")]
        chosen = np.concatenate([chosen, others[: count - len(chosen)]])
    return chosen.astype(np.int64)


def apportion(shares: NDArray[np.float64], total: int) -> IntArray:
    """Divide `total` by shares: the largest remainders, then the first bands, get one more."""
    exact = shares * total
    # A product just below a whole number, as 0.29 * 100, counts as that number.
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-(exact - quotas), kind="stable")
    quotas[order[: total - quotas.sum()]] += 1
    return quotas
