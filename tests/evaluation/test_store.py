"""The sharded store: each text once, any element replaceable, scores as if nothing was sharded."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from benchmark_replicas import documents_of
from evaluation_support import TASKS, BagOfLetters, MiniLM, wrap

from pipeline.config import Template
from pipeline.data.batch import assign_by_cost
from pipeline.errors import UserError
from pipeline.evaluation.datasets import (
    document_texts,
    evaluated_splits,
    get_task,
    load_and_check,
    load_texts,
    localise,
    private_cache,
    query_texts,
)
from pipeline.evaluation.embed import embed_element, missing_blocks
from pipeline.evaluation.embedding_plan import (
    divide,
    find_digests,
    read_plan,
    sort_by_digest,
    store_folder,
    write_plan,
)
from pipeline.evaluation.run import run_all, score_all
from pipeline.evaluation.tasks import BENCHMARKS, list_elements
from pipeline.evaluation.texts import byte_sizes, digests, effective_lengths, require_short
from pipeline.launch import World

# Documents and total Mtokens of each task, from mteb's descriptive statistics.
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


def test_scores_from_the_store_equal_direct_scores_on_every_task(strong, load, small_blocks):
    direct = run_all(strong, load=load)
    for element in list_elements(strong):
        element.result_path.unlink()
    write_plan(strong)
    for index in range(3):
        embed_element(strong, index, 3, load=load)
    stored = score_all(strong)
    assert [r["task"] for r in stored] == list(strong.tasks)
    assert [r["score"] for r in stored] == pytest.approx([r["score"] for r in direct], abs=1e-6)
    assert all(r["precision"] == "float32, stored as float16" for r in stored)


def test_each_distinct_text_is_embedded_exactly_once(strong, small_blocks):
    # Two subsets with the same documents.
    strong = dataclasses.replace(strong, tasks=(*strong.tasks, "BrightTheoremQAQuestionsRetrieval"))
    plan = write_plan(strong)
    encoder = MiniLM()
    model = wrap(encoder)
    encoder.seen.clear()
    for index in range(4):
        embed_element(strong, index, 4, load=lambda *_: model)
    counts = Counter(encoder.seen)
    assert set(counts.values()) == {1}
    assert len(counts) == plan.num_texts
    assert plan.num_texts < plan.num_occurrences


def test_killed_elements_redo_only_their_missing_blocks_and_scores_are_bit_identical(
    strong, load, small_blocks, tmp_path
):
    strong = dataclasses.replace(strong, tasks=(AOPS, TASKS[0]))
    plan = write_plan(strong)
    num_blocks = len(plan.block_costs)
    for index in range(5):
        embed_element(strong, index, 5, load=load)
    store = store_folder(strong, strong.models[0])
    whole = {block: plan.vectors_path(store, block).read_bytes() for block in range(num_blocks)}

    generator = random.Random(0)
    lost = generator.sample(range(num_blocks), round(0.3 * num_blocks))
    for block in lost:
        plan.vectors_path(store, block).unlink()
    # What a process leaves that was killed while it wrote.
    (store / plan.blocks[0][0] / ".block-00001.npy.17.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match=f"{len(lost)} of {num_blocks} blocks are not embedded"):
        score_all(strong)
    assert missing_blocks(strong, strong.models[0], plan) == sorted(lost)
    # Again, with another number of elements.
    assert sum(embed_element(strong, index, 2, load=load) for index in range(2)) == len(lost)
    assert {block: plan.vectors_path(store, block).read_bytes() for block in whole} == whole


def test_loading_side_by_side_writes_the_same_plan(strong, small_blocks):
    alone = write_plan(strong)
    files = [path for path in alone.folder.parent.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == [
        *("index.npz", "index.npz", "plan.json", "texts.arrow")
    ]
    written = [path.read_bytes() for path in files]
    assert write_plan(strong, num_workers=2) == alone
    assert [path.read_bytes() for path in files] == written


def test_ranks_of_one_element_share_its_blocks(strong, load, small_blocks):
    strong = dataclasses.replace(strong, tasks=(AOPS,))
    plan = write_plan(strong)
    written = [
        embed_element(
            strong, index, 2, load=load, world=World(rank=rank, world_size=2, local_rank=rank)
        )
        for index in range(2)
        for rank in range(2)
    ]
    assert sum(written) == len(plan.block_costs)
    assert min(written) > 0


def test_a_long_run_of_lengths_shares_the_vectors_of_texts_that_fit(strong, load, small_blocks):
    one = dataclasses.replace(strong, tasks=("LEMBQMSumRetrieval",))
    three = dataclasses.replace(one, lengths={"LongEmbed": (16, 256, 4096)}, max_tokens=4096)
    single = write_plan(dataclasses.replace(one, max_length=4096)).num_texts
    plan = write_plan(three)
    assert plan.lengths == (16, 256, 4096)
    assert single < plan.num_texts < 3 * single
    for index in range(2):
        embed_element(three, index, 2, load=cutting)
    stored = score_all(three)
    assert [result["max_length"] for result in stored] == [16, 256, 4096]
    for element in list_elements(three):
        element.result_path.unlink()
    direct = run_all(three, load=cutting)
    assert [r["by_split"] for r in stored] == [pytest.approx(r["by_split"]) for r in direct]


def cutting(config, element):
    """A model that cuts texts at the element's length, in bytes."""

    class Cut(BagOfLetters):
        def encode_texts(self, texts, prefix="", suffix=""):
            return super().encode_texts([(prefix + text)[: element.max_length] for text in texts])

    return dataclasses.replace(wrap(Cut()), max_length=element.max_length)


