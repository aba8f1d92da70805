"""Global batches of each rank, compared with the rows of the source."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from data_support import ConfigMaker, make_loader, reasonaug_rows, texts_of, write_jsonl
from transformers import AutoTokenizer

from pipeline.config import SourceConfig, Template
from pipeline.data.batch import GlobalBatch, text_cost
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.errors import UserError


def all_ranks(dataset: Dataset, step: int, world_size: int, **changes: object) -> list[GlobalBatch]:
    return [
        make_loader(dataset, rank=rank, world_size=world_size, **changes).batch(step)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_text_is_on_exactly_one_rank(dataset: Dataset, world_size: int) -> None:
    batches = all_ranks(dataset, 4, world_size)
    first = batches[0]
    assert len({len(batch.chunks) for batch in batches}) == 1
    found = texts_of(batches)
    assert sorted(found) == list(range(first.num_queries + first.num_documents))
    assert sum(map(len, found.values())) == first.tokens
    assert found == texts_of(all_ranks(dataset, 4, 1))


@pytest.mark.parametrize("world_size", [1, 3, 40])
def test_one_rank_knows_how_many_tokens_every_rank_gets(dataset: Dataset, world_size: int) -> None:
    changes = {"min_chunks": 3}
    batches = all_ranks(dataset, 4, world_size, **changes)
    assert any(chunk.is_dummy for batch in batches for chunk in batch.chunks) == (world_size == 40)
    loader = make_loader(dataset, rank=world_size - 1, world_size=world_size, **changes)
    assert loader.chunk_tokens(4) == [[len(c.input_ids) for c in b.chunks] for b in batches]


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
