"""Documents that a batch takes of its examples, and the negatives among them, query by query."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_support import ConfigMaker, make_loader, texts_of, write_jsonl
from transformers import AutoTokenizer

from pipeline.config import DataConfig, LossConfig, ModelConfig, SourceConfig, TrainConfig
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.data.text_loader import make_loader as make_any_loader
from pipeline.data.text_loader import require_negatives
from pipeline.errors import UserError


def open_rows(make_config: ConfigMaker, folder: Path, rows: list[Any], **source: Any) -> Dataset:
    """The shards of one source of these rows."""
    path = write_jsonl(folder / "rows.jsonl", rows)
    settings = {"name": "rows", "format": "columns", "path": str(path), **source}
    return Dataset.open(prepare(make_config(SourceConfig(**settings)), num_workers=1))


def test_another_step_or_seed_takes_other_documents_of_an_example(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    rows = [
        {
            "query": f"query {k}",
            "positives": [f"good {k} {j}" for j in range(4)],
            "negatives": [f"bad {k} {j}" for j in range(4)],
        }
        for k in range(8)
    ]
    opened = open_rows(make_config, tmp_path, rows)

    def taken(seed: int, step: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The positive and the negative of every example, as tokens."""
        batch = make_loader(opened, batch=8, seed=seed).batch(step)
        documents, first = texts_of([batch]), batch.num_queries
        return [
            (documents[first + batch.positives[k][0]], documents[first + batch.negatives[k][0]])
            for k in np.argsort(batch.example_ids)
        ]

    by_step = [taken(3, step) for step in range(12)]
    # Of four positives and four negatives more than four pairs: neither goes by the other.
    assert all(len(set(pairs)) > 4 for pairs in zip(*by_step, strict=True))
    assert taken(4, 0) != by_step[0]


