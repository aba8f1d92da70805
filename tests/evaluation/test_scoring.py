"""Scores of every task against mteb's own search, and its silent failures."""

from __future__ import annotations

import dataclasses
import itertools
import random
import shutil
from typing import Any

import benchmark_replicas as replicas
import mteb
import numpy as np
import pytest
from evaluation_support import TASKS, MiniLM, MtebEncoder, wrap
from mteb._evaluators.retrieval_metrics import (
    calculate_pmrr,
    calculate_retrieval_scores,
    make_score_dict,
)
from mteb.models import EncoderProtocol, SearchProtocol

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.datasets import (
    get_task,
    load_and_check,
    localise,
    private_cache,
)
from pipeline.evaluation.query_scores import chance_level, p_mrr_per_query, per_query_scores
from pipeline.evaluation.run import plan, run_all, run_element
from pipeline.evaluation.scoring import (
    ExactSearch,
    TopK,
    score_task,
)
from pipeline.evaluation.tasks import (
    DEFAULT_INSTRUCTION,
    INSTRUCTIONS,
    expand,
    list_elements,
)

FOLLOW_IR = "Core17InstructionRetrieval"


def score_with_mteb(encoder: MtebEncoder, task: str, config: EvaluateConfig) -> Any:
    """Return mteb's own result of a task on the same snapshots."""
    return mteb.evaluate(
        encoder,
        localise(get_task(task), config.snapshots),
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    )[0]


def texts_seen_by_the_model(task: str, snapshots, tmp_path, minilm: MiniLM) -> list[str]:
    model = wrap(minilm)
    minilm.seen.clear()
    score_task(
        model,
        task_name=task,
        instruction=INSTRUCTIONS.get(task, DEFAULT_INSTRUCTION),
        snapshots=snapshots,
        scratch=tmp_path,
    )
    return minilm.seen.copy()


def test_a_query_carries_its_own_instruction_exactly_once(snapshots, tmp_path, minilm):
    seen = texts_seen_by_the_model(FOLLOW_IR, snapshots, tmp_path, minilm)
    queries = [text for text in seen if text.startswith("Instruct: ")]
    assert len(queries) == 2 * len(replicas.TOPICS)
    for topic in replicas.TOPICS:
        about = [query for query in queries if f"Find {topic}." in query]
        assert len(about) == 2
        assert all(query.count(f"Find {topic}.") == 1 for query in about)
        assert all(query.count(DEFAULT_INSTRUCTION) == 1 for query in about)


@pytest.mark.parametrize("task", [FOLLOW_IR, "LEMBQMSumRetrieval", "BrightAopsRetrieval"])
def test_no_document_carries_an_instruction(task, snapshots, tmp_path, minilm):
    seen = texts_seen_by_the_model(task, snapshots, tmp_path, minilm)
    documents = [text for text in seen if not text.startswith("Instruct: ")]
    assert len(documents) >= len(replicas.TOPICS)
    for text in documents:
        assert any(sentence in text for sentence in replicas.TOPICS.values()), text
        assert DEFAULT_INSTRUCTION not in text
        assert "Given a" not in text


def test_a_title_is_joined_to_its_document_exactly_once(snapshots, tmp_path, minilm):
    seen = texts_seen_by_the_model(FOLLOW_IR, snapshots, tmp_path, minilm)
    titled = [text for text in seen if text.startswith("Glaciers")]
    assert len(titled) == 3
    assert all(text.count("Glaciers") == 1 for text in titled)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("instruction", "no instructions"),
        ("top_ranked", "no candidates"),
        ("qrel_diff", "no changed judgements"),
    ],
)
def test_a_snapshot_without_what_follow_ir_needs_is_refused_before_encoding(
    config, message, tmp_path
):
    replicas.write_follow_ir(tmp_path / "hub", without=(config,))

    class Untouched:
        def encode_texts(self, texts, prefix="", suffix=""):
            if list(texts) == ["."]:
                return np.ones((1, 2), dtype=np.float32)
            raise AssertionError("encoded before the data were proved complete")

    with pytest.raises(UserError, match=message):
        score_task(
            wrap(Untouched()),
            task_name=FOLLOW_IR,
            instruction="",
            snapshots=tmp_path / "hub",
            scratch=tmp_path / "scratch",
        )


