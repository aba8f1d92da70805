"""Score an unmodified mteb task by exact search, and keep the score of each query.

    mteb.evaluate --> ExactSearch.search:  query_QD = embed(queries)
                                           for M documents at a time:
                                               scores_QM = query_QD @ embed(documents).T
                                               -inf where a query must not find a document
                                               TopK.add
                  <-- rankings --> score of each query, chance level, worst queries --> Result

mteb itself re-ranks query by query and copies nearly the whole corpus for each (measured: 8 s and
three copies of 6.8 GB per query on BRIGHT's largest set). Here each document passes once.

Letters: Q queries, M documents of a block, K best documents, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import OwnTask
from pipeline.evaluation.datasets import (
    changed_judgements,
    data_revision,
    document_texts,
    evaluated_splits,
    get_task,
    load_and_check,
    localise,
    private_cache,
    query_texts,
)
from pipeline.evaluation.models import EvaluatedEncoder
from pipeline.evaluation.query_scores import (
    P_MRR,
    Rankings,
    best_first,
    chance_level,
    p_mrr_per_query,
    per_query_scores,
)
from pipeline.evaluation.results import RESULT_VERSION, Result
from pipeline.evaluation.tasks import benchmark_of, load_mteb

# mteb rounds each split's means to five decimals.
_ROUNDING = 2e-5
# Metrics that a result lists in addition to the main one.
_OTHER_METRICS = (
    *("ndcg_at_1", "ndcg_at_5", "ndcg_at_10"),
    *("map_at_1000", "recall_at_1", "recall_at_100"),
)
# Documents per block. Bounds memory: 8192 x 4096 dimensions x 4 bytes = 128 MiB.
_BLOCK_DOCUMENTS = 8192


def score_task(
    model: EvaluatedEncoder,
    *,
    task_name: str,
    instruction: str,
    snapshots: Path | None,
    scratch: Path,
    own: OwnTask | None = None,
) -> Result:
    """Evaluate a task, and check that our per-query scores average to mteb's score.

    Args:
        instruction: precedes the task's queries, by the model's template.
        snapshots: folder of data set snapshots in the hub's layout; None reads from the hub.
        scratch: an empty folder; mteb's own result files are left in `scratch/mteb`.
        own: the folder of the task's data, unless it is a task of mteb.

    Returns:
        The result, without its provenance, which the caller knows.
    """
    mteb = load_mteb()
    with private_cache(scratch / "datasets"):
        task = localise(get_task(task_name, own), snapshots)
        load_and_check(task)
        search = ExactSearch(model, instruction)
        # mteb computes the official number; ours are its parts, and are compared with it.
        outcome = mteb.evaluate(
            search,
            task,
            # One cache per element: elements that share one lose lines of run_settings.jsonl.
            cache=mteb.ResultCache(scratch / "mteb"),
            overwrite_strategy="always",
            co2_tracker=False,
            show_progress_bar=False,
        )[0]
        # Within the private cache: judgements of FollowIR are still to be loaded.
        per_query = _per_query(task, search)
    metric, score = task.metadata.main_score, float(outcome.get_score())
    _check_mean(task.metadata.name, score, per_query)
    return {
        "version": RESULT_VERSION,
        "model": model.name,
        "task": task_name,
        "benchmark": benchmark_of(task_name),
        "metric": metric,
        "score": score,
        "chance": _chance(task, metric),
        "by_split": {
            split: sum(row["main_score"] for row in rows) / len(rows)
            for split, rows in outcome.scores.items()
        },
        "other_scores": _other_scores([row for rows in outcome.scores.values() for row in rows]),
        "per_query": per_query,
        "worst_queries": _worst_queries(task, search, per_query),
        "instruction": instruction,
        "query_template": model.template.query,
        "document_template": model.template.document,
        "max_length": model.max_length,
        "precision": model.precision,
        "revision": model.revision,
        "dataset_revision": data_revision(task, snapshots),
        "mteb_version": outcome.mteb_version,
    }


def _per_query(task: Any, search: ExactSearch) -> dict[str, dict[str, float]]:
    """Return query scores by `subset/split`."""
    metric = task.metadata.main_score
    scores = {}
    for (subset, split), rankings in search.rankings.items():
        judgements = task.dataset[subset][split]["relevant_docs"]
        if metric == P_MRR:
            found = p_mrr_per_query(changed_judgements(task, subset), rankings)
        else:
            found = per_query_scores(metric, judgements, rankings)
        scores[f"{subset}/{split}"] = found
    return scores


def _check_mean(task: str, score: float, per_query: dict[str, dict[str, float]]) -> None:
    mean = sum(sum(s.values()) / len(s) for s in per_query.values()) / len(per_query)
    if abs(mean - score) > _ROUNDING:
        raise RuntimeError(f"{task}: our queries average {mean}, mteb reports {score}")


def _worst_queries(
    task: Any, search: ExactSearch, per_query: dict[str, dict[str, float]]
) -> dict[str, list[dict[str, Any]]]:
    """Return examples by `subset/split`, in the order of `per_query`."""
    return {
        name: worst_queries(scores, task.dataset[subset][split], rankings)
        for ((subset, split), rankings), (name, scores) in zip(
            search.rankings.items(), per_query.items(), strict=True
        )
    }


def _chance(task: Any, metric: str) -> float | None:
    """Return the mean over splits of the score of a random order."""
    levels = []
    for _, _, data in evaluated_splits(task):
        corpus, candidates = frozenset(data["corpus"]["id"][:]), data["top_ranked"]
        # Only queries that mteb scores: judgements may name others.
        queries = set(data["queries"]["id"][:])
        judged = {q: found for q, found in data["relevant_docs"].items() if q in queries}
        findable = {q: corpus if candidates is None else candidates.get(q, ()) for q in judged}
        levels.append(chance_level(metric, judged, findable))
    # A mean over some of the splits would mislead.
    known = [level for level in levels if level is not None]
    return sum(known) / len(known) if len(known) == len(levels) else None


def _other_scores(splits: list[dict[str, Any]]) -> dict[str, float]:
    """Average further metrics over splits; FollowIR's are of the original instructions."""
    # FollowIR reports every metric for both instructions.
    originals = [row.get("og", row) for row in splits]
    return {
        metric: sum(float(row[metric]) for row in originals) / len(originals)
        for metric in _OTHER_METRICS
    }


