"""A plan that grows, shrinks or finds other texts: what is embedded stays, and stays right."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from evaluation_support import TASKS, MiniLM, wrap

from pipeline.evaluation.embed import embed_element, missing_blocks
from pipeline.evaluation.embedding_plan import read_plan, write_plan
from pipeline.evaluation.run import run_all, score_all
from pipeline.evaluation.tasks import list_elements
from pipeline.evaluation.texts import PlannedText

AOPS = "BrightAopsRetrieval"


def embed_all(config, **how) -> int:
    write_plan(config)
    return embed_element(config, 0, 1, **how)


def texts_of(config) -> set[PlannedText]:
    plan = read_plan(config)
    return {key for block in range(len(plan.blocks)) for key in plan.read_block(block)}


def test_a_task_more_embeds_its_own_texts_only_and_leaves_all_scores_bit_identical(
    strong, load, small_blocks
):
    questions = "BrightTheoremQAQuestionsRetrieval"  # on the documents of AOPS
    before = dataclasses.replace(strong, tasks=(AOPS, TASKS[0]))
    after = dataclasses.replace(strong, tasks=(AOPS, questions, TASKS[0], "BrightPonyRetrieval"))
    assert embed_all(before, load=load) > 0
    first = {result["task"]: result["per_query"] for result in score_all(before)}
    seen = texts_of(before)

    encoder = MiniLM()
    model = wrap(encoder)
    encoder.seen.clear()
    embed_all(after, load=lambda *_: model)
    wanted = texts_of(after)
    assert len(encoder.seen) == len(wanted - seen) < len(wanted) / 2
    assert seen <= wanted
    for element in list_elements(after):
        element.result_path.unlink(missing_ok=True)
    stored = score_all(after)
    assert {r["task"]: r["per_query"] for r in stored if r["task"] in first} == first
    for element in list_elements(after):
        element.result_path.unlink()
    direct = run_all(after, load=load)
    assert [r["score"] for r in stored] == pytest.approx([r["score"] for r in direct], abs=1e-6)
    # With fewer tasks again, nothing at all.
    assert embed_all(before, load=load) == 0


def test_a_plan_shares_blocks_only_with_what_every_model_has_embedded(
    config, load, small_blocks, tmp_path
):
    weak, strong = config.models
    large = dataclasses.replace(config, models=(strong,), tasks=(AOPS, TASKS[0]))
    small = dataclasses.replace(large, tasks=(AOPS,))
    wanted = {*write_plan(dataclasses.replace(small, output_dir=tmp_path / "fresh")).block_costs}
    write_plan(large)
    assert {*write_plan(small).block_costs} == wanted  # planned before, and never embedded
    embed_element(large, 0, 1, load=load)
    both = dataclasses.replace(large, models=(strong, weak))
    # The same tasks for one model more: the plan stays, and what the first has embedded.
    assert write_plan(both) == read_plan(large)
    assert missing_blocks(both, strong, read_plan(both)) == []


def test_texts_that_change_at_their_place_get_vectors_of_their_own(
    strong, load, small_blocks, tmp_path
):
    hub = tmp_path / "hub"
    shutil.copytree(strong.snapshots, hub)
    config = dataclasses.replace(strong, tasks=(AOPS,), snapshots=hub)
    embed_all(config, load=load)
    path = hub / "mteb/BRIGHT/documents/aops.jsonl"
    path.write_text(path.read_text().replace("On the history", "About the history"))
    assert embed_all(config, load=load) > 0
    (stored,) = score_all(config)
    list_elements(config)[0].result_path.unlink()
    (direct,) = run_all(config, load=load)
    assert stored["score"] == pytest.approx(direct["score"], abs=1e-6)