def test_excluded_documents_are_never_found(snapshots, tmp_path, minilm):
    with private_cache(tmp_path):
        task = localise(get_task("BrightAopsRetrieval"), snapshots)
        load_and_check(task)
    data = task.dataset["default"]["standard"]
    search = ExactSearch(wrap(minilm), "", block_documents=7)
    search.index(data["corpus"])
    rankings = search.search(
        data["queries"],
        task_metadata=task.metadata,
        hf_split="standard",
        hf_subset="default",
        top_k=1000,
        top_ranked=data["top_ranked"],
    )
    for number, topic in enumerate(replicas.TOPICS):
        excluded = {f"aops/{topic}-{a}".replace(" ", "_") for a in replicas.ASPECTS[:2]}
        assert len(rankings[str(number)]) == 48 - 2
        assert not excluded & set(rankings[str(number)])


def test_our_search_satisfies_mtebs_protocol_and_inherits_nothing(minilm):
    assert isinstance(ExactSearch(wrap(minilm), ""), SearchProtocol)
    assert isinstance(MtebEncoder(wrap(minilm), ""), EncoderProtocol)  # the tests' reference
    assert ExactSearch.__mro__ == (ExactSearch, object)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_scores_what_mteb_scores_with_its_own_search(
    task, config, load, minilm, tmp_path
):
    index = next(
        e.index for e in list_elements(config) if (e.model.name, e.task) == ("strong", task)
    )
    ours = run_element(config, index, load=load)
    theirs = score_with_mteb(
        MtebEncoder(wrap(minilm), INSTRUCTIONS.get(task, DEFAULT_INSTRUCTION)), task, config
    )
    assert ours["score"] == pytest.approx(theirs.get_score(), abs=1e-6)
    assert ours["score"] != 0
    assert ours["by_split"] == pytest.approx(
        {split: rows[0]["main_score"] for split, rows in theirs.scores.items()}, abs=1e-6
    )


OTHERS = [
    task for task in expand(("FollowIR", "LongEmbed", "BRIGHT", "BRIGHT-long")) if task not in TASKS
] + ["BrightRetrieval", "BrightLongRetrieval"]


@pytest.mark.parametrize("task", OTHERS)
def test_the_other_tasks_of_the_benchmarks_score_what_mteb_scores(task, config, load):
    config = dataclasses.replace(config, tasks=(task,))
    element = next(e for e in list_elements(config) if e.model.name == "weak")
    ours = run_element(config, element.index, load=load)
    theirs = score_with_mteb(
        MtebEncoder(load(config, element), INSTRUCTIONS.get(task, DEFAULT_INSTRUCTION)),
        task,
        config,
    )
    assert ours["score"] == pytest.approx(theirs.get_score(), abs=1e-6)
    assert ours["metric"] in ("p-MRR", "ndcg_at_10", "recall_at_1")


@pytest.mark.parametrize("task", ["mFollowIR", "mFollowIRCrossLingual"])
def test_follow_ir_in_several_languages_scores_what_mteb_scores(task, config, load, tmp_path):
    repository = mteb.get_task(task).metadata.dataset["path"]
    replicas.write_multilingual_follow_ir(tmp_path / "hub", repository)
    config = dataclasses.replace(config, tasks=(task,), snapshots=tmp_path / "hub")
    weak, _ = list_elements(config)
    ours = run_element(config, weak.index, load=load)
    theirs = score_with_mteb(MtebEncoder(load(config, weak), DEFAULT_INSTRUCTION), task, config)
    assert ours["score"] == pytest.approx(theirs.get_score(), abs=1e-6)
    assert ours["metric"] == "p-MRR"
    assert len(ours["per_query"]) == 3


def test_a_task_that_reads_another_tasks_subset_gets_another_score(config, load, tmp_path):
    biology, economics = "BrightBiologyRetrieval", "BrightEconomicsRetrieval"
    config = dataclasses.replace(config, models=config.models[1:], tasks=(biology, economics))
    right = [result["score"] for result in run_all(config, load=load)]
    hub = tmp_path / "swapped"
    shutil.copytree(config.snapshots, hub)
    for part in (hub / "mteb/BRIGHT").iterdir():
        if part.is_dir():
            (part / "biology.jsonl").rename(part / "aside")
            (part / "economics.jsonl").rename(part / "biology.jsonl")
            (part / "aside").rename(part / "economics.jsonl")
    swapped = dataclasses.replace(config, snapshots=hub, output_dir=tmp_path / "other")
    wrong = [result["score"] for result in run_all(swapped, load=load)]
    assert all(abs(one - other) > 1e-4 for one, other in zip(right, wrong, strict=True))