def test_a_text_shares_the_shortest_length_at_which_it_surely_is_not_cut():
    def found(size: int, wanted: int) -> int:
        return int(effective_lengths("", np.array([size]), wanted, (512, 4096, 32768))[0])

    assert found(300, 32768) == 512
    assert found(600, 32768) == 4096
    assert found(600, 512) == 512
    assert found(9000, 4096) == 4096
    assert found(90_000, 32768) == 32768
    # Three bytes each: bytes bound tokens, characters do not.
    assert byte_sizes(pa.array(["x", "語" * 300], type=pa.large_string())).tolist() == [1, 900]


def test_a_template_that_may_push_a_text_over_its_length_is_refused():
    require_short(Template(), model="m")
    chat = Template(query="<system>" + "x" * 200 + "</system>{instruction}; {text}")
    with pytest.raises(UserError, match=r"m: the template of a query adds 2\d\d bytes"):
        require_short(chat, model="m")


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


def test_a_digest_tells_role_instruction_length_and_text_apart():
    def digest(role: str, instruction: str, text: str, length: int) -> tuple[int, int]:
        texts = pa.array(["other", text], type=pa.large_string()).slice(1)
        first, second = digests(role, instruction, texts, np.array([length], np.int32))[0]
        return int(first), int(second)

    keys = [(r, i, t, n) for r in ("query", "document") for i in ("", "ask") for t in ("a", "")
            for n in (512, 4096)]  # fmt: skip
    assert len({digest(*key) for key in keys}) == len(keys)
    wanted = hashlib.sha256(b"query\0ask\x004096\0text").digest()[:16]
    assert np.array(digest("query", "ask", "text", 4096), np.uint64).tobytes() == wanted


@pytest.mark.parametrize("task", [*BENCHMARKS["BRIGHT"], *BENCHMARKS["BRIGHT-long"]])
def test_bright_is_listed_by_column_as_mteb_loads_it(task, snapshots, tmp_path):
    with private_cache(tmp_path):
        loaded = localise(get_task(task), snapshots)
        load_and_check(loaded)
    ((_, _, data),) = evaluated_splits(loaded)
    documents, queries = load_texts(task, snapshots=snapshots)
    assert documents == document_texts(data["corpus"])
    assert queries == query_texts(data["queries"])


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


def test_a_text_that_the_plan_does_not_know_is_refused(strong, load, small_blocks):
    strong = dataclasses.replace(strong, tasks=(AOPS,))
    write_plan(strong)
    embed_element(strong, 0, 1, load=load)
    from pipeline.evaluation.embed import load_stored

    stored = load_stored(strong, list_elements(strong)[0])
    _, _, known = documents_of("aops")[0]
    assert stored.embedder.embed("document", "", [known]).shape == (1, 384)
    with pytest.raises(UserError, match="1 of 2 document texts are not in the plan"):
        stored.embedder.embed("document", "", [known, "unknown"])
