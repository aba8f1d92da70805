"""Confidence intervals over queries: paired where two models are compared."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_RESAMPLES = 10_000
_SEED = 20240817

# Query scores by split and subset; a task's score is the mean of its splits' means.
Strata = Mapping[str, Mapping[str, float]]


def interval(scores: Strata) -> tuple[float, float]:
    """95 % percentile interval of a task's score, queries resampled within each split."""
    return _interval([np.array([s[q] for q in sorted(s)]) for s in scores.values()])


def paired_difference(after: Strata, before: Strata) -> tuple[float, float, float]:
    """Score of `after` minus score of `before`, with its 95 % interval.

    Both are resampled with the same queries, so what makes a query hard for both cancels.

    Raises:
        ValueError: the two were not scored on the same queries.
    """
    if {k: set(v) for k, v in after.items()} != {k: set(v) for k, v in before.items()}:
        raise ValueError("two results to compare hold different queries")
    strata = [
        np.array([after[name][query] - before[name][query] for query in sorted(after[name])])
        for name in sorted(after)
    ]
    low, high = _interval(strata)
    return float(np.mean([stratum.mean() for stratum in strata])), low, high


def _interval(strata: list[np.ndarray]) -> tuple[float, float]:
    generator = np.random.default_rng(_SEED)
    means_R = np.zeros(_RESAMPLES)
    for values in strata:
        # Multinomial counts are the resampled queries without their order: (R, Q) stays small.
        counts_RQ = generator.multinomial(
            len(values), np.full(len(values), 1 / len(values)), size=_RESAMPLES
        )
        means_R += counts_RQ @ values / len(values)
    low, high = np.quantile(means_R / len(strata), (0.025, 0.975))
    return float(low), float(high)
