"""Chosen documents and masks of a batch, against the definition written as plain loops."""

from __future__ import annotations

from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batch import Ragged
from pipeline.data.order import choose, find_relevance
from pipeline.data.prepare.near_duplicates import join_pairs

ROW = st.lists(st.integers(0, 30), max_size=5, unique=True)


def ragged(rows: list[list[int]]) -> Ragged:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Ragged.from_lengths(lengths, np.array(list(chain(*rows)), dtype=np.int64))


def test_pairs_are_grouped_by_row_in_the_order_they_come() -> None:
    rows, values = np.array([2, 0, 2, 2]), np.array([5, 6, 9, 7])
    assert [row.tolist() for row in Ragged.from_pairs(rows, values, 4)] == [[6], [], [5, 9, 7], []]


def pick(lists: Ragged, places: np.ndarray) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in range(len(lists))]
    for place in places.tolist():
        out[lists.rows[place]].append(int(lists.values[place]))
    return out


@given(
    rows=st.lists(ROW, min_size=1, max_size=12),
    count=st.integers(0, 4),
    key=st.integers(0, 2**40),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
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
@settings(max_examples=150, deadline=None)
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


@given(pairs=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_connected_documents_get_the_smallest_number(pairs: list[tuple[int, int]]) -> None:
    groups = [{number} for number in range(41)]
    for left, right in pairs:
        joined = groups[left] | groups[right]
        for number in joined:
            groups[number] = joined
    found = join_pairs(np.arange(41), np.array(pairs, dtype=np.int64).reshape(-1, 2).T)
    assert found.tolist() == [min(group) for group in groups]
