"""One model on one unmodified mteb task: mteb's score, and every query's share of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import OwnTask
from pipeline.evaluation.models.encoder import EvaluatedEncoder, MtebEncoder
from pipeline.evaluation.score.examples import worst_queries
from pipeline.evaluation.score.scoring import chance_level, p_mrr_per_query, per_query_scores
from pipeline.evaluation.score.search import ExactSearch
from pipeline.evaluation.tasks.benchmarks import benchmark_of
from pipeline.evaluation.tasks.library import load_mteb
from pipeline.evaluation.tasks.snapshots import (
    changed_judgements,
    data_revision,
    evaluated_splits,
    get_task,
    load_and_prove,
    localise,
    private_cache,
)

# mteb rounds each split's means to five decimals.
_ROUNDING = 2e-5

_SHOWN = ("ndcg_at_1", "ndcg_at_5", "ndcg_at_10", "map_at_1000", "recall_at_1", "recall_at_100")


def score_task(
    model: EvaluatedEncoder,
    *,
    task_name: str,
    instruction: str,
    snapshots: Path | None,
    scratch: Path,
    own: OwnTask | None = None,
) -> dict[str, Any]:
    """Evaluate, and check that our per-query scores add up to mteb's number.

    Args:
        instruction: what the task's queries ask of the model.
        snapshots: folder of data set snapshots in the hub's layout; None reads from the hub.
        scratch: an empty folder; mteb's own result files are left in `scratch/mteb`.
        own: where the task's data are, unless mteb has it.

    Returns:
        Everything the report needs, ready for JSON.
    """
    mteb = load_mteb()
    with private_cache(scratch / "datasets"):
        task = localise(get_task(task_name, own), snapshots)
        load_and_prove(task)
        search = ExactSearch(MtebEncoder(model, instruction))
        outcome = mteb.evaluate(
            search,
            task,
            # A cache of its own: elements that share one lose lines of run_settings.jsonl.
            cache=mteb.ResultCache(scratch / "mteb"),
            overwrite_strategy="always",
            co2_tracker=False,
            show_progress_bar=False,
        )[0]
        per_query = _per_query(task, search)
    return {
        "model": model.name,
        "task": task_name,
        "benchmark": benchmark_of(task_name),
        **_scores(task, outcome, per_query),
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
    """Query scores by `subset/split`."""
    metric = task.metadata.main_score
    scores = {}
    for (subset, split), rankings in search.rankings.items():
        judgements = task.dataset[subset][split]["relevant_docs"]
        if metric == "p-MRR":
            found = p_mrr_per_query(changed_judgements(task), rankings)
        else:
            found = per_query_scores(metric, judgements, rankings)
        scores[f"{subset}/{split}"] = found
    return scores


def _scores(task: Any, outcome: Any, per_query: dict[str, dict[str, float]]) -> dict[str, Any]:
    """mteb's numbers, in whole and in part, beside every query's."""
    metric, score = task.metadata.main_score, float(outcome.get_score())
    mean = sum(sum(s.values()) / len(s) for s in per_query.values()) / len(per_query)
    if abs(mean - score) > _ROUNDING:
        name = task.metadata.name
        raise RuntimeError(f"{name}: our queries average {mean}, mteb says {score}")
    return {
        "metric": metric,
        "score": score,
        "chance": _chance(task, metric),
        "by_split": {
            split: sum(row["main_score"] for row in rows) / len(rows)
            for split, rows in outcome.scores.items()
        },
        "other_scores": _other_scores([row for rows in outcome.scores.values() for row in rows]),
        "per_query": per_query,
    }


def _worst_queries(
    task: Any, search: ExactSearch, per_query: dict[str, dict[str, float]]
) -> dict[str, list[dict[str, Any]]]:
    """Examples by `subset/split`, in the order of `per_query`."""
    return {
        name: worst_queries(scores, task.dataset[subset][split], rankings)
        for ((subset, split), rankings), (name, scores) in zip(
            search.rankings.items(), per_query.items(), strict=True
        )
    }


def _chance(task: Any, metric: str) -> float | None:
    """Mean over splits of the score that a random order would get."""
    levels = []
    for _, _, data in evaluated_splits(task):
        candidates = data["top_ranked"]
        num_candidates = {
            query: len(data["corpus"] if candidates is None else candidates.get(query, ()))
            for query in data["relevant_docs"]
        }
        levels.append(chance_level(metric, data["relevant_docs"], num_candidates))
    known = [level for level in levels if level is not None]
    return sum(known) / len(known) if len(known) == len(levels) else None


def _other_scores(splits: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics beside the main one, mean over splits; FollowIR's on the original instructions."""
    originals = [row.get("og", row) for row in splits]
    return {
        metric: sum(float(row[metric]) for row in originals) / len(originals) for metric in _SHOWN
    }
