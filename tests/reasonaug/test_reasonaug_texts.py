"""Texts to pre-train on and replicas of longer documents: nothing leaks, and lengths are kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ReasonAug.problem import num_tokens
from ReasonAug.replicas import write_replicas
from ReasonAug.templates import write_templates
from ReasonAug.texts import write_texts


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small")
    write_templates(out, seed=0, problems_per_concept=16, max_tokens=400)
    write_texts(out, seed=0, num_long=40, max_tokens=1024)
    return out


def test_no_text_holds_anything_of_an_evaluation_split(data: Path) -> None:
    texts = (data / "texts.jsonl").read_text() + (data / "hidden.jsonl").read_text()
    problems = read(data / "problems.jsonl")
    unseen = [p["statement"] for p in problems if p["split"] != "train"]
    assert len(unseen) > 100
    assert not [s for s in unseen if json.dumps(s, ensure_ascii=False)[1:-1] in texts]
    for concept in json.loads((data / "summary.json").read_text())["held_out_concepts"]:
        assert f"drawer on {concept} is" not in texts
        assert f"**Concept**\\n{concept}\\n" not in texts


def test_every_training_problem_is_among_the_texts(data: Path) -> None:
    texts = {row["text"] for row in read(data / "texts.jsonl")}
    for row in read(data / "problems.jsonl"):
        document = f"**Problem**\n{row['statement']}\n\n**Solution**\n{row['solution']}"
        assert (document in texts) == (row["split"] == "train")


def test_a_row_asks_for_the_passkey_that_its_document_hides_and_its_negative_does_not(
    data: Path,
) -> None:
    for row in read(data / "hidden.jsonl"):
        assert f"drawer on {row['instance']} is" in row["positive_document"]
        assert f"drawer on {row['instance']} is" not in row["hard_negative_document"]
        assert row["user_query"].endswith(f"drawer on {row['instance']}?")


def test_the_same_seed_gives_the_same_texts(data: Path, tmp_path: Path) -> None:
    shutil.copy(data / "problems.jsonl", tmp_path)
    for seed in (0, 1):
        write_texts(tmp_path, seed=seed, num_long=40, max_tokens=1024)
        for name in ("texts.jsonl", "hidden.jsonl"):
            same = (tmp_path / name).read_bytes() == (data / name).read_bytes()
            assert same == (seed == 0)


def test_divided_lengths_double_from_split_to_split_and_hide_once(
    data: Path, tmp_path: Path
) -> None:
    write_replicas(data, tmp_path, seed=0, max_tokens=2048, divide_lengths=16, long_queries=40)
    folder = tmp_path / "mteb" / "LEMBPasskeyRetrieval"
    for nominal in (4096, 8192, 16384, 32768):
        documents = read(folder / "corpus" / f"test_{nominal}.jsonl")
        assert len(documents) == len(read(folder / "queries" / f"test_{nominal}.jsonl")) == 40
        for row in documents:
            assert 0.8 * nominal / 16 < num_tokens(row["text"]) <= nominal / 16
            assert row["text"].count("The passkey of the drawer on") == 1
    needle = tmp_path / "dwzhu" / "LongEmbed" / "needle"
    documents = {row["doc_id"]: row for row in read(needle / "corpus.jsonl")}
    queries = {row["qid"]: row for row in read(needle / "queries.jsonl")}
    judged = read(needle / "qrels.jsonl")
    assert len(judged) == len(queries) == 8 * 4 * 10
    for row in judged:
        assert documents[row["doc_id"]]["context_length"] == queries[row["qid"]]["context_length"]
        assert queries[row["qid"]]["text"] not in documents[row["doc_id"]]["text"]
