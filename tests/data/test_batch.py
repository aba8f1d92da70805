"""Ranks and chunks of a global batch: complete, within budget, even; ragged rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.batch import (
    Ragged,
    assign_by_cost,
    first_fit_decreasing,
    plan_chunks,
    text_cost,
)

lengths_strategy = st.lists(st.integers(1, 300), min_size=1, max_size=200).map(
    lambda values: np.array(values, dtype=np.int64)
)


ATTENTION = 100.0  # as long as the texts here, so that cost and tokens differ


def slow_first_fit_decreasing(
    lengths: np.ndarray, max_tokens: int, max_cost: float
) -> list[tuple[int, float]]:
    """Tokens and cost per chunk, one row at a time, from the definition."""
    chunks: list[tuple[int, float]] = []
    for length in sorted(lengths.tolist(), reverse=True):
        cost = length * (1 + length / ATTENTION)
        for place, (tokens, used) in enumerate(chunks):
            if tokens + length <= max_tokens and used + cost <= max_cost + 1e-6:
                chunks[place] = tokens + length, used + cost
                break
        else:
            chunks.append((length, cost))
    return chunks


@given(
    lengths=lengths_strategy,
    max_tokens=st.integers(100, 1000),
    max_cost=st.integers(100, 4000),
)
@settings(max_examples=100)
def test_first_fit_decreasing_follows_its_definition(
    lengths: np.ndarray, max_tokens: int, max_cost: int
) -> None:
    chunk_of, count = first_fit_decreasing(
        lengths, max_tokens, max_cost=max_cost, attention_length=ATTENTION
    )
    tokens = np.bincount(chunk_of, weights=lengths, minlength=count)
    expected = slow_first_fit_decreasing(lengths, max_tokens, max_cost)
    assert tokens.tolist() == [number for number, _ in expected]
    cost = np.bincount(chunk_of, weights=text_cost(lengths, ATTENTION), minlength=count)
    assert cost.tolist() == pytest.approx([used for _, used in expected])


@given(
    lengths=lengths_strategy,
    world_size=st.integers(1, 9),
    max_tokens=st.integers(100, 1000),
    max_cost=st.none() | st.integers(100, 4000),
    min_chunks=st.integers(1, 5),
)
@example(  # spread evenly by tokens, the chunk of the longest would cost 1,400
    lengths=np.array([300, 100, 100, 100, 100]),
    world_size=1,
    max_tokens=1000,
    max_cost=1200,
    min_chunks=1,
)
@settings(max_examples=100)
def test_a_plan_holds_every_text_once_within_the_budgets(
    lengths: np.ndarray, world_size: int, max_tokens: int, max_cost: int | None, min_chunks: int
) -> None:
    plans = plan_chunks(
        lengths,
        world_size=world_size,
        max_tokens=max_tokens,
        max_cost=max_cost,
        min_chunks=min_chunks,
        attention_length=ATTENTION,
    )
    assert len(plans) == world_size
    assert len({len(plan) for plan in plans}) == 1
    assert len(plans[0]) >= min_chunks
    chunks = [chunk for plan in plans for chunk in plan]
    assert np.array_equal(np.sort(np.concatenate(chunks)), np.arange(len(lengths)))
    assert all((np.diff(chunk) > 0).all() for chunk in chunks)
    for own in (lengths[chunk] for chunk in chunks if len(chunk) > 1):
        assert own.sum() <= max_tokens
        assert max_cost is None or text_cost(own, ATTENTION).sum() <= max_cost + 1e-6


def test_texts_beyond_the_token_budget_are_alone_and_the_others_together() -> None:
    lengths = np.array([9000, 100, 50, 8193, 8192, 40])
    plan = plan_chunks(lengths, world_size=1, max_tokens=8192)[0]
    assert sorted(sorted(chunk.tolist()) for chunk in plan) == [[0], [1, 2, 5], [3], [4]]


def test_without_a_cost_budget_tokens_alone_decide() -> None:
    lengths = np.random.default_rng(1).integers(1, 4097, 500)
    cost = 8192 * (1 + 8192 / ATTENTION)
    bounded = first_fit_decreasing(lengths, 8192, max_cost=cost, attention_length=ATTENTION)
    free = first_fit_decreasing(lengths, 8192, max_cost=1e12, attention_length=ATTENTION)
    default = first_fit_decreasing(lengths, 8192, attention_length=ATTENTION)
    assert bounded[1] == free[1] == default[1]
    assert np.array_equal(free[0], default[0])


def test_a_cost_budget_makes_chunks_of_long_texts_smaller() -> None:
    lengths = np.array([1000] * 8 + [10] * 800)
    plan = plan_chunks(
        lengths, world_size=1, max_tokens=4000, max_cost=5000, attention_length=1000.0
    )[0]
    assert max((lengths[chunk] == 1000).sum() for chunk in plan) == 2
    assert max(lengths[chunk].sum() for chunk in plan) <= 4000


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
    loads = np.bincount(assign_by_cost(cost, world_size), weights=cost, minlength=world_size)
    assert loads.max() / loads.mean() <= 1.01


def test_fewer_texts_than_ranks_leave_dummy_chunks() -> None:
    plans = plan_chunks(np.array([5, 7]), world_size=4, max_tokens=10)
    assert sorted(len(plan[0]) for plan in plans) == [0, 0, 1, 1]


def test_pairs_are_grouped_by_row_in_the_order_they_come() -> None:
    rows, values = np.array([2, 0, 2, 2]), np.array([5, 6, 9, 7])
    assert [row.tolist() for row in Ragged.from_pairs(rows, values, 4)] == [[6], [], [5, 9, 7], []]
