"""Matching ratios and hashes of word runs, compared with their definitions."""

from __future__ import annotations

import difflib
import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.config import DecontaminateConfig, EvaluationSetConfig
from pipeline.data.prepare.contamination import (
    ComparedText,
    ContaminationIndex,
    build_index,
    hash_runs,
    hash_words,
    ratio_above,
)


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
    # The last two have letters that are frequent, and rare ones within and beyond Latin-1.
    alphabet = draw(
        st.sampled_from(
            ["ab", "ab ", "abc d,", "etaoin shrdlu", "aab b" * 9 + "x?é", "ab " * 9 + "≤≥?"]
        )
    )
    letters = st.lists(st.sampled_from(alphabet), max_size=12).map("".join)
    pieces = st.lists(letters, max_size=6)
    shared = draw(pieces)
    texts = []
    for _ in range(2):
        parts = draw(st.permutations(shared + draw(pieces)))
        # Beyond 200 characters, difflib takes no frequent letter for the start of a match.
        texts.append("".join(parts) * draw(st.sampled_from([1, 1, 5])))
    return texts[0], texts[1]


@given(pairs_of_texts(), st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]))
@settings(max_examples=150)
def test_a_bounded_matching_ratio_is_that_of_difflib(pair: tuple[str, str], limit: float) -> None:
    ratio = difflib_ratio(*pair)
    left, right = map(ComparedText, pair)
    # The ratio itself is the limit that rounding would first get wrong.
    for bound in (limit, ratio, np.nextafter(ratio, 0) if ratio else 0.0):
        assert ratio_above(left, right, bound) == (ratio if ratio > bound else None)


@st.composite
def mixtures(draw: st.DrawFn) -> str:
    """A text of a few sentences, repeated, with a few more frequent letters anywhere."""
    sentences = [
        "the rain in spain ",
        "a quick brown fox; ",
        "π is 3.14159, about. ",
        "eee ttt aaa ",
    ]
    parts = draw(st.lists(st.sampled_from(sentences), min_size=9, max_size=30))
    noise = draw(st.lists(st.sampled_from("etao n"), max_size=60))
    places = st.integers(0, 400)
    text = "".join(parts)
    for letter in noise:
        place = draw(places)
        text = text[:place] + letter + text[place:]
    return text


@given(mixtures(), mixtures())
# Of the matches at "x" and at "y", difflib takes the earlier one, and so misses the larger block.
@example("ba" * 50 + "x" + "bb" * 9 + "y" + "ab" * 60, "y" + "ab" * 60 + "ba" * 50 + "aax")
@settings(max_examples=60)
def test_a_ratio_of_long_texts_is_found_up_to_the_last_bit(left: str, right: str) -> None:
    ratio = difflib_ratio(left, right)
    assert len(right) < 200 or ComparedText(right).frequent
    below = np.nextafter(ratio, 0)
    assert ratio_above(ComparedText(left), ComparedText(right), below) == ratio
    assert ratio_above(ComparedText(left), ComparedText(right), ratio) is None


_WORDS = st.lists(st.sampled_from("aab"), max_size=14).map(" ".join)


@given(st.lists(_WORDS, min_size=1, max_size=40), _WORDS)
# The text has "a a a" three times, which counts once: the second query has more in common.
@example(["a a a a b c", "p q r s t u v"], "a a a a a p q r s t u v")
@settings(max_examples=60, deadline=None)
def test_a_query_is_compared_with_the_queries_that_have_most_runs_in_common(
    tmp_path_factory: pytest.TempPathFactory, queries: list[str], text: str
) -> None:
    folder = tmp_path_factory.mktemp("index")
    path = folder / "queries.jsonl"
    path.write_text("".join(json.dumps({"text": query}) + "\n" for query in queries))
    rule = DecontaminateConfig(
        sets=(EvaluationSetConfig(name="queries", path=str(path)),), max_overlap=1, max_ratio=0.3
    )
    build_index(rule, folder / "index")

    own = set(hash_runs(hash_words(text), 3).tolist())
    # A run counts as often as the query has it.
    shared = [
        sum(run in own for run in hash_runs(hash_words(query), 3).tolist()) for query in queries
    ]
    nearest = sorted(range(len(queries)), key=lambda number: -shared[number])[:16]
    expected = next(
        (
            (f"matching ratio {ratio:.2f} with an evaluation query", f"queries: {queries[number]}")
            for number in nearest
            if shared[number] and (ratio := difflib_ratio(text, queries[number])) > 0.3
        ),
        None,
    )
    found = ContaminationIndex(rule, folder / "index").find(text, is_query=True)
    assert (found and (found.reason, found.where)) == expected


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
