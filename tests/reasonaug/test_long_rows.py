"""Rows with long documents hide each text once and share none of it with the replicas."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest

from pipeline.errors import UserError
from ReasonAug.concepts import CONCEPTS
from ReasonAug.long_rows import NOTES, long_rows, write_long_rows
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
    for concept in CONCEPTS:
        assert not concept.held_out or concept.name not in text
    for entry in entries:
        assert entry.split == TRAIN or entry.problem.statement not in text
    for word in ("passkey", "drawer", "Remember it"):
        assert word not in text
    size = Size(cap=256, divisor=4)
    needles = needle_configs(
        [entry for entry in entries if entry.split == UNSEEN_CONCEPTS], Random(0), size=size
    )["needle"]
    assert not {row["text"] for row in needles["queries"]} & {row["user_query"] for row in rows}


def test_topics_are_names_pairs_of_words_and_invented_words(entries: list[Entry]) -> None:
    topics = [
        row["instance"]
        for row in long_rows(entries, Random(3), count=300, max_tokens=64)
        if row["task_type"] == "long-note"
    ]
    names = {concept.name for concept in CONCEPTS}
    defined = {word for concept in CONCEPTS for word in re.findall("[a-z]+", concept.definition)}
    kinds = [
        "name" if topic in names else "words" if set(topic.split()) <= defined else "invented"
        for topic in topics
    ]
    assert kinds[:3] == ["name", "words", "invented"]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == dict.fromkeys(set(kinds), 50)


@pytest.mark.parametrize(
    ("num_rows", "max_tokens", "found"), [(1, 64, "--rows 1"), (2, 63, "--max-tokens 63")]
)
def test_sizes_out_of_range_are_refused(
    num_rows: int, max_tokens: int, found: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=found):
        write_long_rows(tmp_path, seed=0, num_rows=num_rows, max_tokens=max_tokens)


def test_the_same_seed_gives_the_same_rows(entries: list[Entry]) -> None:
    once, again = (
        list(long_rows(entries, Random(seed), count=4, max_tokens=128)) for seed in (3, 3)
    )
    assert once == again
