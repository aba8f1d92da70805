"""Query scores, chance and intervals against brute force and mteb's own functions."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from datasets import Dataset
from mteb._create_dataloaders import _combine_queries_with_instruction_text, _corpus_to_dict
from mteb._evaluators.retrieval_metrics import calculate_pmrr

from pipeline.evaluation.datasets import document_texts, query_texts
from pipeline.evaluation.scoring import TopK, chance_level, p_mrr_per_query, per_query_scores
from pipeline.evaluation.tables import interval, paired_difference


def test_p_mrr_averages_to_mtebs_with_ties_and_missing_documents():
    generator = random.Random(3)
    documents = [f"d{i}" for i in range(12)]
    rankings, changed = {}, {}
    for query in range(9):
        for kind in ("og", "changed"):
            found = generator.sample(documents, 8)
            rankings[f"{query}-{kind}"] = {d: generator.randint(0, 4) / 4 for d in found}
        changed[str(query)] = generator.sample(documents, 3)
    ours = p_mrr_per_query(changed, rankings)
    og = {q: r for q, r in rankings.items() if q.endswith("-og")}
    new = {q: r for q, r in rankings.items() if q.endswith("-changed")}
    assert np.mean(list(ours.values())) == pytest.approx(calculate_pmrr(og, new, changed))


def test_chance_of_ndcg_equals_the_mean_over_all_orders():
    judgements = {"q": {"a": 1, "b": 1, "c": 0}}
    documents = ["a", "b", "c", "d", "e"]
    values = []
    for order in itertools.permutations(documents):
        scores = {document: -float(place) for place, document in enumerate(order)}
        values.append(per_query_scores("ndcg_at_3", judgements, {"q": scores})["q"])
    assert chance_level("ndcg_at_3", judgements, {"q": 5}) == pytest.approx(np.mean(values))


def test_chance_of_recall_is_the_share_of_documents_looked_at():
    assert chance_level("recall_at_1", {"q": {"a": 1}}, {"q": 8}) == pytest.approx(1 / 8)
    assert chance_level("recall_at_10", {"q": {"a": 1}}, {"q": 8}) == 1
    assert chance_level("map_at_1000", {"q": {"a": 1}}, {"q": 8}) is None


def test_a_metric_that_is_no_mean_over_queries_is_refused():
    with pytest.raises(ValueError, match="no mean over queries"):
        per_query_scores("nauc_ndcg_at_10", {}, {})


def test_the_interval_covers_the_truth_as_often_as_it_claims():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        values = generator.normal(0.3, 0.2, size=60)
        low, high = interval({"s": {str(i): float(v) for i, v in enumerate(values)}})
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 100 <= 0.99


def test_pairing_removes_what_makes_a_query_hard_for_both():
    generator = np.random.default_rng(1)
    hardness = generator.normal(0, 1, size=80)
    gain = generator.normal(0.1, 0.05, size=80)
    before = {"s": {str(i): float(h) for i, h in enumerate(hardness)}}
    after = {"s": {str(i): float(total) for i, total in enumerate(hardness + gain)}}
    difference, low, high = paired_difference(after, before)
    assert difference == pytest.approx(gain.mean())
    # The standard error of the mean gain, not that of the scores, sets the width.
    assert high - low == pytest.approx(2 * 1.96 * gain.std() / math.sqrt(80), rel=0.1)
    assert low > 0


def test_splits_weigh_the_same_whatever_their_number_of_queries():
    before = {"a": {"1": 0.0}, "b": {str(i): 0.0 for i in range(99)}}
    after = {"a": {"1": 1.0}, "b": {str(i): 0.0 for i in range(99)}}
    assert paired_difference(after, before) == (0.5, 0.5, 0.5)


def test_results_on_different_queries_are_not_compared():
    with pytest.raises(ValueError, match="different queries"):
        paired_difference({"s": {"1": 1.0}}, {"s": {"2": 1.0}})


@pytest.mark.parametrize("block", [1, 3, 50])
@pytest.mark.parametrize("k", [1, 7, 50, 80])
def test_a_running_top_k_equals_a_full_sort(block, k):
    scores_QM = np.random.default_rng(k).normal(size=(4, 50)).astype(np.float32)
    scores_QM[0, 10:] = -np.inf
    best = TopK(num_queries=4, k=k)
    for start in range(0, 50, block):
        best.add(scores_QM[:, start : start + block], first_document=start)
    for found, scores in zip(best.rows(), scores_QM, strict=True):
        expected = [int(i) for i in np.argsort(-scores) if scores[i] > -np.inf][:k]
        assert sorted(row for row, _ in found) == sorted(expected)
        assert all(score == scores[row] for row, score in found)


def test_strings_are_those_that_mteb_would_make():
    rows = {"id": ["1", "2", "3"], "title": ["A title", "", None], "text": [" x ", "y\n", "z"]}
    theirs = [
        _corpus_to_dict({key: rows[key][i] for key in rows if rows[key][i] is not None})["text"]
        for i in range(3)
    ]
    assert document_texts(Dataset.from_dict(rows)) == theirs
    assert document_texts(Dataset.from_dict({"text": [" only text "]})) == ["only text"]
    queries = Dataset.from_dict({"text": ["q1", "q2"], "instruction": ["do this", None]})
    assert query_texts(queries) == _combine_queries_with_instruction_text(queries)["text"][:]
    assert query_texts(Dataset.from_dict({"text": ["q1"]})) == ["q1"]
