"""Ranks and chunks of a global batch: complete, within budget, even."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.balance import assign_ranks, first_fit_decreasing, plan_chunks, text_cost

lengths_strategy = st.lists(st.integers(1, 300), min_size=1, max_size=200).map(
    lambda values: np.array(values, dtype=np.int64)
)


def slow_first_fit_decreasing(lengths: np.ndarray, budget: int) -> list[int]:
    """Tokens per chunk, one row at a time, from the definition."""
    chunks: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        for place, used in enumerate(chunks):
            if used + length <= budget:
                chunks[place] += length
                break
        else:
            chunks.append(length)
    return chunks


@given(lengths=lengths_strategy, budget=st.integers(300, 1000))
@settings(max_examples=100, deadline=None)
def test_first_fit_decreasing_follows_its_definition(lengths: np.ndarray, budget: int) -> None:
    chunk_of, count = first_fit_decreasing(lengths, budget)
    tokens = np.bincount(chunk_of, weights=lengths, minlength=count).astype(int).tolist()
    assert tokens == slow_first_fit_decreasing(lengths, budget)


@given(
    lengths=lengths_strategy,
    world_size=st.integers(1, 9),
    budget=st.integers(300, 1000),
    min_chunks=st.integers(1, 5),
)
@settings(max_examples=100, deadline=None)
def test_a_plan_holds_every_text_once_within_the_budget(
    lengths: np.ndarray, world_size: int, budget: int, min_chunks: int
) -> None:
    plans = plan_chunks(lengths, world_size=world_size, max_tokens=budget, min_chunks=min_chunks)
    assert len(plans) == world_size
    assert len({len(plan) for plan in plans}) == 1
    assert len(plans[0]) >= min_chunks
    chunks = [chunk for plan in plans for chunk in plan]
    assert all(lengths[chunk].sum() <= budget for chunk in chunks)
    assert np.array_equal(np.sort(np.concatenate(chunks)), np.arange(len(lengths)))


def test_the_heaviest_chunk_comes_first_on_every_rank() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 400)
    for plan in plan_chunks(lengths, world_size=3, max_tokens=2000):
        costs = [text_cost(lengths[chunk]).sum() for chunk in plan]
        assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("world_size", [8, 64, 256, 1024])
def test_ranks_carry_even_loads_of_log_normal_lengths(world_size: int) -> None:
    rng = np.random.default_rng(world_size)
    lengths = np.clip(rng.lognormal(6, 1, 64 * world_size), 1, 4096).astype(np.int64)
    cost = text_cost(lengths)
    loads = np.bincount(assign_ranks(cost, world_size), weights=cost, minlength=world_size)
    assert loads.max() / loads.mean() <= 1.01


def test_fewer_texts_than_ranks_leave_dummy_chunks() -> None:
    plans = plan_chunks(np.array([5, 7]), world_size=4, max_tokens=10)
    assert sorted(len(plan[0]) for plan in plans) == [0, 0, 1, 1]
