"""Matching ratios and hashes of word runs, compared with their definitions."""

from __future__ import annotations

import difflib
import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.prepare.contamination import ComparedText, hash_runs, hash_words, ratio_above


def difflib_ratio(left: str, right: str) -> float:
    """The definition, as published decontamination computes it, and the same over words."""
    words = [re.findall(r"\w+", text.lower()) for text in (left, right)]
    return max(
        difflib.SequenceMatcher(None, left, right).ratio(),
        difflib.SequenceMatcher(None, *words, autojunk=False).ratio(),
    )


@st.composite
def pairs_of_texts(draw: st.DrawFn) -> tuple[str, str]:
    """Texts with much in common: few letters, shared pieces, another order, and great lengths."""
    alphabet = draw(st.sampled_from(["ab", "ab ", "abc d,", "etaoin shrdlu"]))
    pieces = st.lists(st.text(alphabet, max_size=12), max_size=6)
    shared = draw(pieces)
    texts = []
    for _ in range(2):
        parts = draw(st.permutations(shared + draw(pieces)))
        # Beyond 200 characters, difflib takes no frequent letter for the start of a match.
        texts.append("".join(parts) * draw(st.sampled_from([1, 1, 5])))
    return texts[0], texts[1]


@given(pairs_of_texts(), st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]))
@settings(max_examples=120)
def test_a_bounded_matching_ratio_is_that_of_difflib(pair: tuple[str, str], limit: float) -> None:
    ratio = difflib_ratio(*pair)
    left, right = map(ComparedText, pair)
    # The ratio itself is the limit that rounding would first get wrong.
    for bound in (limit, ratio, np.nextafter(ratio, 0) if ratio else 0.0):
        assert ratio_above(left, right, bound) == (ratio if ratio > bound else None)


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 14))
@settings(max_examples=60)
def test_runs_of_words_have_equal_hashes_only_where_they_are_equal(
    letters: list[str], size: int
) -> None:
    words = hash_words(" ".join(letters))
    runs = hash_runs(words, size)
    size = min(size, len(letters))
    expected = [tuple(letters[k : k + size]) for k in range(len(letters) - size + 1)]
    assert len(runs) == (len(expected) if letters else 0)
    # Also of a run elsewhere, so that one index serves all texts.
    alone = [hash_runs(hash_words(" ".join(run)), size)[0] for run in expected if run]
    assert runs.tolist() == alone
    assert len(set(runs.tolist())) == len({run for run in expected if run})