class ExactSearch:
    """Rank documents by dot product; satisfies mteb's `SearchProtocol`.

    Args:
        model: embeds queries and documents.
        instruction: precedes queries, never documents.
        block_documents: documents embedded and scored at a time.

    Attributes:
        rankings: by subset and split, for the scores of single queries.
    """

    def __init__(
        self,
        model: EvaluatedEncoder,
        instruction: str,
        block_documents: int = _BLOCK_DOCUMENTS,
    ) -> None:
        self._embed = model.embedder.embed
        self._instruction = instruction
        self._block_documents = block_documents
        self._corpus: Any = None
        self.mteb_model_meta = model.meta()
        self.rankings: dict[tuple[str, str], Rankings] = {}

    def index(self, corpus: Any, **kwargs: Any) -> None:
        """Take the corpus; `search` embeds it block by block."""
        self._corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> Rankings:
        """Return the best `top_k` documents of every query, with scores.

        Args:
            queries: as mteb loads them: the instruction of a single query (FollowIR) is a column.
            top_ranked: the documents each query may find (FollowIR's candidates, BRIGHT's corpus
                without the excluded ones); None for all documents.
        """
        query_ids = list(queries["id"])
        # Only ids: texts are read block by block.
        document_ids = list(self._corpus["id"])
        candidates = _candidate_rows(query_ids, document_ids, top_ranked)
        # All queries stay in memory: they are few, and every block needs them.
        query_QD = self._embed("query", self._instruction, query_texts(queries))
        best = TopK(num_queries=len(query_ids), k=top_k)
        for start in range(0, len(document_ids), self._block_documents):
            rows = range(start, min(start + self._block_documents, len(document_ids)))
            texts = document_texts(self._corpus.select(rows))
            scores_QM = query_QD @ self._embed("document", "", texts).T
            # NaN compares false with everything: such documents would silently vanish.
            if np.isnan(scores_QM).any():
                raise ValueError(f"{task_metadata.name}: the model returned NaN")
            # All queries with all documents, then a mask: faster than many small products.
            if candidates is not None:
                scores_QM[~_candidate_mask(candidates, rows)] = -np.inf
            best.add(scores_QM, first_document=start)
        rankings = {
            query_id: {document_ids[row]: score for row, score in found}
            for query_id, found in zip(query_ids, best.rows(), strict=True)
        }
        self.rankings[hf_subset, hf_split] = rankings
        return rankings


