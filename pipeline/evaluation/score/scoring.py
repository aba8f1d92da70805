"""Every query's own share of a task's score, and the score that chance would get."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytrec_eval

Judgements = Mapping[str, Mapping[str, int]]
Rankings = Mapping[str, Mapping[str, float]]

# mteb's names of metrics -> trec_eval's, without the cut-off.
_TREC = {"ndcg": "ndcg_cut", "recall": "recall", "map": "map_cut", "hit_rate": "success"}


def per_query_scores(metric: str, judgements: Judgements, rankings: Rankings) -> dict[str, float]:
    """The metric of each query; their mean is mteb's score.

    Args:
        metric: mteb's name, for example `ndcg_at_10`.
        judgements: relevance of documents by query.
        rankings: document scores by query.

    Raises:
        ValueError: the metric is not a mean over queries that trec_eval knows.
    """
    name, _, cut = metric.partition("_at_")
    if name not in _TREC or not cut.isdigit():
        raise ValueError(f"{metric} is no mean over queries")
    evaluator = pytrec_eval.RelevanceEvaluator(
        {query: dict(documents) for query, documents in judgements.items()},
        {f"{_TREC[name]}.{cut}"},
    )
    measured = evaluator.evaluate({query: dict(found) for query, found in rankings.items()})
    return {query: values[f"{_TREC[name]}_{cut}"] for query, values in measured.items()}


def p_mrr_per_query(changed: Mapping[str, Sequence[str]], rankings: Rankings) -> dict[str, float]:
    """How far each base query's newly irrelevant documents fall when its instruction changes.

    FollowIR (Weller et al., arXiv 2403.15246, eq. 1): with ranks og and new of such a document,
    1 - og/new if it falls and new/og - 1 if it rises; mean over the query's documents.
    """
    scores = {}
    for query, documents in changed.items():
        before, after = _ranks(rankings[f"{query}-og"]), _ranks(rankings[f"{query}-changed"])
        changes = []
        for document in documents:
            # A document that was not retrieved counts as the one after the last.
            og = before.get(document, len(before) + 1)
            new = after.get(document, len(after) + 1)
            changes.append(new / og - 1 if og >= new else 1 - og / new)
        scores[query] = sum(changes) / len(changes)
    return scores


def _ranks(found: Mapping[str, float]) -> dict[str, int]:
    """Rank of each document from 1; equal scores by document id descending, as trec_eval does."""
    ordered = sorted(found, key=lambda document: (found[document], document), reverse=True)
    return {document: rank for rank, document in enumerate(ordered, start=1)}


def chance_level(
    metric: str, judgements: Judgements, num_candidates: Mapping[str, int]
) -> float | None:
    """Expected score of a random order, or None where no closed form is at hand.

    For nDCG, each of the first k places holds the mean gain of a candidate; recall and hit rate at
    1 are the share of relevant candidates found there; p-MRR is antisymmetric in its two ranks.

    Args:
        num_candidates: documents that each query may find.
    """
    if metric == "p-MRR":
        return 0.0
    name, _, cut = metric.partition("_at_")
    if name not in ("ndcg", "recall"):
        return None
    k = int(cut)
    expected = []
    for query, documents in judgements.items():
        gains = sorted((gain for gain in documents.values() if gain > 0), reverse=True)
        n = num_candidates[query]
        if not gains or n == 0:
            expected.append(0.0)
        elif name == "recall":
            expected.append(min(k, n) / n)
        else:
            ideal = sum(gain / math.log2(place + 2) for place, gain in enumerate(gains[:k]))
            places = sum(1 / math.log2(place + 2) for place in range(min(k, n)))
            expected.append(sum(gains) / n * places / ideal)
    return sum(expected) / len(expected)
