"""MinHash estimates similarity; connected near-duplicates become one document."""

from __future__ import annotations

import random

import numpy as np
import pytest
from data_support import words
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.prepare.contamination import hash_ngrams, hash_words
from pipeline.data.prepare.tokenise import join_pairs, minhash


@given(pairs=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=60))
@settings(max_examples=100)
def test_connected_documents_get_the_smallest_number(pairs: list[tuple[int, int]]) -> None:
    groups = [{number} for number in range(41)]
    for left, right in pairs:
        joined = groups[left] | groups[right]
        for number in joined:
            groups[number] = joined
    found = join_pairs(np.arange(41), np.array(pairs, dtype=np.int64).reshape(-1, 2).T)
    assert found.tolist() == [min(group) for group in groups]


def test_minhash_estimates_the_jaccard_similarity() -> None:
    rng = random.Random(1)
    base = words(rng, 400).split()
    for cut in (40, 120, 240):
        other = base[:-cut] + words(rng, cut).split()
        left, right = (
            set(hash_ngrams(hash_words(" ".join(text)), 5).tolist()) for text in (base, other)
        )
        exact = len(left & right) / len(left | right)
        estimate = (minhash(" ".join(base)) == minhash(" ".join(other))).mean()
        assert estimate == pytest.approx(exact, abs=0.14)
