"""Compute the main metric of each query, so that their mean is mteb's score, and its chance level.

rankings, judgements --per_query_scores--> nDCG, recall, MAP, ... of each query
rankings             --p_mrr_per_query---> p-MRR of each pair of queries (FollowIR)
candidates           --chance_level------> the score of a random order
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import pytrec_eval

from pipeline.errors import UserError

# query -> document -> relevance.
Judgements = Mapping[str, Mapping[str, int]]
# query -> document -> score; the order of the documents has no meaning.
Rankings = Mapping[str, Mapping[str, float]]

P_MRR = "p-MRR"
# mteb's names of metrics -> trec_eval's, without the cut-off.
_TREC = {
    "ndcg": "ndcg_cut",
    "recall": "recall",
    "map": "map_cut",
    "hit_rate": "success",
    "precision": "P",
}
# mteb computes this one itself: trec_eval's has no cut-off.
_MRR = "mrr"


def require_mean(task: str, metric: str) -> None:
    """Refuse a task whose score is not a mean over queries, which intervals need.

    Raises:
        UserError: names the metric, before a text of the task is embedded.
    """
    name, _, cut = metric.partition("_at_")
    if metric != P_MRR and not (name in (*_TREC, _MRR) and cut.isdigit()):
        raise UserError(
            f"tasks: {task!r} is scored by {metric}, which is no mean over queries",
            allowed=f"tasks scored by {', '.join((*_TREC, _MRR))} at some rank, or by {P_MRR}",
            fix="score this task with mteb itself",
        )


def per_query_scores(metric: str, judgements: Judgements, rankings: Rankings) -> dict[str, float]:
    """Return the metric of each query; their mean is mteb's score.

    Args:
        metric: mteb's name, for example `ndcg_at_10`.
        judgements: relevance of documents by query.
        rankings: document scores by query.
    """
    name, _, cut = metric.partition("_at_")
    if name == _MRR:
        return {
            query: _reciprocal_rank(judgements[query], found, int(cut))
            for query, found in rankings.items()
        }
    # pytrec_eval reads only plain dicts.
    evaluator = pytrec_eval.RelevanceEvaluator(
        {query: dict(documents) for query, documents in judgements.items()},
        {f"{_TREC[name]}.{cut}"},
    )
    measured = evaluator.evaluate({query: dict(found) for query, found in rankings.items()})
    return {query: values[f"{_TREC[name]}_{cut}"] for query, values in measured.items()}


def _reciprocal_rank(judged: Mapping[str, int], found: Mapping[str, float], k: int) -> float:
    """Return 1 / rank of the first relevant document among the first k, 0 without any."""
    for rank, document in enumerate(best_first(found)[:k], start=1):
        if judged.get(document, 0) > 0:
            return 1 / rank
    return 0.0


def p_mrr_per_query(changed: Mapping[str, Sequence[str]], rankings: Rankings) -> dict[str, float]:
    """Measure how far newly irrelevant documents fall when a query's instruction changes.

    FollowIR (Weller et al., arXiv 2403.15246, eq. 1): with ranks og and new of such a document,
    1 - og/new if it falls and new/og - 1 if it rises; mean over the query's documents.

    Args:
        changed: newly irrelevant documents by base query.
        rankings: of the queries QUERY-og and QUERY-changed.
    """
    scores = {}
    for query, documents in changed.items():
        if not documents:
            continue  # nothing to measure: mteb's mean is over the other queries
        before, after = _ranks(rankings[f"{query}-og"]), _ranks(rankings[f"{query}-changed"])
        changes = []
        for document in documents:
            # A document that was not retrieved counts as the one after the last.
            og = before.get(document, len(before) + 1)
            new = after.get(document, len(after) + 1)
            # og and new as in the paper: both cases are in [-1, 1], and 0 without a change.
            changes.append(new / og - 1 if og >= new else 1 - og / new)
        scores[query] = sum(changes) / len(changes)
    return scores


def _ranks(found: Mapping[str, float]) -> dict[str, int]:
    """Return the rank of each document, from 1."""
    return {document: rank for rank, document in enumerate(best_first(found), start=1)}


def best_first(found: Mapping[str, float]) -> list[str]:
    """Sort documents by score; equal scores by document id descending, as trec_eval does."""
    return sorted(found, key=lambda document: (found[document], document), reverse=True)


def chance_level(
    metric: str, judgements: Judgements, candidates: Mapping[str, Collection[str]]
) -> float | None:
    """Return the expected score of a random order, or None for a metric without a closed form.

    For nDCG, each of the first k ranks has the mean gain of a candidate; recall is the share of
    candidates among the first k; p-MRR is antisymmetric in its two ranks. Relevant documents that
    are no candidates are never found, but count in the ideal order and in all that there is to
    recall.

    Args:
        candidates: the documents that each query may find, each once.
    """
    if metric == P_MRR:
        return 0.0
    name, _, cut = metric.partition("_at_")
    if name not in ("ndcg", "recall"):
        return None
    k = int(cut)
    expected = []
    for query, documents in judgements.items():
        # The ideal order, best first.
        gains = sorted((gain for gain in documents.values() if gain > 0), reverse=True)
        n = len(candidates[query])
        # Without relevant documents, every order scores 0.
        if not gains or n == 0:
            expected.append(0.0)
            continue
        reachable = [g for d, g in documents.items() if g > 0 and d in candidates[query]]
        if name == "recall":
            expected.append(len(reachable) / len(gains) * min(k, n) / n)
        else:
            # DCG of the ideal order; each rank is discounted by the logarithm of its number + 1.
            ideal = sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains[:k]))
            discounts = sum(1 / math.log2(rank + 2) for rank in range(min(k, n)))
            expected.append(sum(reachable) / n * discounts / ideal)
    return sum(expected) / len(expected)