def test_negatives_that_come_first_are_taken_before_the_others(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    def passages(kind: str, count: int, number: int) -> list[dict[str, str]]:
        return [{"docid": "", "title": kind, "text": f"{number} {k}"} for k in range(count)]

    rows = [
        {
            "query": f"query {number}",
            "positive_passages": passages("good", 1, number),
            "negative_passages": passages("bad", 9, number),
            "new_negatives": passages("new", 2, number),
        }
        for number in range(4)
    ]
    opened = open_rows(make_config, tmp_path, rows, format="msmarco_instructions")
    tokenizer = AutoTokenizer.from_pretrained(opened.tokenizer.path)
    batch = make_loader(opened, batch=4, num_hard_negatives=3).batch(0)
    texts = {k: tokenizer.decode(ids) for k, ids in texts_of([batch]).items()}
    for negatives in batch.negatives:
        kinds = [texts[batch.num_queries + document].split()[0] for document in negatives]
        assert sorted(kinds) == ["bad", "new", "new"]


def test_teacher_scores_stay_beside_the_chosen_documents(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    rows = [
        {
            "query": f"query {k}",
            "positives": [f"good {k} {j}" for j in range(3)],
            "negatives": [f"bad {k} {j}" for j in range(4)],
            "s": [10 * k + j for j in range(7)],
        }
        for k in range(8)
    ]
    opened = open_rows(make_config, tmp_path, rows, columns={"scores": "s"})
    batch = make_loader(opened, batch=8, num_positives=2, num_hard_negatives=3).batch(0)
    tokenizer = AutoTokenizer.from_pretrained(opened.tokenizer.path)
    texts = {k: tokenizer.decode(ids) for k, ids in texts_of([batch]).items()}
    assert batch.positive_scores is not None and batch.negative_scores is not None
    for lists, scores, first, each in (
        (batch.positives, batch.positive_scores, 0, 2),
        (batch.negatives, batch.negative_scores, 3, 3),
    ):
        assert lists.lengths.tolist() == scores.lengths.tolist() == [each] * 8
        for document, score in zip(lists.values.tolist(), scores.values.tolist(), strict=True):
            _, k, j = texts[batch.num_queries + document].split()
            assert score == 10 * int(k) + first + int(j)


def test_answers_to_the_same_question_are_masked(make_config: ConfigMaker, tmp_path: Path) -> None:
    rows = [{"query": "a", "positives": ["x"]}, {"query": "a", "positives": ["y"]}]
    rows += [{"query": "b", "positives": ["z"]}]
    batch = make_loader(open_rows(make_config, tmp_path, rows), batch=3).batch(0)
    place = {example: row for row, example in enumerate(batch.example_ids.tolist())}
    for own, other in ((0, 1), (1, 0)):
        assert batch.masked[place[own]].tolist() == batch.positives[place[other]].tolist()
    assert len(batch.masked[place[2]]) == 0


def test_positives_not_chosen_are_masked_when_another_query_brings_them(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    rows = [
        {"query": "a", "positives": ["x", "y"]},
        {"query": "b", "positives": ["z"], "negatives": ["x", "y"]},
    ]
    opened = open_rows(make_config, tmp_path, rows)
    batch = make_loader(opened, batch=2, num_hard_negatives=2).batch(0)
    first = batch.example_ids.tolist().index(0)
    assert len(batch.positives[first]) == len(batch.masked[first]) == 1
    assert len(batch.masked[1 - first]) == 0


def test_positives_of_the_same_concept_are_masked(dataset: Dataset) -> None:
    batch = make_loader(dataset).batch(1)
    concept = dataset.examples.scalars("concept", batch.example_ids)
    for query in range(batch.num_queries):
        positives = set(batch.positives[query].tolist())
        same = np.flatnonzero(concept == concept[query])
        expected = set(np.concatenate([batch.positives[k] for k in same]).tolist())
        expected -= positives | set(batch.negatives[query].tolist())
        assert set(batch.masked[query].tolist()) == expected
    assert len(batch.masked.values) > 0


def train_config(dataset: Dataset, **changes: Any) -> TrainConfig:
    return TrainConfig(
        output_dir=Path("run"),
        num_steps=2,
        model=ModelConfig(path="model"),
        data=DataConfig(path=dataset.folder, global_batch_size=8, homogeneous="none"),
        **changes,
    )


def check(dataset: Dataset, **changes: Any) -> str:
    """Return the warning about a run's negatives that precedes it."""
    config = train_config(dataset, **changes)
    return require_negatives(make_any_loader(dataset, config, rank=0, world_size=1), config)


@pytest.mark.parametrize(
    ("row", "queries", "documents"),
    [
        (lambda k: {"query": "what is it", "positives": [f"text {k}"]}, 1, 8),
        (lambda k: {"query": f"what is {k}", "positives": ["the one text"]}, 8, 1),
        (lambda k: {"query": f"what is {k}", "positives": [f"text {k}"], "concept": "c"}, 8, 8),
    ],
)
def test_batches_without_a_single_negative_are_refused_with_their_counts(
    make_config: ConfigMaker, tmp_path: Path, row: Any, queries: int, documents: int
) -> None:
    columns = {"columns": {"concept": "concept"}} if "concept" in row(0) else {}
    opened = open_rows(make_config, tmp_path, [row(k) for k in range(16)], **columns)
    counts = f"different queries in the first batch: {queries}, different documents: {documents}"
    with pytest.raises(UserError, match=f"16 of 16 queries in the first 2 batches.*{counts}"):
        check(opened)


def test_queries_without_a_negative_among_others_are_counted(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    rows = [{"query": f"q {k}", "positives": [f"p {k}"]} for k in range(8)]
    rows += [
        {"query": f"q {k}", "positives": [f"p {k}"], "negatives": [f"n {k}"]} for k in range(8, 16)
    ]
    opened = open_rows(make_config, tmp_path, rows)
    assert check(opened) == ""
    own = LossConfig(negatives="own")
    assert "8 of 16 queries in the first 2 batches have no negative" in check(opened, loss=own)


def test_a_teacher_score_that_is_no_number_is_named_by_the_loader(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    rows = [
        {
            "query": f"q {k}",
            "positives": [f"p {k}"],
            "negatives": [f"n {k}"],
            "s": [1.0, 4096.5 + k],
        }
        for k in range(8)
    ]
    opened = open_rows(make_config, tmp_path, rows, columns={"scores": "s"})
    (shard,) = opened.folder.glob("*examples*.arrow")
    damaged = shard.read_bytes().replace(struct.pack("<f", 4099.5), struct.pack("<f", math.nan))
    assert damaged != shard.read_bytes()
    shard.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a teacher score of example \d+ is nan"):
        make_loader(Dataset.open(opened.folder), batch=8).batch(0)