class TopK:
    """The k best documents of every query over blocks of documents."""

    def __init__(self, *, num_queries: int, k: int) -> None:
        self._k = k
        self._scores_QK = np.empty((num_queries, 0), dtype=np.float32)
        self._documents_QK = np.empty((num_queries, 0), dtype=np.int64)

    def add(self, scores_QM: np.ndarray, *, first_document: int) -> None:
        """Add a block's scores; -inf marks documents that a query must not find."""
        # (Q, K + M): the best documents so far, then the new block.
        documents_M = np.arange(first_document, first_document + scores_QM.shape[1])
        scores = np.concatenate([self._scores_QK, scores_QM], axis=1)
        documents = np.concatenate(
            [self._documents_QK, np.broadcast_to(documents_M, scores_QM.shape)], axis=1
        )
        if scores.shape[1] > self._k:
            # Not sorted: mteb sorts rankings itself, and its order of ties decides.
            kept_QK = np.argpartition(-scores, self._k - 1, axis=1)[:, : self._k]
            scores = np.take_along_axis(scores, kept_QK, axis=1)
            documents = np.take_along_axis(documents, kept_QK, axis=1)
        self._scores_QK, self._documents_QK = scores, documents

    def rows(self) -> list[list[tuple[int, float]]]:
        """Return each query's (document row, score) pairs, in no particular order."""
        return [
            [
                (int(document), float(score))
                for document, score in zip(documents, scores, strict=True)
                if score > -np.inf
            ]
            for documents, scores in zip(self._documents_QK, self._scores_QK, strict=True)
        ]


def _candidate_rows(
    query_ids: Sequence[str],
    document_ids: Sequence[str],
    top_ranked: Mapping[str, Sequence[str]] | None,
) -> list[np.ndarray] | None:
    """Return the sorted document rows that each query may find, or None for all."""
    if top_ranked is None:
        return None
    row_of = {document_id: row for row, document_id in enumerate(document_ids)}
    return [
        # Sorted, so that the candidates in a block are one slice.
        np.sort(np.array([row_of[d] for d in top_ranked.get(query_id, ())], dtype=np.int64))
        for query_id in query_ids
    ]


def _candidate_mask(candidates: Sequence[np.ndarray], rows: range) -> np.ndarray:
    """Return (Q, len(rows)): True where the query may find the document."""
    # Of one block: a mask of all documents would take Q bytes per document.
    mask = np.zeros((len(candidates), len(rows)), dtype=bool)
    for query, documents in enumerate(candidates):
        first, last = np.searchsorted(documents, (rows.start, rows.stop))
        mask[query, documents[first:last] - rows.start] = True
    return mask


# Extent of the examples.
_NUM_WORST_QUERIES = 10
_NUM_BEST_DOCUMENTS = 3
_SHOWN_CHARACTERS = 300


def worst_queries(
    scores: Mapping[str, float], data: Any, rankings: Rankings
) -> list[dict[str, Any]]:
    """Describe the ten lowest scores of a split: best documents and the best relevant document.

    Args:
        scores: score by query; for p-MRR by base query, shown with its changed instruction.
        data: the split's corpus, queries and judgements, as mteb loads them.
        rankings: document scores by query.
    """
    rows = {query: row for row, query in enumerate(data["queries"]["id"][:])}
    row_of = {document: row for row, document in enumerate(data["corpus"]["id"][:])}
    texts = query_texts(data["queries"])
    examples = []
    # Equal scores by id, so that every run shows the same examples.
    for query in sorted(scores, key=lambda query: (scores[query], query))[:_NUM_WORST_QUERIES]:
        # p-MRR scores a pair of queries; the changed one is where it went wrong.
        key = query if query in rows else f"{query}-changed"
        found = rankings[key]
        ordered = best_first(found)
        judged = data["relevant_docs"][key]
        relevant = [rank for rank, d in enumerate(ordered, start=1) if judged.get(d, 0) > 0]
        # The first documents, and the relevant one that should have been among them.
        shown = [*range(1, min(_NUM_BEST_DOCUMENTS, len(ordered)) + 1), *relevant[:1]]
        examples.append(
            {
                "query": key,
                "score": scores[query],
                "text": texts[rows[key]][:_SHOWN_CHARACTERS],
                "documents": [
                    _document(rank, ordered, found, judged, data["corpus"], row_of)
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
    row_of: Mapping[str, int],
) -> dict[str, Any]:
    document = ordered[rank - 1]
    # One row: reading the whole corpus for three examples would take its memory.
    (text,) = document_texts(corpus.select([row_of[document]]))
    return {
        "rank": rank,
        "id": document,
        "similarity": round(found[document], 4),
        "relevant": judged.get(document, 0) > 0,
        "text": text[:_SHOWN_CHARACTERS],
    }