def test_p_mrr_averages_to_mtebs_with_ties_and_missing_documents():
    generator = random.Random(3)
    documents = [f"d{i}" for i in range(12)]
    rankings, changed = {}, {}
    for query in range(9):
        for kind in ("og", "changed"):
            found = generator.sample(documents, 8)
            rankings[f"{query}-{kind}"] = {d: generator.randint(0, 4) / 4 for d in found}
        changed[str(query)] = generator.sample(documents, 3)
    # Its instruction excludes nothing, so that it has no part in the mean.
    changed["8"] = []
    ours = p_mrr_per_query(changed, rankings)
    og = {q: r for q, r in rankings.items() if q.endswith("-og")}
    new = {q: r for q, r in rankings.items() if q.endswith("-changed")}
    assert np.mean(list(ours.values())) == pytest.approx(calculate_pmrr(og, new, changed))


@pytest.mark.parametrize("metric", ["ndcg_at_3", "recall_at_3"])
def test_chance_equals_the_mean_over_all_orders(metric: str):
    # One relevant document is not among the candidates, and is never found.
    judgements = {"q": {"a": 1, "b": 2, "c": 0, "elsewhere": 1}}
    documents = ["a", "b", "c", "d", "e"]
    values = []
    for order in itertools.permutations(documents):
        scores = {document: -float(place) for place, document in enumerate(order)}
        values.append(per_query_scores(metric, judgements, {"q": scores})["q"])
    assert chance_level(metric, judgements, {"q": documents}) == pytest.approx(np.mean(values))


def test_chance_of_recall_is_the_share_of_documents_looked_at():
    documents = ["a", "b", "c", "d", "e", "f", "g", "h"]
    assert chance_level("recall_at_1", {"q": {"a": 1}}, {"q": documents}) == pytest.approx(1 / 8)
    assert chance_level("recall_at_10", {"q": {"a": 1}}, {"q": documents}) == 1
    assert chance_level("map_at_1000", {"q": {"a": 1}}, {"q": documents}) is None


@pytest.mark.parametrize(
    "metric",
    ["ndcg_at_5", "map_at_1000", "recall_at_3", "hit_rate_at_1", "precision_at_5", "mrr_at_5"],
)
def test_scores_of_queries_average_to_mtebs_for_every_metric(metric: str):
    generator = random.Random(5)
    documents = [f"d{i}" for i in range(30)]
    judgements, rankings = {}, {}
    for query in map(str, range(20)):
        judged = generator.sample(documents, 6)
        judgements[query] = {d: generator.choice((0, 0, 1, 2)) for d in judged}
        # Ties, which trec_eval breaks by the document's id.
        rankings[query] = {d: generator.randint(0, 5) / 5 for d in generator.sample(documents, 25)}
    found = calculate_retrieval_scores(rankings, judgements, (1, 3, 5, 1000))
    theirs = make_score_dict(
        ndcg=found.ndcg, _map=found.map, recall=found.recall, precision=found.precision,
        naucs={}, mrr=found.mrr, naucs_mrr={}, hit_rate=found.hit_rate, task_scores={},
    )  # fmt: skip
    ours = per_query_scores(metric, judgements, rankings)
    assert ours.keys() == rankings.keys()
    assert np.mean(list(ours.values())) == pytest.approx(theirs[metric], abs=1e-5)
    assert 0 < np.mean(list(ours.values())) < 1


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("MindSmallReranking", "max_over_subqueries_map_at_1000"),
        ("InstructIR", "robustness_at_10"),
        ("NevIR", "paired_accuracy"),
    ],
)
def test_a_task_whose_score_is_no_mean_over_queries_is_refused_before_anything_is_embedded(
    task: str, metric: str, one
):
    wrong = dataclasses.replace(one, tasks=(*one.tasks, task))
    for command in (plan, run_all):
        with pytest.raises(UserError, match=f"tasks: '{task}' is scored by {metric}, .*allowed"):
            command(wrong)


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
