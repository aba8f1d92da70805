"""Elements: independent, resumable, merged without loss, and equal to mteb run by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mteb
import pytest
from evaluation_support import TASKS, MtebEncoder, wrap
from mteb.models import ModelMeta

from pipeline.config import EvaluateConfig, EvaluatedModel
from pipeline.errors import UserError
from pipeline.evaluation.datasets import get_task, load_texts, localise
from pipeline.evaluation.results import merge_results
from pipeline.evaluation.run import num_elements, run_all, run_element
from pipeline.evaluation.tasks import DEFAULT_INSTRUCTION, INSTRUCTIONS, expand, list_elements


def only(config: EvaluateConfig, *tasks: str) -> EvaluateConfig:
    return EvaluateConfig(
        output_dir=config.output_dir,
        models=config.models,
        tasks=tasks,
        snapshots=config.snapshots,
        max_length=config.max_length,
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_task_scores_what_mteb_scores_with_its_own_search(
    task, config, load, minilm, tmp_path
):
    index = next(
        e.index for e in list_elements(config) if (e.model.name, e.task) == ("strong", task)
    )
    ours = run_element(config, index, load=load)
    theirs = mteb.evaluate(
        MtebEncoder(wrap(minilm), INSTRUCTIONS.get(task, DEFAULT_INSTRUCTION)),
        localise(get_task(task), config.snapshots),
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    )[0]
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
    element = next(e for e in list_elements(only(config, task)) if e.model.name == "weak")
    ours = run_element(only(config, task), element.index, load=load)
    theirs = mteb.evaluate(
        MtebEncoder(load(config, element), INSTRUCTIONS.get(task, DEFAULT_INSTRUCTION)),
        localise(get_task(task), config.snapshots),
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    )[0]
    assert ours["score"] == pytest.approx(theirs.get_score(), abs=1e-6)
    assert ours["metric"] in ("p-MRR", "ndcg_at_10", "recall_at_1")


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


def test_no_two_subsets_of_the_replicas_share_a_question_or_most_of_their_texts(snapshots):
    texts = {
        task: {"document": set(documents), "query": set(queries)}
        for task in expand(("FollowIR", "LongEmbed", "BRIGHT", "BRIGHT-long"))
        for documents, queries in [load_texts(task, snapshots=snapshots)]
    }
    same_documents = {f"Bright{name}{{}}Retrieval" for name in ("Aops", "TheoremQAQuestions")}
    for one, other in itertools.combinations(texts, 2):
        if one.replace("Long", "") == other.replace("Long", ""):
            continue  # the same questions on short and on long documents
        assert not texts[one]["query"] & texts[other]["query"], (one, other)
        shared = {name.format(long) for name in same_documents for long in ("", "Long")}
        if not {one, other} <= shared:
            assert not texts[one]["document"] & texts[other]["document"], (one, other)


def test_a_finished_element_is_skipped_and_an_unfinished_one_runs(config, load):
    config = only(config, "BrightBiologyRetrieval")
    first = run_element(config, 0, load=load)

    def refuse(*_: object) -> None:
        raise AssertionError("loaded a model for a finished element")

    assert run_element(config, 0, load=refuse) == first
    list_elements(config)[0].result_path.unlink()
    with pytest.raises(AssertionError, match="finished element"):
        run_element(config, 0, load=refuse)


def test_an_interrupted_element_leaves_nothing_that_counts_as_finished(config, load):
    config = only(config, "BrightBiologyRetrieval")

    class Interrupted:
        def embed(self, *_: object) -> object:
            raise KeyboardInterrupt

    def die(*args: object) -> object:
        encoder = load(*args)
        return dataclasses.replace(encoder, embedder=Interrupted())

    with pytest.raises(KeyboardInterrupt):
        run_element(config, 0, load=die)
    assert not list_elements(config)[0].result_path.exists()


def test_merging_keeps_every_line_and_mteb_reads_the_result(config, load):
    config = only(config, "BrightBiologyRetrieval", "LEMBNeedleRetrieval")
    run_all(config, load=load)
    merged = merge_results(config)
    merge_results(config)  # again: nothing doubles
    loaded = mteb.ResultCache(merged).load_results(include_remote=False)
    scores = {
        (result.model_name, task.task_name): task.get_score()
        for result in loaded.model_results
        for task in result.task_results
    }
    assert scores == pytest.approx(
        {
            (f"diffembed/{e.model.name}", e.task): json.loads(e.result_path.read_text())["score"]
            for e in list_elements(config)
        }
    )
    # What the leaderboard asks of a submission: rows of a table, and a whole description.
    table = loaded.to_dataframe(aggregation_level="split")
    assert len(table) == 1 + 8
    for path in merged.rglob("model_meta.json"):
        meta = ModelMeta.model_validate(json.loads(path.read_text()))
        assert path.parent.name == meta.revision
        assert meta.max_tokens == config.max_length
    settings = list(merged.rglob("run_settings.jsonl"))
    lines = [json.loads(line) for path in settings for line in path.read_text().splitlines()]
    assert len(settings) == 2
    assert sorted((line["task"], len(line["splits"])) for line in lines) == [
        ("BrightBiologyRetrieval", 1),
        ("BrightBiologyRetrieval", 1),
        ("LEMBNeedleRetrieval", 8),
        ("LEMBNeedleRetrieval", 8),
    ]


def test_an_index_outside_the_array_is_the_users_error(config):
    assert num_elements(config) == 12
    with pytest.raises(UserError, match="0 to 11"):
        run_element(config, 12)


def test_a_folder_without_weights_is_the_users_error(config, tmp_path):
    (tmp_path / "empty").mkdir()
    models = (EvaluatedModel(name="m", path=tmp_path / "empty"),)
    broken = EvaluateConfig(output_dir=tmp_path, models=models, tasks=("BrightAopsRetrieval",))
    with pytest.raises(UserError, match="no export there"):
        run_element(broken, 0)


def test_counting_elements_loads_neither_torch_nor_mteb():
    code = (
        "import sys; import pipeline.evaluation.run; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'mteb', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path.cwd()).returncode == 0
