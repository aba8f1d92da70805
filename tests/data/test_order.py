"""The examples, documents and masks of a step, compared with definitions in plain loops."""

from __future__ import annotations

import itertools
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batch import Ragged, find_relevance
from pipeline.data.order import (
    Group,
    Homogeneous,
    Order,
    Stream,
    choose,
    permute,
    source_shares,
)
from pipeline.errors import UserError

MODES: tuple[Homogeneous, ...] = ("none", "source", "instruction")


def make_groups(counts: dict[tuple[str, str], int]) -> list[Group]:
    groups, start = [], 0
    for (source, instruction), count in counts.items():
        groups.append(Group(source=source, instruction=instruction, start=start, count=count))
        start += count
    return groups


def make_order(
    groups: list[Group], *, batch: int, mode: Homogeneous, seed: int = 0, **mixture: object
) -> Order:
    settings = {"weights": {}, "temperature": 1.0, "cap": None, **mixture}
    shares = source_shares(groups, **settings)  # type: ignore[arg-type]
    return Order(groups, global_batch_size=batch, homogeneous=mode, seed=seed, shares=shares)


GROUPS = make_groups({("a", "x"): 400, ("a", "y"): 700, ("b", "z"): 90, ("c", ""): 300})


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_reaches_any_index_of_a_huge_set() -> None:
    size = 10**15
    index = np.array([0, 1, size // 2, size - 1])
    found = permute(index, size, 5)
    assert ((found >= 0) & (found < size)).all()
    assert len(set(found.tolist())) == 4
    assert permute(index[2:3], size, 5)[0] == found[2]


def test_permute_looks_random() -> None:
    size = 10_000
    places = permute(np.arange(size), size, 1)
    assert abs(np.corrcoef(np.arange(size), places)[0, 1]) < 0.05
    assert (permute(np.arange(size), size, 2) == places).mean() < 0.01


@given(
    window=st.integers(1, 40), extra=st.integers(0, 200), key=st.integers(0, 2**32), data=st.data()
)
@settings(max_examples=80)
def test_no_window_of_a_stream_repeats_an_element(
    window: int, extra: int, key: int, data: st.DataObject
) -> None:
    stream = Stream(size=window + extra, window=window, key=key)
    start = 0
    for ordinal in range(12):
        count = data.draw(st.integers(0, window))
        taken = stream.take(ordinal=ordinal, start=start, count=count)
        start += count
        assert len(taken) == count == len(set(taken.tolist()))
        assert ((taken >= 0) & (taken < stream.size)).all()


@given(window=st.integers(1, 20), extra=st.integers(0, 60), key=st.integers(0, 2**32))
@settings(max_examples=40)
def test_every_epoch_of_a_large_stream_visits_every_element_once(
    window: int, extra: int, key: int
) -> None:
    size = 3 * window + extra
    stream = Stream(size=size, window=window, key=key)
    starts = range(0, 3 * size, window)
    taken = np.concatenate(
        [stream.take(ordinal=k, start=start, count=window) for k, start in enumerate(starts)]
    )
    for epoch in range(3):
        own = taken[epoch * size : (epoch + 1) * size]
        assert np.array_equal(np.sort(own), np.arange(size))


def test_every_epoch_of_a_stream_has_another_order() -> None:
    for size in (300, 25):  # whole epochs, and epochs cut to whole windows of 10
        stream = Stream(size=size, window=10, key=7)
        windows = size // 10
        epochs = [
            np.concatenate(
                [
                    stream.take(ordinal=k, start=10 * k, count=10)
                    for k in range(windows * epoch, windows * (epoch + 1))
                ]
            )
            for epoch in range(6)
        ]
        for one, other in itertools.combinations(epochs, 2):
            assert (one == other).mean() < 0.3


def sources_of(order: Order, num_steps: int) -> str:
    """The source of the first example of each batch, a letter each."""
    ends = np.cumsum([group.count for group in GROUPS])
    first = [order.batch(step)[0] for step in range(num_steps)]
    return "".join(GROUPS[k].source for k in np.searchsorted(ends, first, side="right"))


@pytest.mark.parametrize("mode", MODES)
def test_every_example_of_a_source_is_drawn_as_often_as_the_others(mode: Homogeneous) -> None:
    """Over several epochs, and several cycles of sources: nothing starts again in between."""
    groups = make_groups({("a", ""): 640, ("b", ""): 640})
    order = make_order(groups, batch=64, mode=mode, weights={"b": 9.0})
    drawn = np.concatenate([order.batch(step) for step in range(340)])
    for own in np.bincount(drawn, minlength=1280).reshape(2, 640):
        assert own.min() >= 2
        assert own.max() <= own.min() + 1


@pytest.mark.parametrize("mode", MODES)
def test_another_seed_draws_other_examples_from_other_sources(mode: Homogeneous) -> None:
    one, other = (make_order(GROUPS, batch=64, mode=mode, seed=seed) for seed in (0, 1))
    met = [np.intersect1d(one.batch(k), other.batch(k)) for k in range(20)]
    assert max(map(len, met)) < 64
    if mode != "none":
        assert sources_of(one, 60) != sources_of(other, 60)


def test_the_order_of_the_sources_does_not_come_again() -> None:
    drawn = sources_of(make_order(GROUPS, batch=8, mode="source"), 600)
    assert drawn.count(drawn[:100]) == 1


def test_sources_of_one_size_are_shuffled_on_their_own() -> None:
    order = make_order(make_groups({("a", ""): 640, ("b", ""): 640}), batch=64, mode="none")
    ids = order.batch(0)
    first, second = ids[ids < 640], ids[ids >= 640] - 640
    assert len(first) == len(second) == 32
    assert len(np.intersect1d(first, second)) < 10


@pytest.mark.parametrize("mode", MODES)
def test_batches_are_full_and_without_repeats(mode: Homogeneous) -> None:
    order = make_order(GROUPS, batch=64, mode=mode)
    for step in range(100):  # four epochs
        ids = order.batch(step)
        assert len(ids) == 64 == len(set(ids.tolist()))
        assert ids.min() >= 0 and ids.max() < 1490


@pytest.mark.parametrize("mode", MODES)
def test_a_step_does_not_depend_on_the_steps_before(mode: Homogeneous) -> None:
    walked = make_order(GROUPS, batch=64, mode=mode)
    batches = [walked.batch(step) for step in range(130)]
    for step in (129, 3, 70):
        jumped = make_order(GROUPS, batch=64, mode=mode)
        assert np.array_equal(jumped.batch(step), batches[step])


@pytest.mark.parametrize("mode", ["source", "instruction"])
def test_homogeneous_batches_hold_one_group(mode: Homogeneous) -> None:
    order = make_order(GROUPS, batch=64, mode=mode)
    ends = np.cumsum([group.count for group in GROUPS])
    for step in range(100):
        groups = {GROUPS[k] for k in np.searchsorted(ends, order.batch(step), side="right")}
        assert len({group.source for group in groups}) == 1
        if mode == "instruction":
            assert len(groups) == 1


@pytest.mark.parametrize("mode", MODES)
def test_the_epoch_of_an_example_counts_how_often_it_was_drawn_before(mode: Homogeneous) -> None:
    order = make_order(make_groups({("a", "x"): 400, ("b", "y"): 200}), batch=64, mode=mode)
    seen: dict[int, int] = {}
    for step in range(60):
        ids, epochs = order.batch(step), order.epochs(step)
        assert epochs.tolist() == [seen.get(example, 0) for example in ids.tolist()]
        seen |= {example: seen.get(example, 0) + 1 for example in ids.tolist()}
    assert max(seen.values()) > 3


def test_the_epochs_of_a_small_source_are_those_of_its_stream() -> None:
    stream = Stream(size=100, window=40, key=5)  # two windows an epoch
    epochs = [stream.epochs(ordinal=k, start=40 * k, count=40).tolist() for k in range(5)]
    assert epochs == [[0] * 40, [0] * 40, [1] * 40, [1] * 40, [2] * 40]


def test_small_instructions_of_a_source_share_batches() -> None:
    groups = make_groups({("a", f"task {k}"): 20 for k in range(10)} | {("a", "big"): 500})
    order = make_order(groups, batch=64, mode="instruction")
    assert sorted(unit.size for unit in order.units) == [200, 500]
    seen = np.unique(np.concatenate([order.batch(step) for step in range(60)]))
    assert len(seen) == 700


def test_a_remainder_too_small_for_a_batch_joins_the_smallest_unit() -> None:
    groups = make_groups({("a", "tiny"): 10, ("a", "large"): 500, ("a", "middle"): 100})
    order = make_order(groups, batch=64, mode="instruction")
    assert sorted(unit.size for unit in order.units) == [110, 500]


def test_a_source_smaller_than_a_homogeneous_batch_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"'b' has 90 examples for data\.global_batch_size 128"):
        make_order(GROUPS, batch=128, mode="source")


@pytest.mark.parametrize("mode", MODES)
def test_sources_are_drawn_by_their_share(mode: Homogeneous) -> None:
    order = make_order(GROUPS, batch=64, mode=mode, weights={"b": 3.0})
    num_steps = 100 if mode == "none" else 640  # a homogeneous batch is one draw
    ids = np.concatenate([order.batch(step) for step in range(num_steps)])
    total = 1100 + 3 * 90 + 300
    assert (ids < 1100).mean() == pytest.approx(1100 / total, abs=0.03)
    assert (ids < 400).mean() == pytest.approx(400 / total, abs=0.03)  # one of its instructions
    assert ((ids >= 1100) & (ids < 1190)).mean() == pytest.approx(270 / total, abs=0.03)


def test_temperature_flattens_and_cap_limits_the_shares() -> None:
    options = {"weights": {}, "temperature": 1.0, "cap": None}
    plain = source_shares(GROUPS, **options)
    flat = source_shares(GROUPS, **{**options, "temperature": 1e9})
    capped = source_shares(GROUPS, **{**options, "cap": 300})
    assert plain["a"] == pytest.approx(1100 / 1490)
    assert all(share == pytest.approx(1 / 3) for share in flat.values())
    assert capped["a"] == pytest.approx(capped["c"]) == pytest.approx(300 / 690)


@pytest.mark.parametrize("options", [{"temperature": 1e-3}, {"weights": {"a": 1e308}}])
def test_shares_that_no_number_can_hold_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data\.mixture_temperature: .* fix: raise it, or lower"):
        source_shares(GROUPS, **{"weights": {}, "temperature": 1.0, "cap": None, **options})


def test_a_weight_of_zero_leaves_a_source_out() -> None:
    order = make_order(GROUPS, batch=128, mode="source", weights={"b": 0.0})
    ids = np.concatenate([order.batch(step) for step in range(100)])
    assert not ((ids >= 1100) & (ids < 1190)).any()


def test_an_unknown_source_in_the_weights_is_refused() -> None:
    with pytest.raises(UserError, match=r"no source 'q' \| allowed: a, b, c"):
        source_shares(GROUPS, weights={"q": 1.0}, temperature=1.0, cap=None)


def test_a_far_step_needs_no_walk() -> None:
    groups = make_groups({("a", str(k)): 2_500_000 for k in range(4)})
    order = make_order(groups, batch=1024, mode="instruction")
    assert len(set(order.batch(1_000_000).tolist())) == 1024


@pytest.mark.parametrize("homogeneous", ["source", "instruction", "none"])
def test_a_batch_is_named_after_what_its_examples_share(homogeneous: Homogeneous) -> None:
    groups = [
        Group(source="a", instruction="first", start=0, count=40),
        Group(source="a", instruction="second", start=40, count=40),
        Group(source="b", instruction="", start=80, count=40),
    ]
    order = Order(
        groups, global_batch_size=8, homogeneous=homogeneous, seed=1, shares={"a": 0.6, "b": 0.4}
    )
    names = {
        "source": {"a": range(80), "b": range(80, 120)},
        "instruction": {"a#1": range(40), "a#2": range(40, 80), "b": range(80, 120)},
        "none": {"": range(120)},
    }[homogeneous]
    seen = set()
    for step in range(40):
        kind = order.kind(step)
        seen.add(kind)
        assert set(order.batch(step).tolist()) <= set(names[kind])
    assert seen == set(names)
    assert set(order.kinds) == set(names) - {""}


ROW = st.lists(st.integers(0, 30), max_size=5, unique=True)


def ragged(rows: list[list[int]]) -> Ragged:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Ragged.from_lengths(lengths, np.array(list(chain(*rows)), dtype=np.int64))


def pick(lists: Ragged, positions: np.ndarray) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in range(len(lists))]
    for position in positions.tolist():
        out[lists.rows[position]].append(int(lists.values[position]))
    return out


