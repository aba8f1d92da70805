"""A task's worst queries with what was found instead: where to look when a score is low."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.tasks.texts import document_texts, query_texts

_NUM_QUERIES = 10
_NUM_FOUND = 3
_SHOWN_CHARACTERS = 300


def worst_queries(
    scores: Mapping[str, float], data: Any, rankings: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """The ten lowest scores of a split, each with its first documents and its best relevant one.

    Args:
        scores: score by query; for p-MRR by base query, shown with its changed instruction.
        data: the split's corpus, queries and judgements, as mteb loads them.
        rankings: document scores by query.
    """
    rows = {query: row for row, query in enumerate(data["queries"]["id"][:])}
    places = {document: row for row, document in enumerate(data["corpus"]["id"][:])}
    texts = query_texts(data["queries"])
    examples = []
    for query in sorted(scores, key=lambda query: (scores[query], query))[:_NUM_QUERIES]:
        key = query if query in rows else f"{query}-changed"
        found = rankings[key]
        ordered = sorted(found, key=lambda document: (found[document], document), reverse=True)
        judged = data["relevant_docs"][key]
        relevant = [rank for rank, d in enumerate(ordered, start=1) if judged.get(d, 0) > 0]
        shown = [*range(1, min(_NUM_FOUND, len(ordered)) + 1), *relevant[:1]]
        examples.append(
            {
                "query": key,
                "score": scores[query],
                "text": texts[rows[key]][:_SHOWN_CHARACTERS],
                "documents": [
                    _document(rank, ordered, found, judged, data["corpus"], places)
                    for rank in dict.fromkeys(shown)
                ],
            }
        )
    return examples


def _document(
    rank: int,
    ordered: Sequence[str],
    found: Mapping[str, float],
    judged: Mapping[str, int],
    corpus: Any,
    places: Mapping[str, int],
) -> dict[str, Any]:
    document = ordered[rank - 1]
    (text,) = document_texts(corpus.select([places[document]]))
    return {
        "rank": rank,
        "id": document,
        "similarity": round(found[document], 4),
        "relevant": judged.get(document, 0) > 0,
        "text": text[:_SHOWN_CHARACTERS],
    }
