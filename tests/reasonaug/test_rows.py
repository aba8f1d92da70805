from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ReasonAug.negatives import Bm25, nearest_others, words

Rows = list[dict[str, Any]]
FIELDS = [
    "id", "domain", "instance", "task_type", "task", "user_query", "positive_document",
    "hard_negative_document", "negative_instance",
]  # fmt: skip


def test_rows_have_exactly_the_published_fields(rows_of: Callable[[str], Rows]) -> None:
    rows = rows_of("train")
    assert all(list(row) == FIELDS for row in rows)
    assert all(isinstance(value, str) and value for row in rows for value in row.values())
    assert len({row["id"] for row in rows}) == len(rows)


def test_a_task_has_one_instruction_and_the_four_kinds_occur(
    rows_of: Callable[[str], Rows],
) -> None:
    pairs = {(row["task_type"], row["task"]) for row in rows_of("train")}
    assert sorted(kind for kind, _ in pairs) == ["i2ps", "p2i", "p2ps", "ps2ps"]
    assert len({task for _, task in pairs}) == 4


def test_ps2ps_is_a_quarter_of_the_pairs_of_problems(rows_of: Callable[[str], Rows]) -> None:
    count = Counter(row["task_type"] for row in rows_of("train"))
    assert count["ps2ps"] / (count["ps2ps"] + count["p2ps"]) == pytest.approx(0.25, abs=0.01)


def test_texts_belong_to_the_concepts_that_a_row_names(rows_of: Callable[[str], Rows]) -> None:
    owner: dict[str, str] = {}
    domain: dict[str, str] = {}
    for row in rows_of("problems"):
        document = f"**Problem**\n{row['statement']}\n\n**Solution**\n{row['solution']}"
        owner[document] = owner[row["statement"]] = row["concept"]
        if row["domain"] in ("algorithm", "data structure"):
            owner[row["solution"]] = row["concept"]
    for row in rows_of("definitions"):
        owner[row["definition"]] = owner[row["concept"]] = row["concept"]
        domain[row["concept"]] = row["domain"]
    for row in rows_of("train"):
        assert owner[row["positive_document"]] == row["instance"]
        assert owner[row["hard_negative_document"]] == row["negative_instance"]
        assert row["instance"] != row["negative_instance"]
        assert domain[row["instance"]] == domain[row["negative_instance"]] == row["domain"]
        if row["user_query"] in owner:
            assert owner[row["user_query"]] == row["instance"]


def test_a_negative_has_the_shape_of_its_positive(rows_of: Callable[[str], Rows]) -> None:
    """Otherwise length or a heading would give the answer away."""
    marks = ("**Problem**", "**Solution**", "**Definition**", "```python")
    for row in rows_of("train"):
        for mark in marks[:3]:
            positive, negative = row["positive_document"], row["hard_negative_document"]
            assert (mark in positive) == (mark in negative), row["id"]


def test_a_query_is_never_its_own_positive(rows_of: Callable[[str], Rows]) -> None:
    for row in rows_of("train"):
        if row["task_type"] in ("p2ps", "ps2ps"):
            assert row["user_query"].split("\n\n**")[0] not in row["positive_document"]


def test_bm25_equals_its_formula_term_by_term() -> None:
    documents = ["a cat sat", "a dog and a dog sat down", "birds fly", "the cat and the dog"]
    query = "dog dog cat fish"
    lengths = [len(words(document)) for document in documents]
    average = sum(lengths) / len(lengths)
    expected = []
    for document, length in zip(documents, lengths, strict=True):
        score = 0.0
        for term in words(query):
            holding = sum(term in words(other) for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            tf = words(document).count(term)
            score += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / average))
        expected.append(score)
    assert Bm25(documents).scores([query])[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_nearest_documents_of_other_labels_come_best_first() -> None:
    documents = ["red green blue", "red green", "red", "yellow"]
    found = nearest_others(["red green blue"], ["x"], documents, ["x", "y", "z", "y"], count=2)
    assert found == [[1, 2]]
