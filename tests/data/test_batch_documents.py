"""Documents that a batch takes of its examples, and the negatives among them, query by query."""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_support import ConfigMaker, make_loader, texts_of, write_jsonl
from transformers import AutoTokenizer

from pipeline.config import (
    CandidatesConfig,
    DataConfig,
    DistillationConfig,
    LossConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
    build_config,
)
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.data.text_loader import data_warnings, require_negatives
from pipeline.data.text_loader import make_loader as make_any_loader
from pipeline.errors import UserError
from tests.mined_data import BANDS, NUM_CANDIDATES


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


def test_a_batch_with_few_documents_and_many_epochs_are_warned_of(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    rows = [{"query": f"q {k}", "positives": [f"p {k % 3}"]} for k in range(16)]
    opened = open_rows(make_config, tmp_path, rows)
    config = train_config(opened)
    loader = make_any_loader(opened, config, rank=0, world_size=1)
    assert data_warnings(loader, config) == [
        "a batch of 8 queries holds only 3 different documents of 3; a larger "
        "data.global_batch_size adds queries, but hardly a negative"
    ]
    for steps, epochs in ((20, []), (22, ["11 epochs of 16 examples"])):
        warnings = data_warnings(loader, dataclasses.replace(config, num_steps=steps))
        assert [text.partition(";")[0] for text in warnings[1:]] == epochs


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


def test_examples_without_the_scores_that_are_learned_are_refused_before_a_run(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    rows = [{"query": f"q {k}", "positives": [f"p {k}"], "negatives": [f"n {k}"]} for k in range(8)]
    scored = [{**row, "query": f"r {row['query']}", "s": [1.0, 0.5]} for row in rows]
    sources = [
        SourceConfig(
            name=name,
            format="columns",
            path=str(write_jsonl(tmp_path / f"{name}.jsonl", lines)),
            columns=columns,
        )
        for name, lines, columns in (("taught", scored, {"scores": "s"}), ("plain", rows, {}))
    ]
    opened = Dataset.open(prepare(make_config(*sources), num_workers=1))
    loader = make_loader(opened, batch=8)

    config = train_config(opened)
    learned = dataclasses.replace(config, loss=LossConfig(distillation=DistillationConfig()))
    with pytest.raises(UserError, match=r"8 of 8 examples of source \w+ have no teacher's scores"):
        data_warnings(loader, learned)
    data_warnings(loader, config)


PER_BAND = {"hard": 3, "easy": 2}
Drawn = dict[tuple[int, int], list[int]]


def drawn_candidates(opened: Dataset, *, steps: int, world_size: int = 1, **changes: Any) -> Drawn:
    """The negatives of each (example, times it was seen before), as positions in its candidates."""
    settings = {"num_hard_negatives": 7, "candidates": CandidatesConfig(), **changes}
    loaders = [
        make_loader(opened, batch=64, rank=rank, world_size=world_size, **settings)
        for rank in range(world_size)
    ]
    found: Drawn = {}
    epochs: dict[int, int] = {}
    for step in range(steps):
        batch = loaders[-1].batch(step)
        # Documents of a batch are numbered in the order of their ids.
        ids = loaders[-1]._draw(step).relevance.document_ids
        lists = opened.examples.views("candidates", batch.example_ids)
        for row, example in enumerate(batch.example_ids.tolist()):
            candidates = lists[row].tolist()
            taken = sorted(candidates.index(k) for k in ids[batch.negatives[row]].tolist())
            found[example, epochs.get(example, 0)] = taken
            epochs[example] = epochs.get(example, 0) + 1
    return found


def test_negatives_are_drawn_from_the_candidates_again_in_each_epoch(mined: Path) -> None:
    opened = Dataset.open(mined)
    found = drawn_candidates(opened, steps=60)
    examples = {example for example, epoch in found if epoch == 2}
    assert len(examples) > 300
    for example in examples:
        draws = [found[example, epoch] for epoch in range(3)]
        # Every fifth example has two candidates, which it gets each time.
        expected = 2 if example % 5 == 0 else 7
        assert all(len(set(draw)) == expected for draw in draws)
    full = [example for example in examples if example % 5]
    # Of 120 choices of 7 of 10, the same one twice in 1 of 120 cases.
    same = sum(found[example, 0] == found[example, 1] for example in full)
    assert same < len(full) / 30
    counts = np.bincount(np.concatenate([found[example, 1] for example in full]))
    assert counts == pytest.approx(np.full(NUM_CANDIDATES, 0.7 * len(full)), rel=0.15)


def test_the_draw_depends_on_seed_epoch_and_example_alone(mined: Path) -> None:
    opened = Dataset.open(mined)
    found = drawn_candidates(opened, steps=24)
    assert drawn_candidates(opened, steps=24, world_size=3) == found
    # Other batches: another size, mixture and order of the same examples.
    other = drawn_candidates(opened, steps=12, homogeneous="none")
    shared = [key for key in found if key in other]
    assert len(shared) > 200
    assert all(other[key] == found[key] for key in shared)
    reseeded = drawn_candidates(opened, steps=24, seed=4)
    assert any(reseeded.get(key, found[key]) != found[key] for key in found)


def test_each_band_gives_its_number_of_negatives(mined: Path) -> None:
    opened = Dataset.open(mined)
    settings = {"num_hard_negatives": 5, "candidates": CandidatesConfig(bands=PER_BAND)}
    found = drawn_candidates(opened, steps=12, **settings)
    for (example, _), taken in found.items():
        bands = opened.examples.ragged("candidate_bands", np.array([example])).values[taken]
        names = [BANDS[band] for band in bands.tolist()]
        if example % 5:
            assert sorted(names) == sorted(["hard"] * 3 + ["easy"] * 2)
        else:
            assert names == ["hard"]  # its two candidates are in the bands hard and middle


def test_teacher_scores_follow_the_candidates(mined: Path) -> None:
    opened = Dataset.open(mined)
    assert opened.manifest.has_scores
    loader = make_loader(opened, batch=32, num_hard_negatives=4, candidates=CandidatesConfig())
    batch, ids = loader.batch(0), loader._draw(0).relevance.document_ids
    assert batch.positive_scores is not None and batch.negative_scores is not None
    for row, example in enumerate(batch.example_ids):
        (listed,) = opened.examples.views("candidates", np.array([example]))
        (scores,) = opened.examples.views("candidate_scores", np.array([example]))
        places = [listed.tolist().index(k) for k in ids[batch.negatives[row]].tolist()]
        assert batch.negative_scores[row].tolist() == scores[places].tolist()
        assert len(batch.positive_scores[row]) == len(batch.positives[row])


@pytest.mark.parametrize("candidates", [{}, {"bands": {"hard": 1}}])
def test_candidates_that_the_data_lack_are_refused(
    candidates: dict[str, Any], dataset: Dataset
) -> None:
    with pytest.raises(UserError, match=r"stores no candidates .*diffembed mine"):
        make_loader(dataset, candidates=CandidatesConfig(**candidates))


def test_an_unknown_band_is_refused_with_the_known_ones(mined: Path) -> None:
    config = CandidatesConfig(bands={"hardest": 1})
    with pytest.raises(UserError, match=r"no band 'hardest'.*allowed: hard, middle, easy"):
        make_loader(Dataset.open(mined), candidates=config)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"num_hard_negatives": 0, "candidates": {}}, r"data\.num_hard_negatives"),
        (
            {"num_hard_negatives": 7, "candidates": {"bands": {"hard": 3}}},
            r"add up to data\.num_hard_negatives \(7\).*set data\.num_hard_negatives: 3",
        ),
    ],
)
def test_numbers_of_candidates_that_contradict_each_other_are_refused(
    data: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named):
        build_config(DataConfig, {"path": str(tmp_path), **data}, origin="data")
