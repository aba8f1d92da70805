"""Each way in which mteb scores can be wrong without a message, shown not to happen here."""

from __future__ import annotations

import json
from collections.abc import Callable

import benchmark_replicas as replicas
import mteb
import numpy as np
import pytest
from evaluation_support import MiniLM, MtebEncoder, wrap
from mteb.models import EncoderProtocol, SearchProtocol

from pipeline.config import Template
from pipeline.errors import UserError
from pipeline.evaluation.datasets import get_task, load_and_check, localise, private_cache
from pipeline.evaluation.scoring import ExactSearch, score_task
from pipeline.evaluation.tasks import (
    BENCHMARKS,
    DEFAULT_INSTRUCTION,
    INSTRUCTIONS,
    benchmark_of,
    expand,
)

FOLLOW_IR = "Core17InstructionRetrieval"


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


def test_doubtful_rows_of_a_snapshot_are_counted(tmp_path, capsys):
    replicas.write_follow_ir(tmp_path / "hub")
    folder = tmp_path / "hub/mteb" / FOLLOW_IR

    def add(part: str, change: Callable[[list[dict]], list[dict]]) -> None:
        (path,) = (folder / part).glob("*.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *change(rows)]))

    add("corpus", lambda rows: [rows[0], {**rows[1], "text": "other"}])
    add("queries", lambda rows: [rows[0], {**rows[1], "text": "other"}])
    add("default", lambda rows: [{**rows[0], "corpus-id": "nowhere"}])
    with private_cache(tmp_path):
        load_and_check(localise(get_task(FOLLOW_IR), tmp_path / "hub"))
    assert capsys.readouterr().out.splitlines() == [
        f"{FOLLOW_IR} default/test: {what}: 1"
        for what in (
            "judged documents that the corpus lacks, never found",
            "documents with an earlier document's id and another text, of which one counts",
            "queries with an earlier query's id and another text, of which one counts",
        )
    ]


def test_localising_a_task_leaves_mtebs_own_metadata_alone(snapshots):
    localised = localise(get_task(FOLLOW_IR), snapshots)
    assert localised.metadata.dataset["path"].startswith(str(snapshots))
    fresh = mteb.get_task(FOLLOW_IR)
    assert fresh.metadata.dataset["path"] == f"mteb/{FOLLOW_IR}"
    assert localised.metadata.dataset["revision"] == fresh.metadata.dataset["revision"]


def test_a_missing_snapshot_and_an_unknown_task_are_the_users_errors(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        localise(get_task(FOLLOW_IR), tmp_path)
    with pytest.raises(UserError, match="no such task"):
        get_task("Core18InstructionRetrieval")
    with pytest.raises(UserError, match=r"for a folder, write \{name: NAME, path: "):
        get_task(str(tmp_path))
    with pytest.raises(UserError, match="allowed: retrieval"):
        get_task("STS12")


def test_our_search_satisfies_mtebs_protocol_and_inherits_nothing(minilm):
    assert isinstance(ExactSearch(wrap(minilm), ""), SearchProtocol)
    assert isinstance(MtebEncoder(wrap(minilm), ""), EncoderProtocol)  # the tests' reference
    assert ExactSearch.__mro__ == (ExactSearch, object)


def test_our_benchmarks_are_mtebs():
    def names(benchmark: str) -> set[str]:
        return {task.metadata.name for task in mteb.get_benchmark(benchmark).tasks}

    assert set(BENCHMARKS["FollowIR"]) == names("FollowIR")
    assert set(BENCHMARKS["LongEmbed"]) == names("LongEmbed")
    assert {*BENCHMARKS["BRIGHT"], *BENCHMARKS["BRIGHT-long"]} == names("BRIGHT(v1.1)")
    assert set(INSTRUCTIONS) == names("BRIGHT(v1.1)")
    assert set(BENCHMARKS["BRIGHT-v1"]) == names("BRIGHT")
    assert set(BENCHMARKS["BRIGHT-v1-long"]) == names("BRIGHT (long)")


def test_a_benchmark_expands_to_its_tasks_once():
    assert expand(("Core17InstructionRetrieval", "FollowIR", "NFCorpus")) == (
        "Core17InstructionRetrieval",
        "Robust04InstructionRetrieval",
        "News21InstructionRetrieval",
        "NFCorpus",
    )
    assert benchmark_of("BrightPonyLongRetrieval") == "BRIGHT-long"
    assert benchmark_of("NFCorpus") == "other"


def test_an_empty_instruction_leaves_the_bare_query(minilm):
    embedder = wrap(minilm).embedder
    minilm.seen.clear()
    embedder.embed("query", "", ["how to loop"])
    embedder.embed("query", "Find it", ["how to loop"])
    assert minilm.seen == ["how to loop", Template().format_query("how to loop", "Find it")]
