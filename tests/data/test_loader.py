"""Global batches: what a rank gets, compared with the source rows themselves."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from data_support import ConfigMaker, reasonaug_rows, write_jsonl
from transformers import AutoTokenizer

from pipeline.config import DataConfig, SourceConfig, Template
from pipeline.data.balance import text_cost
from pipeline.data.batch import GlobalBatch
from pipeline.data.loader import Loader
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.errors import UserError


def make_loader(dataset: Dataset, *, batch: int = 32, **changes: object) -> Loader:
    data = {key: changes.pop(key) for key in list(changes) if hasattr(DataConfig, key)}
    config = DataConfig(path=dataset.folder, global_batch_size=batch, **data)  # type: ignore[arg-type]
    settings = {"max_chunk_tokens": 400, "seed": 3, **changes}
    return Loader(dataset, config, **settings)  # type: ignore[arg-type]


def all_ranks(dataset: Dataset, step: int, world_size: int, **changes: object) -> list[GlobalBatch]:
    return [
        make_loader(dataset, rank=rank, world_size=world_size, **changes).batch(step)
        for rank in range(world_size)
    ]


def texts_of(batches: list[GlobalBatch]) -> dict[int, tuple[int, ...]]:
    """Tokens of every text of the batch, by global text index."""
    found: dict[int, tuple[int, ...]] = {}
    for chunk in (chunk for batch in batches for chunk in batch.chunks):
        if not chunk.is_dummy:
            pieces = np.split(chunk.input_ids, np.cumsum(chunk.lengths)[:-1])
            for text, piece in zip(chunk.texts.tolist(), pieces, strict=True):
                assert text not in found
                found[text] = tuple(piece.tolist())
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_text_is_on_exactly_one_rank(dataset: Dataset, world_size: int) -> None:
    batches = all_ranks(dataset, 4, world_size)
    first = batches[0]
    assert len({len(batch.chunks) for batch in batches}) == 1
    found = texts_of(batches)
    assert sorted(found) == list(range(first.num_queries + first.num_documents))
    assert sum(map(len, found.values())) == first.tokens
    assert found == texts_of(all_ranks(dataset, 4, 1))


def test_batches_hold_the_texts_of_the_source_rows(dataset: Dataset, tokenizer_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    rows = {row["user_query"]: row for row in reasonaug_rows(600)}
    batch = make_loader(dataset).batch(0)
    texts = {k: tokenizer.decode(ids) for k, ids in texts_of([batch]).items()}
    for query in range(batch.num_queries):
        prefix, _, text = texts[query].partition("\nQuery: ")
        row = next(row for start, row in rows.items() if start.startswith(text))
        assert prefix == f"Instruct: {row['task']}"
        (positive,) = batch.positives[query].tolist()
        assert row["positive_document"].startswith(texts[batch.num_queries + positive])
        negatives = [texts[batch.num_queries + k] for k in batch.negatives[query].tolist()]
        expected = [row["hard_negative_document"]] if row["hard_negative_document"] else []
        assert len(negatives) == len(expected)
        assert all(b.startswith(a) for a, b in zip(negatives, expected, strict=True))


def test_a_chunk_counts_the_tokens_of_its_instructions(
    dataset: Dataset, tokenizer_path: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    tasks = {row["task"] for row in reasonaug_rows(600)}
    batch = make_loader(dataset).batch(0)
    num_queries = 0
    for chunk in batch.chunks:
        rows = np.split(chunk.input_ids, np.cumsum(chunk.lengths)[:-1])
        counts = chunk.instruction_tokens
        for place, (text, row) in enumerate(zip(chunk.texts.tolist(), rows, strict=True)):
            count = 0 if counts is None else int(counts[place])
            is_query = text < batch.num_queries
            num_queries += is_query
            skipped = tokenizer.decode(row[:count])
            assert (skipped in {f"Instruct: {task}\nQuery:" for task in tasks}) == is_query
            assert is_query or count == 0
    assert num_queries == batch.num_queries


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


def test_a_document_shared_by_two_queries_is_embedded_once(dataset: Dataset) -> None:
    batch = make_loader(dataset, batch=64).batch(0)
    assert batch.num_documents < len(batch.positives.values) + len(batch.negatives.values)
    documents = [tokens for k, tokens in texts_of([batch]).items() if k >= batch.num_queries]
    assert len(set(documents)) == len(documents)


def test_iteration_with_and_without_prefetch_gives_the_batches_in_order(dataset: Dataset) -> None:
    plain = [make_loader(dataset).batch(step) for step in range(4)]
    for prefetch in (True, False):
        loader = make_loader(dataset, prefetch=prefetch)
        for expected, batch in zip(plain, itertools.islice(loader, 4), strict=True):
            assert batch.step == expected.step
            assert np.array_equal(batch.example_ids, expected.example_ids)


@pytest.mark.parametrize("prefetch", [True, False])
def test_resuming_continues_after_the_last_batch_handed_out(
    dataset: Dataset, prefetch: bool
) -> None:
    first = make_loader(dataset, prefetch=prefetch)
    for batch in itertools.islice(first, 3):
        state = first.state_dict()
        assert state["step"] == batch.step + 1
    second = make_loader(dataset, prefetch=prefetch)
    second.load_state_dict(state)
    assert next(iter(second)).step == 3
    assert all(isinstance(value, int) for value in state.values())


def test_a_state_of_another_seed_is_refused(dataset: Dataset) -> None:
    state = make_loader(dataset, seed=1).state_dict()
    with pytest.raises(UserError, match="seed 1"):
        make_loader(dataset, seed=2).load_state_dict(state)


@pytest.mark.parametrize(
    ("data", "share"),
    [
        ({}, 80 / 100),
        ({"mixture_cap": 20}, 20 / 40),
        ({"mixture_temperature": 2.0}, 80**0.5 / (80**0.5 + 20**0.5)),
        ({"weights": {"small": 2.0}}, 80 / 120),
    ],
)
def test_a_mixture_draws_from_its_sources_as_the_config_says(
    data: dict[str, object], share: float, make_config: ConfigMaker, tmp_path: Path
) -> None:
    sources = []
    for name, count in (("large", 80), ("small", 20)):
        rows = [{"query": f"{name} {k}", "positives": [f"{k} {name}"]} for k in range(count)]
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        sources.append(SourceConfig(name=name, format="columns", path=str(path)))
    dataset = Dataset.open(prepare(make_config(*sources), num_workers=1))
    loader = make_loader(dataset, batch=10, homogeneous="none", **data)
    ids = np.concatenate([loader.batch(step).example_ids for step in range(60)])
    large = next(group for group in dataset.manifest.groups if group.source == "large")
    drawn = (ids >= large.start) & (ids < large.start + large.count)
    assert drawn.mean() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("world_size", [1, 3])
def test_texts_beyond_the_budget_get_chunks_of_their_own(dataset: Dataset, world_size: int) -> None:
    batches = all_ranks(dataset, 4, world_size, max_chunk_tokens=60)
    assert len({len(batch.chunks) for batch in batches}) == 1
    chunks = [chunk for batch in batches for chunk in batch.chunks]
    assert any(len(chunk.input_ids) > 60 for chunk in chunks)
    assert any(len(chunk.lengths) > 1 for chunk in chunks)
    assert all(len(chunk.lengths) == 1 for chunk in chunks if len(chunk.input_ids) > 60)
    assert texts_of(batches) == texts_of(all_ranks(dataset, 4, 1))


def test_a_cost_budget_bounds_every_chunk_of_several_texts(dataset: Dataset) -> None:
    batch = make_loader(
        dataset, max_chunk_tokens=400, max_chunk_cost=300.0, attention_length=50.0
    ).batch(4)
    several = [chunk.lengths for chunk in batch.chunks if len(chunk.lengths) > 1]
    assert several and all(text_cost(own, 50.0).sum() <= 300.001 for own in several)
    assert texts_of([batch]) == texts_of(all_ranks(dataset, 4, 1))


def test_a_smaller_budget_holds_from_the_next_batch_on(dataset: Dataset) -> None:
    loader = make_loader(dataset)
    before = loader.batch(4)
    loader.max_chunk_tokens = before.tokens // 20
    after = loader.batch(4)
    assert len(make_loader(dataset, min_chunks=50).batch(4).chunks) == 50
    assert len(after.chunks) > len(before.chunks)
    assert texts_of([after]) == texts_of([before])


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
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = SourceConfig(name="scored", format="columns", path=str(path), columns={"scores": "s"})
    opened = Dataset.open(prepare(make_config(source), num_workers=1))
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
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = SourceConfig(name="several", format="columns", path=str(path))
    opened = Dataset.open(prepare(make_config(source), num_workers=1))

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
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = SourceConfig(name="rows", format="msmarco_instructions", path=str(path))
    opened = Dataset.open(prepare(make_config(source), num_workers=1))
    tokenizer = AutoTokenizer.from_pretrained(opened.tokenizer.path)
    batch = make_loader(opened, batch=4, num_hard_negatives=3).batch(0)
    texts = {k: tokenizer.decode(ids) for k, ids in texts_of([batch]).items()}
    for negatives in batch.negatives:
        kinds = [texts[batch.num_queries + document].split()[0] for document in negatives]
        assert sorted(kinds) == ["bad", "new", "new"]


def test_answers_to_the_same_question_are_masked(make_config: ConfigMaker, tmp_path: Path) -> None:
    rows = [{"query": "a", "positives": ["x"]}, {"query": "a", "positives": ["y"]}]
    rows += [{"query": "b", "positives": ["z"]}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = SourceConfig(name="pairs", format="columns", path=str(path))
    batch = make_loader(Dataset.open(prepare(make_config(source), num_workers=1)), batch=3).batch(0)
    place = {example: row for row, example in enumerate(batch.example_ids.tolist())}
    for own, other in ((0, 1), (1, 0)):
        assert batch.masked[place[own]].tolist() == batch.positives[place[other]].tolist()
    assert len(batch.masked[place[2]]) == 0


def test_a_chunk_counts_the_tokens_of_a_documents_instruction_too(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    rows = [{"query": f"query {k}", "positives": [f"text {k}"]} for k in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = SourceConfig(name="pairs", format="columns", path=str(path))
    config = make_config(source, template=Template(document="Passage: {text}"))
    opened = Dataset.open(prepare(config, num_workers=1))
    tokenizer = AutoTokenizer.from_pretrained(opened.tokenizer.path)
    batch = make_loader(opened, batch=4).batch(0)
    for chunk in batch.chunks:
        assert chunk.instruction_tokens is not None
        pieces = np.split(chunk.input_ids, np.cumsum(chunk.lengths)[:-1])
        counted = zip(chunk.texts, pieces, chunk.instruction_tokens, strict=True)
        for text, piece, count in counted:
            wanted = "Passage:" if text >= batch.num_queries else ""
            assert tokenizer.decode(piece[:count]) == wanted


def test_positives_not_chosen_are_masked_when_another_query_brings_them(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    rows = [
        {"query": "a", "positives": ["x", "y"]},
        {"query": "b", "positives": ["z"], "negatives": ["x", "y"]},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = SourceConfig(name="pairs", format="columns", path=str(path))
    opened = Dataset.open(prepare(make_config(source), num_workers=1))
    batch = make_loader(opened, batch=2, num_hard_negatives=2).batch(0)
    first = batch.example_ids.tolist().index(0)
    assert len(batch.positives[first]) == len(batch.masked[first]) == 1
    assert len(batch.masked[1 - first]) == 0
