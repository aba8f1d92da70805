"""Plans: every text once, the same for any number of processes, and reused as they grow."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from evaluation_support import TASKS, MiniLM, wrap

from pipeline.data.batch import assign_by_cost
from pipeline.errors import UserError
from pipeline.evaluation.datasets import (
    document_texts,
    evaluated_splits,
    get_task,
    load_and_check,
    localise,
    private_cache,
    query_texts,
)
from pipeline.evaluation.distinct_texts import (
    PlannedText,
)
from pipeline.evaluation.embed import embed_element, missing_blocks
from pipeline.evaluation.embedding_plan import (
    divide,
    find_digests,
    read_plan,
    sort_by_digest,
    write_plan,
)
from pipeline.evaluation.run import run_all, score_all
from pipeline.evaluation.tasks import (
    INSTRUCTIONS,
    PAPER_INSTRUCTIONS,
    list_elements,
)

AOPS = "BrightAopsRetrieval"
REAL_SIZES = {
    "Robust04": (47_492, 25.4), "News21": (30_921, 16.9), "Core17": (19_899, 10.3),
    "NarrativeQA": (355, 27.0), "Needle": (800, 6.6), "Passkey": (800, 6.6), "QMSum": (197, 2.4),
    "SummScreen": (336, 2.4), "Wikim": (300, 2.6), "Leetcode": (413_932, 132.8),
    "Stackoverflow": (107_081, 55.6), "Aops": (188_002, 47.2), "EarthScience": (121_249, 9.4),
    "Theorems": (23_839, 6.9), "Biology": (57_359, 4.9), "Economics": (50_220, 4.2),
    "Psychology": (52_835, 4.4), "Robotics": (61_961, 4.5), "Sustainable": (60_792, 4.6),
    "Pony": (7_894, 0.6), "Long": (5_650, 89.1),
}  # fmt: skip


def test_loading_side_by_side_writes_the_same_plan(strong, small_blocks):
    alone = write_plan(strong)
    files = [path for path in alone.folder.parent.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == [
        *("index.npz", "index.npz", "plan.json", "texts.arrow")
    ]
    written = [path.read_bytes() for path in files]
    assert write_plan(strong, num_workers=2) == alone
    assert [path.read_bytes() for path in files] == written


def test_digests_are_found_as_in_a_dictionary_and_no_others():
    generator = np.random.default_rng(0)
    digests_N2 = generator.integers(2, 2**64 - 2, (500, 2), dtype=np.uint64)
    places_N2 = generator.integers(0, 99, (500, 2), dtype=np.int32)
    place_of = {
        tuple(digest): tuple(place) for digest, place in zip(digests_N2, places_N2, strict=True)
    }
    # Known ones, others with the same first half, and some below and above all of them.
    twins_M2 = digests_N2[:20] + np.array([0, 1], np.uint64)
    ends_M2 = np.array([[0, 0], [2**64 - 1] * 2], np.uint64)
    wanted_M2 = np.concatenate([digests_N2[::3], twins_M2, ends_M2])
    known_N2, sorted_N2 = sort_by_digest(digests_N2, places_N2)
    found_M = find_digests(known_N2, wanted_M2)
    for row, digest in zip(found_M, wanted_M2, strict=True):
        found = None if row < 0 else tuple(sorted_N2[row])
        assert found == place_of.get(tuple(digest))
    assert set(find_digests(known_N2[:0], wanted_M2)) == {-1}


def test_indices_are_written_as_lookups_search_them(strong, small_blocks):
    write_plan(strong)
    written = sorted(strong.output_dir.glob("plan/*/index.npz"))
    assert len(written) == 2  # of the plan, and of its cut
    for path in written:
        digests_N2 = np.load(path)["digests"]
        assert (np.diff(digests_N2[:, 0].astype(object)) > 0).all()
        assert digests_N2[:, 0].flags.c_contiguous  # else each search would copy the column


def test_64_elements_are_balanced_to_5_percent_on_the_real_sizes():
    generator = np.random.default_rng(0)
    costs = []
    for documents, mega_tokens in REAL_SIZES.values():
        # Lengths of web documents are about log-normal.
        tokens = generator.lognormal(0, 1.2, size=documents)
        tokens = np.minimum(tokens * mega_tokens * 1e6 / tokens.sum(), 32768)
        costs.append(tokens * (1 + tokens / 35_000))
    ordered = np.sort(np.concatenate(costs))[::-1]
    blocks = divide(ordered.tolist())
    sums = [ordered[rows.start : rows.stop].sum() for rows in blocks]
    loads = np.bincount(assign_by_cost(np.array(sums), 64), weights=sums)
    assert max(loads) <= 1.05 * np.mean(loads)
    assert sum(len(rows) for rows in blocks) == len(ordered)


def test_scoring_without_a_plan_or_with_another_is_the_users_error(strong, load, small_blocks):
    with pytest.raises(UserError, match="no plan"):
        embed_element(strong, 0, 1, load=load)
    write_plan(strong)
    changed = dataclasses.replace(strong, instructions={AOPS: "Find it"})
    with pytest.raises(UserError, match="no plan"):
        read_plan(changed)
    with pytest.raises(UserError, match="0 to 1"):
        embed_element(strong, 2, 2, load=load)


def test_two_wordings_share_the_documents_of_one_plan_and_get_their_own_queries(config):
    config = dataclasses.replace(config, tasks=(AOPS,), models=config.models[:1])
    alone = write_plan(config)
    paper = dataclasses.replace(config.models[0], name="paper", instruction_set="paper")
    both = write_plan(dataclasses.replace(config, models=(*config.models, paper)))
    keys = [key for block in range(len(both.block_costs)) for key in both.read_block(block)]
    queries = [key for key in keys if key.role == "query"]
    assert {key.instruction for key in queries} == {INSTRUCTIONS[AOPS], PAPER_INSTRUCTIONS[AOPS]}
    assert both.num_texts == alone.num_texts + len(queries) // 2
    assert all(key.instruction == "" for key in keys if key.role == "document")


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
    # The same tasks for one more model: the plan stays, and so do the first model's vectors.
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


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))


SCALED_TASKS = (
    "Core17InstructionRetrieval",
    "LEMBPasskeyRetrieval",
    "BrightAopsRetrieval",
    "BrightTheoremQAQuestionsRetrieval",
    "BrightPonyLongRetrieval",
    "BrightRetrieval",
)


def test_a_plan_holds_every_text_of_mtebs_tasks_once_and_its_costs_add_up(config, tmp_path):
    from full_size_hub import write_hub

    config = dataclasses.replace(
        config,
        models=config.models[:1],
        tasks=SCALED_TASKS,
        snapshots=write_hub(tmp_path / "hub", scale=0.0003),
        instructions=dict.fromkeys(SCALED_TASKS, ""),
    )
    texts: Counter[tuple[str, str]] = Counter()
    for element in list_elements(config):
        with private_cache(tmp_path / "cache"):
            task = localise(get_task(element.task), config.snapshots)
            load_and_check(task)
            for _, _, data in evaluated_splits(task):
                texts.update(("document", text) for text in document_texts(data["corpus"]))
                texts.update(("query", text) for text in query_texts(data["queries"]))

    plan = write_plan(config)
    blocks = [plan.read_block(block) for block in range(len(plan.block_costs))]
    planned = [(key.role, key.text) for block in blocks for key in block]
    assert Counter(planned) == Counter(dict.fromkeys(texts, 1))
    assert (plan.num_texts, plan.num_occurrences) == (len(texts), texts.total())
    assert plan.num_occurrences > 1.5 * plan.num_texts

    def cost(text: str) -> float:
        tokens = min(len(text.encode()) / 3.5 + 1, config.max_length)
        return tokens * (1 + tokens / 35_000)

    assert plan.block_costs == pytest.approx([sum(cost(k.text) for k in b) for b in blocks])
    total = sum(count * cost(text) for (_, text), count in texts.items())
    assert plan.occurrence_cost == pytest.approx(total)
