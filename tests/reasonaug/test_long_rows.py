"""Rows with long documents hide each text once and share none of it with the replicas."""

from __future__ import annotations

from random import Random

import pytest

from ReasonAug.concepts import CONCEPTS
from ReasonAug.long_rows import NOTES, long_rows
from ReasonAug.problem import num_tokens
from ReasonAug.replicas.longembed import Size, needle_configs
from ReasonAug.splits import TRAIN, UNSEEN_CONCEPTS, Entry, make_entries


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    return make_entries(seed=0, problems_per_concept=8, max_tokens=300)


def test_every_document_holds_once_what_its_query_asks_for(entries: list[Entry]) -> None:
    rows = list(long_rows(entries, Random(1), count=60, max_tokens=1024))
    worked = {e.problem.document(): e.problem for e in entries if e.split == TRAIN}
    asked = {e.problem.statement: e.problem.concept for e in entries if e.split == TRAIN}
    questions = {
        question.format(topic=row["instance"]): note.split("{number}")[0]
        for row in rows
        for note, question in NOTES
    }
    for row in rows:
        document = row["positive_document"]
        if row["task_type"] == "long-note":
            begin = questions[row["user_query"]].format(topic=row["instance"])
            assert document.count(begin) == 1
        else:
            hidden = [text for text in worked if text in document]
            assert [worked[text].concept for text in hidden] == [row["instance"]]
            assert asked[row["user_query"]] == row["instance"]
            assert row["user_query"] not in document
    lengths = sorted(num_tokens(row["positive_document"]) for row in rows)
    assert lengths[0] < 400
    assert 700 < lengths[-1] < 1400  # a hidden problem may be longer than the shortest length


def test_no_row_holds_text_of_the_replicas_beyond_the_background(entries: list[Entry]) -> None:
    rows = list(long_rows(entries, Random(2), count=60, max_tokens=512))
    text = " ".join(row["user_query"] + " " + row["positive_document"] for row in rows)
    for concept in (concept for concept in CONCEPTS if concept.held_out):
        assert concept.name not in text
    for word in ("passkey", "drawer", "Remember it"):
        assert word not in text
    unseen = [entry for entry in entries if entry.split == UNSEEN_CONCEPTS]
    needles = needle_configs(unseen, Random(0), size=Size(cap=256, divisor=4))["needle"]
    queries = {row["text"] for row in needles["queries"]}
    assert not queries & {row["user_query"] for row in rows}


def test_the_same_seed_gives_the_same_rows(entries: list[Entry]) -> None:
    once, again = (
        list(long_rows(entries, Random(seed), count=4, max_tokens=128)) for seed in (3, 3)
    )
    assert once == again