@given(
    rows=st.lists(ROW, min_size=1, max_size=12),
    count=st.integers(0, 4),
    key=st.integers(0, 2**40),
    data=st.data(),
)
@settings(max_examples=100)
def test_choosing_takes_first_values_before_others(
    rows: list[list[int]], count: int, key: int, data: st.DataObject
) -> None:
    first = np.array([data.draw(st.integers(0, len(row))) for row in rows])
    chosen = pick(ragged(rows), choose(ragged(rows), count, num_first=first, key=key))
    for row, own, num_first in zip(rows, chosen, first.tolist(), strict=True):
        assert len(own) == min(count, len(row)) == len(set(own))
        assert set(own) <= set(row)
        early = len(set(own) & set(row[:num_first]))
        assert early == min(count, num_first)


def test_another_key_chooses_other_documents() -> None:
    rows = ragged([list(range(30))] * 20)
    one, two = (choose(rows, 3, num_first=None, key=key) for key in (1, 2))
    assert not np.array_equal(one, two)
    every = np.concatenate([choose(rows, 3, num_first=None, key=key) for key in range(60)])
    assert len(np.unique(every)) > 590


@given(
    examples=st.lists(
        st.tuples(ROW.filter(bool), ROW, st.integers(-1, 3), st.integers(0, 6)),
        min_size=1,
        max_size=12,
    ),
    count=st.integers(1, 3),
)
@settings(max_examples=150)
def test_masks_follow_their_definition(
    examples: list[tuple[list[int], list[int], int, int]], count: int
) -> None:
    listed = [positives for positives, _, _, _ in examples]
    good = [row[:count] for row in listed]
    bad = [[d for d in row if d not in own] for (own, row, _, _) in examples]
    concept = np.array([concept for _, _, concept, _ in examples])
    query = np.array([key for _, _, _, key in examples])
    found = find_relevance(
        positives=ragged(good),
        negatives=ragged(bad),
        all_positives=ragged(listed),
        concept=concept,
        query_key=query,
    )
    ids = found.document_ids.tolist()
    assert ids == sorted(set(chain(*good, *bad)))
    for i in range(len(examples)):
        assert [ids[k] for k in found.positives[i]] == good[i]
        assert [ids[k] for k in found.negatives[i]] == bad[i]
        related = [
            j
            for j in range(len(examples))
            if query[j] == query[i] or (concept[j] == concept[i] != -1)
        ]
        known = set(listed[i]) | {d for j in related for d in good[j]}
        expected = (known & set(ids)) - set(good[i]) - set(bad[i])
        assert {ids[k] for k in found.masked[i]} == expected
        assert len(found.masked[i]) == len(expected)
