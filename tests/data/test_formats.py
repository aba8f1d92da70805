"""Rows as other trainers write them: n-tuples, labelled lists, lists of scores, chats."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_support import make_source, rows_of, write_jsonl

from pipeline.config import PrepareConfig, load_config
from pipeline.data.sources.records import Row
from pipeline.errors import UserError

GOOD = {"query": "q", "positives": ["p"], "negatives": ["n"]}
FLAG = {"query": "query", "positives": "pos", "negatives": "neg"}


def row_of(record: dict[str, Any], folder: Path, **columns: Any) -> Row:
    """The row of a record, the same from JSON lines and, where it has types for it, Parquet."""
    path = write_jsonl(folder / "rows.jsonl", [record])
    (row,) = rows_of(make_source(path, columns=columns))
    table = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([record]), table)
    assert rows_of(make_source(table, columns=columns)) == [row]
    return row


@pytest.mark.parametrize(
    "names", ["negative_*", ("negative_1", "negative_2", "negative_10"), ("negative_?", "*_10")]
)
def test_n_tuples_are_joined_in_the_order_of_their_numbers(names: Any, tmp_path: Path) -> None:
    record = {"anchor": "q", "positive": "p", "negative_10": "c", "negative_2": None}
    record["negative_1"] = "a"
    row = row_of(record, tmp_path, query="anchor", positives="positive", negatives=names)
    assert row.negatives == ("a", "c")
    record |= {"positive_1": "x", "positive_2": None}
    row = row_of(record, tmp_path, query="anchor", positives="positive_*", negatives=names)
    assert row.positives == ("x",)


def test_a_negative_may_be_null_also_where_its_column_is_named(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"query": "q", "positives": "p", "negative": text} for text in ("n", None)],
    )
    first, second = rows_of(make_source(path, columns={"negatives": "negative"}))
    assert (first.negatives, second.negatives) == (("n",), ())


def test_a_row_without_an_instruction_has_that_of_its_source(tmp_path: Path) -> None:
    rows = [{"tell": "own"}, {"tell": None}, {"tell": ""}, {}]
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"query": "q", "positives": "p", **row} for row in rows]
    )
    source = make_source(path, columns={"instruction": "tell"}, instruction="common")
    assert [row.instruction for row in rows_of(source)] == ["own", "common", "common", "common"]


def test_labels_divide_documents_into_positives_and_negatives(tmp_path: Path) -> None:
    record = {"query": "q", "docs": ["a", "b", "c", "d"], "labels": [0, 1, 0, 2], "s": [1, 2, 3, 4]}
    row = row_of(record, tmp_path, documents="docs", labels="labels", scores="s")
    assert (row.positives, row.negatives) == (("b", "d"), ("a", "c"))
    assert row.scores == (2, 4, 1, 3)
    for label, positive in ((True, True), (0.5, True), (False, False), (-1, False)):
        row = row_of({"query": "q", "doc": "a", "label": label}, tmp_path,
                     documents="doc", labels="label")  # fmt: skip
        assert bool(row.positives) == positive == (not row.negatives)


def test_scores_may_stand_in_two_lists(tmp_path: Path) -> None:
    record = {"query": "q", "pos": ["p"], "neg": ["n", "m"], "pos_scores": [0.9]}
    record["neg_scores"] = [0.25, 0]
    scores = ("pos_scores", "neg_scores")
    row = row_of(record, tmp_path, **FLAG, scores=scores)
    assert row.scores == (0.9, 0.25, 0)
    row = row_of({**record, "neg": None, "neg_scores": None}, tmp_path, **FLAG, scores=scores)
    assert row.scores == (0.9,)
    # As many as documents in all, but not on the right sides.
    record |= {"pos_scores": [0.9, 0.25], "neg_scores": [0]}
    with pytest.raises(UserError, match=r"2 scores in 'pos_scores' \| allowed: 1"):
        row_of(record, tmp_path, **FLAG, scores=scores)
    one = {"query": "q", "pos": "p", "score": 0.5}
    assert row_of(one, tmp_path, query="query", positives="pos", scores="score").scores == (0.5,)


BAD_SCORES = {
    "null": ("[null, 1]", "entry 1 of 's' is null"),
    "NaN": ("[1, NaN]", "entry 2 of 's' is nan"),
    "Infinity": ("[-Infinity, 1]", "entry 1 of 's' is -inf"),
    "too large for float32": ("[1e39, 1]", "entry 1 of 's' is 1e+39"),
    "too small for float32": ("[-3.5e38, 1]", "entry 1 of 's' is -3.5e+38"),
    "a huge integer": (f"[1{'0' * 400}, 1]", "entry 1 of 's' is 1000"),
    "a text": ('["0.9", 1]', "entry 1 of 's' is a str"),
    "true": ("[true, 1]", "entry 1 of 's' is true"),
    "a list": ("[[1], 1]", "entry 1 of 's' is a list"),
    "an object": ('[{"score": 1}, 1]', "entry 1 of 's' is a dict"),
}


@pytest.mark.parametrize("kind", BAD_SCORES)
def test_a_bad_score_is_named_by_row_and_entry(kind: str, tmp_path: Path) -> None:
    scores, said = BAD_SCORES[kind]
    path = tmp_path / "rows.jsonl"
    line = json.dumps(GOOD)[:-1]
    path.write_text(f'{line}, "s": [1, 2]}}\n{line}, "s": {scores}}}\n')
    with pytest.raises(UserError) as caught:
        rows_of(make_source(path, columns={"scores": "s"}))
    assert f"{path}:2: {said}" in str(caught.value) and len(str(caught.value)) < 400


def test_the_largest_scores_and_decimals_are_kept(tmp_path: Path) -> None:
    limit = 3.4028234663852886e38
    record = {**GOOD, "s": [limit, -limit]}
    assert row_of(record, tmp_path, scores="s").scores == (limit, -limit)
    path = tmp_path / "decimal.parquet"
    pq.write_table(pa.Table.from_pylist([{**GOOD, "s": [Decimal("0.5"), Decimal(2)]}]), path)
    (row,) = rows_of(make_source(path, columns={"scores": "s"}))
    assert row.scores == (0.5, 2.0)


def message(text: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": text}


def test_chats_are_read_as_the_contents_of_their_messages(tmp_path: Path) -> None:
    record = {
        "messages": [message("Be brief.", "system"), message("q")],
        "positive_messages": [[message("p")]],
        "negative_messages": [[message("n")], [message("m"), message("o", "assistant")]],
    }
    columns = {"query": "messages", "positives": "positive_messages"}
    row = row_of(record, tmp_path, **columns, negatives="negative_messages")
    assert (row.query, row.positives) == ("Be brief.\nq", ("p",))
    assert row.negatives == ("n", "m\no")
    # One chat instead of a list of them, contents in parts, and a text instead of a chat.
    record = {
        "messages": [message([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
        "positive_messages": [message("p")],
        "negative_messages": ["n"],
    }
    path = write_jsonl(tmp_path / "rows.jsonl", [record])
    (row,) = rows_of(make_source(path, columns={**columns, "negatives": "negative_messages"}))
    assert (row.query, row.positives, row.negatives) == ("a\nb", ("p",), ("n",))
    for content in (None, [{"type": "image", "url": "x"}], 7):
        record["messages"] = [message(content)]
        write_jsonl(path, [record])
        with pytest.raises(UserError, match=r"rows\.jsonl:1: 'messages': a message whose content"):
            rows_of(make_source(path, columns=columns))


def test_paths_reach_into_lists_by_key_and_by_number(tmp_path: Path) -> None:
    record = {
        "messages": [message("Be brief.", "system"), message("q")],
        "found": [
            {"text": "p", "score": 2},
            {"text": "n", "score": 0.5},
            {"text": "m", "score": 0},
        ],
        "one": [{"text": "q"}],
        "rows": [["a"], ["b"]],
        "none": [],
    }
    row = row_of(record, tmp_path, query="messages.1.content", positives="found.0.text")
    assert (row.query, row.positives) == ("q", ("p",))
    row = row_of(
        record,
        tmp_path,
        query="messages.-1.content",
        documents="found.text",
        labels="found.score",
    )
    assert (row.positives, row.negatives) == (("p", "n"), ("m",))
    columns = {"query": "one.text", "positives": "rows.1", "negatives": "none.text"}
    row = row_of(record, tmp_path, **columns)
    assert (row.query, row.positives, row.negatives) == ("q", ("b",), ())

    path = write_jsonl(tmp_path / "rows.jsonl", [record])
    for query, words in (
        ("messages.content", "'messages.content' is a list"),
        ("messages.2.content", "field 'messages.2.content' is missing"),
        ("messages.name", "field 'messages.name' is missing"),
        ("rows.name", "field 'rows.name' is missing"),
        ("rows", "'rows' is a list"),
    ):
        with pytest.raises(UserError, match=rf"rows\.jsonl:1: {words}"):
            rows_of(make_source(path, columns={"query": query, "positives": "rows.0"}))
    assert not rows_of(make_source(path, columns=columns, where={"found.text": "p"}))


def test_where_reaches_inside_fields_and_knows_booleans_and_numbers(tmp_path: Path) -> None:
    records = [
        {"query": f"{k}", "positives": "p", "meta": {"lang": "en" if k % 2 else "de"},
         "good": k < 3, "label": k, "a.b": f"{k}", "note": None,
         "share": float(k), "big": 2**60 + k}
        for k in range(6)
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "rows.jsonl", records)
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(records), table)
    expected: list[tuple[dict[str, Any], str]] = [
        ({"meta.lang": "en"}, "135"),
        ({"good": True}, "012"),
        ({"good": "true"}, "012"),
        ({"good": "False"}, "345"),
        ({"label": 4}, "4"),
        ({"label": "4"}, "4"),
        ({"label": 4.0}, "4"),
        # As pandas writes a column of whole numbers in which one is missing.
        ({"share": 4}, "4"),
        ({"share": 4.0}, "4"),
        ({"share": "4"}, ""),
        ({"big": 2**60 + 4}, "4"),
        ({"a.b": "5"}, "5"),
        ({"meta.lang": "en", "good": True}, "1"),
        ({"note": "None"}, ""),
        ({"nothing": "None"}, ""),
        ({"meta.lang.code": "en"}, ""),
    ]
    for where, found in expected:
        for file in (path, table):
            rows = rows_of(make_source(file, where=where))
            assert "".join(row.query for row in rows) == found, where


WRONG: dict[str, tuple[str, str]] = {
    "a list for the query": ("query: [a, b]", "columns.query"),
    "labels alone": ("labels: l", "documents with labels"),
    "documents and positives": ("documents: d, labels: l, positives: p", "documents with labels"),
    "an unknown one": ("negative: n", "allowed: query, positives, negatives"),
    "a number": ("negatives: 3", "columns.negatives"),
    "nothing": ("negatives: []", "columns.negatives"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_columns_that_cannot_be_meant_are_refused(kind: str, tmp_path: Path) -> None:
    columns, said = WRONG[kind]
    path = tmp_path / "data.yaml"
    head = "output_dir: x\ntokenizer: t\nsources:\n  - {name: a, path: b, format: "
    path.write_text(f"{head}columns, columns: {{{columns}}}}}\n")
    with pytest.raises(UserError) as caught:
        load_config(PrepareConfig, path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    path.write_text(f"{head}e5, columns: {{query: q}}}}\n")
    with pytest.raises(UserError, match="the format 'e5' knows its fields"):
        load_config(PrepareConfig, path)


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: no field matches 'positiv_\*'"):
        rows_of(make_source(path, columns={"positives": "positiv_*"}))
