"""The store: any element and process replaceable, scores as if nothing was divided."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from benchmark_replicas import documents_of
from evaluation_support import TASKS, BagOfLetters, MiniLM, load_letters, wrap

from pipeline.config import EvaluateConfig, dump_config
from pipeline.errors import UserError
from pipeline.evaluation.embed import embed_element, missing_blocks
from pipeline.evaluation.embedding_plan import (
    store_folder,
    write_plan,
)
from pipeline.evaluation.run import run_all, score_all
from pipeline.evaluation.tasks import list_elements
from tests import forks
from tests.support import PATIENCE

# Documents and total Mtokens of each task, from mteb's descriptive statistics.
AOPS = "BrightAopsRetrieval"


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
    # As left by a process that was killed while it wrote.
    (store / plan.blocks[0][0] / ".block-00001.npy.17.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match=f"{len(lost)} of {num_blocks} blocks are not embedded"):
        score_all(strong)
    assert missing_blocks(strong, strong.models[0], plan) == sorted(lost)
    # Again, with another number of elements.
    assert sum(embed_element(strong, index, 2, load=load) for index in range(2)) == len(lost)
    assert {block: plan.vectors_path(store, block).read_bytes() for block in whole} == whole


def test_ranks_of_one_element_share_its_blocks(strong, load, small_blocks):
    strong = dataclasses.replace(strong, tasks=(AOPS,))
    plan = write_plan(strong)
    written = [
        embed_element(strong, index, 2, load=load, rank=rank, world_size=2)
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


HERE = Path(__file__).parent


SCRIPT = f"""\
import sys
from pathlib import Path
sys.path.append({str(HERE)!r})
import evaluation_support
from pipeline.config import EvaluateConfig, load_config
from pipeline.evaluation.embed import embed_element

if __name__ == "__main__":
    config = load_config(EvaluateConfig, Path(sys.argv[1]))
    embed_element(config, 0, 1, load=evaluation_support.load_endless, num_processes=2)
"""


@pytest.fixture
def planned(config, small_blocks) -> EvaluateConfig:
    """One model and one task in many small blocks."""
    config = dataclasses.replace(config, models=config.models[:1], tasks=("BrightAopsRetrieval",))
    write_plan(config)
    return config


def blocks_of(config: EvaluateConfig) -> dict[Path, bytes]:
    store = store_folder(config, config.models[0])
    return {path.relative_to(store): path.read_bytes() for path in store.glob("*/*.npy")}


def test_processes_of_one_element_write_what_one_process_writes(planned, capsys):
    count = embed_element(planned, 0, 1, load=load_letters)
    alone = blocks_of(planned)
    for path in store_folder(planned, planned.models[0]).glob("*/*.npy"):
        path.unlink()
    capsys.readouterr()
    assert embed_element(planned, 0, 1, load=load_letters, num_processes=2) == count > 2
    assert len(alone) == count
    assert blocks_of(planned) == alone
    assert f"block {count}/{count}" in capsys.readouterr().out
    assert embed_element(planned, 0, 1, load=load_letters, num_processes=2) == 0


def test_a_store_begun_at_one_precision_refuses_vectors_of_another(planned):
    def load_half(config, element):
        return dataclasses.replace(load_letters(config, element), precision="bfloat16")

    embed_element(planned, 0, 2, load=load_letters)
    earlier = blocks_of(planned)
    with pytest.raises(UserError, match=r"float32, stored as float16.*computes in bfloat16"):
        embed_element(planned, 1, 2, load=load_half)
    assert blocks_of(planned) == earlier


def test_processes_end_with_the_one_that_started_them(planned, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    (tmp_path / "config.yaml").write_text(dump_config(planned))
    with (tmp_path / "log").open("w") as log:
        parent = forks.Process([tmp_path / "run.py", "config.yaml"], folder=tmp_path, stdout=log)
    try:
        found = wait_for(lambda: list(planned.output_dir.glob("*.process")), 2)
        children = [int(path.stem) for path in found]
        assert all(running(child) for child in children)
    finally:
        os.kill(parent.pid, signal.SIGKILL)  # without the processes of its group
        parent.wait()
    wait_for(lambda: [child for child in children if not running(child)], 2)


def wait_for(found, count: int) -> list:
    """Poll until that many are found."""
    deadline = time.monotonic() + PATIENCE
    while len(everything := found()) < count:
        assert time.monotonic() < deadline, everything
        time.sleep(0.1)
    return everything


def running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
