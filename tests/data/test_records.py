"""Rows that cannot be used: all refused at once, or dropped and counted; nothing else is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_support import ConfigMaker, make_source, write_jsonl

from pipeline.config import SourceConfig
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.data.sources.records import Record
from pipeline.errors import UserError

BAD = {
    5: '{"query": null, "positives": ["p"]}',
    17: '{"query": "q", "positives": ',
    18: '{"Query": "q", "positives": ["p"]}',
    40: '{"query": "q", "positives": ["p"], "negatives": [3]}',
    55: '{"query": "\\ud800", "positives": ["p"]}',
    56: "7",
    90: '{"query": "q", "positives": ["p"], "s": ["high"]}',
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A hundred lines, seven of them bad."""
    good = '{{"query": "question {0}", "positives": ["answer {0}"], "s": [0.5]}}'
    lines = [BAD.get(number, good.format(number)) for number in range(1, 101)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


def source_of(path: Path, **options: Any) -> SourceConfig:
    return make_source(path, columns={"scores": "s"}, **options)


@pytest.mark.parametrize("block_bytes", [2048, 10**6])
def test_all_bad_rows_of_a_source_are_refused_at_once(
    rows: Path, block_bytes: int, make_config: ConfigMaker
) -> None:
    for _ in range(2):  # the second time from what the first one left
        with pytest.raises(UserError) as caught:
            prepare(make_config(source_of(rows), block_bytes=block_bytes), num_workers=1)
        message = str(caught.value)
        assert "sources.set: 7 of 100 rows cannot be used" in message
        shown = [number for number in BAD if f"{rows}:{number}: " in message]
        assert shown == list(BAD)[:5] and "; and 2 more" in message
        assert "'query' is null" in message and "field 'query' is missing" in message
        assert "set sources.set.on_bad_row: drop" in message and "\n" not in message


def test_bad_rows_are_dropped_counted_and_listed_the_same_by_any_number_of_workers(
    rows: Path, make_config: ConfigMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_of(rows, on_bad_row="drop")
    folders = [
        prepare(make_config(source, name=f"d{n}", block_bytes=4096), num_workers=n) for n in (1, 3)
    ]
    for name in ("manifest.json", "dropped.jsonl", "report.md"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    dataset = Dataset.open(folders[0])
    (info,) = dataset.manifest.sources
    assert (info.rows, info.examples) == (100, 93)
    assert info.dropped == {"row: cannot be used": 7}
    lines = (folders[0] / "dropped.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["where"] for entry in entries] == [f"{rows}:{number}" for number in BAD]
    assert entries[0]["detail"].startswith("'query' is null")
    assert "row: cannot be used 7" in (folders[0] / "report.md").read_text()
    assert "7 cannot be used" in capsys.readouterr().out


def test_a_source_whose_first_rows_are_all_bad_is_refused_without_reading_on(
    tmp_path: Path, make_config: ConfigMaker
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": f"{k}", "p": "p"} for k in range(5000)])
    with pytest.raises(UserError) as caught:
        prepare(make_config(make_source(path), block_bytes=10**7), num_workers=1)
    assert "100 of 100 rows cannot be used" in str(caught.value)
    with pytest.raises(UserError) as dropped:
        prepare(make_config(make_source(path, on_bad_row="drop")), num_workers=1)
    assert "5000 of 5000 rows cannot be used" in str(dropped.value)
    assert "on_bad_row" not in str(dropped.value)
    assert f"{path}:1: field 'query' is missing | allowed: fields found: q, p" in str(caught.value)


def test_bad_rows_of_other_containers_are_found_and_dropped_too(
    tmp_path: Path, make_config: ConfigMaker
) -> None:
    table = tmp_path / "rows.csv"
    table.write_bytes(b"query,positives\nq,p\nq\n\xff,p\nr,p\n")
    columns = {"query": ["a", None, "b"], "positives": [["p"], ["p"], None]}
    typed = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), typed)
    for path, found in (
        (table, {f"{table}:3", f"{table}:4"}),
        (typed, {f"{typed}:2", f"{typed}:3"}),
    ):
        with pytest.raises(UserError, match=r"2 of .* rows cannot be used"):
            prepare(make_config(make_source(path), name="refused"), num_workers=1)
        source = make_source(path, on_bad_row="drop")
        folder = prepare(make_config(source, name=path.suffix[1:]), num_workers=1)
        lines = (folder / "dropped.jsonl").read_text().splitlines()
        assert {json.loads(line)["where"] for line in lines} == found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in mteb's layout with everything that the published ones have wrong."""
    path = tmp_path / "beir"
    (path / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{k}", "title": "T", "text": f"text {k}"} for k in range(6)]
    corpus += [{"_id": "d0", "text": "another text"}, {"_id": "d1", "title": "T", "text": "text 1"}]
    write_jsonl(path / "corpus.jsonl", corpus)
    queries = [{"_id": f"q{k}", "text": f"question {k}"} for k in range(5)]
    # q4 is not judged, and there twice.
    more = [{"_id": "q1", "text": "another question"}, {"_id": "q4", "text": "question 4"}]
    write_jsonl(path / "queries.jsonl", [*queries, *more])
    judged = ["q0\td0\t1", "q1\td1\t1", "q1\td2\t0", "q2\td2\t0", "q3\td3\t1", "gone\td4\t1"]
    text = "query-id\tcorpus-id\tscore\n" + "\n".join(judged) + "\n"
    (path / "qrels" / "train.tsv").write_text(text)
    return path


def test_what_does_not_fit_in_a_retrieval_folder_is_counted_and_listed(
    folder: Path, make_config: ConfigMaker
) -> None:
    dataset = Dataset.open(prepare(make_config(make_source(folder, "mteb")), num_workers=1))
    (info,) = dataset.manifest.sources
    assert info.examples == 3
    assert info.dropped == {
        "document: another text of the same id precedes it": 1,
        "judgement: query without text": 1,
        "query: another text of the same id precedes it": 1,
        "query: no positive left": 1,
    }
    assert info.warnings == ("1 queries have no judgement in the split 'train'",)
    lines = (dataset.folder / "dropped.jsonl").read_text().splitlines()
    found = {(e["where"].removeprefix(f"{folder}/"), e["text"]) for e in map(json.loads, lines)}
    assert found == {
        ("corpus.jsonl:7", "another text"),
        ("qrels/train.tsv:7", "gone"),
        ("queries.jsonl:6", "another question"),
        ("queries.jsonl:3", "question 2"),
    }


def test_judged_documents_that_the_corpus_lacks_are_refused_or_left_out(
    folder: Path, make_config: ConfigMaker
) -> None:
    qrels = folder / "qrels" / "train.tsv"
    qrels.write_text(qrels.read_text() + "q0\tx\t1\nq4\ty\t1\nq1\td3\tnan\n")
    with pytest.raises(UserError) as caught:
        prepare(make_config(make_source(folder, "mteb")), num_workers=1)
    message = str(caught.value)
    assert "3 rows cannot be used" in message and "train.tsv:10: no judgement" in message
    assert "train.tsv:8: judged document 'x' is not in the corpus" in message
    source = make_source(folder, "mteb", on_bad_row="drop")
    dataset = Dataset.open(prepare(make_config(source), num_workers=1))
    (info,) = dataset.manifest.sources
    assert info.examples == 3
    assert info.dropped["judgement: document not in the corpus"] == 2
    assert info.dropped["row: cannot be used"] == 1
    assert info.dropped["query: no positive left"] == 3


def test_lines_of_a_file_that_was_written_again_are_counted_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for above, lines in (("[]\n\n", 2), ("\n\n\n\n", 4)):
        path.write_text(f"{above}{{}}\n")
        record = Record(value={}, file=str(path), number=1, base=4)
        assert record.where == f"{path}:{lines + 1}"


def test_half_characters_in_a_retrieval_folder_are_named_or_dropped(
    folder: Path, make_config: ConfigMaker
) -> None:
    """JSON can hold half a surrogate pair; in ids and texts of a corpus as in rows."""
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "x", "text": "\\ud83d"}\n{"_id": "\\ud83d", "text": "y"}\n')
    with (folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q3", "text": "\\ud83d"}\n{"_id": "\\ud83d", "text": "z"}\n')
    with pytest.raises(UserError, match="half a surrogate pair") as caught:
        prepare(make_config(make_source(folder, "mteb")), num_workers=1)
    assert "corpus.jsonl:9: " in str(caught.value) and "corpus.jsonl:10: " in str(caught.value)
    source = make_source(folder, "mteb", on_bad_row="drop")
    (info,) = Dataset.open(prepare(make_config(source), num_workers=1)).manifest.sources
    assert info.examples == 3
    assert info.dropped["row: cannot be used"] == 3
    assert info.dropped["query: another text of the same id precedes it"] == 2


HUB_LAYOUTS = {
    "qrels": "qrels/{}-00000-of-00001.parquet",
    "default": "default/{}-00000-of-00001.parquet",
    "data": "data/{}-00000-of-00001.parquet",
    "a folder": "qrels/{}/part.parquet",
}


@pytest.mark.parametrize("layout", HUB_LAYOUTS)
def test_layouts_of_the_hub_are_read(layout: str, tmp_path: Path, make_config: ConfigMaker) -> None:
    def write(name: str, records: list[dict[str, Any]]) -> None:
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(records), path)

    ids = [str(k) for k in range(6)]
    for number in range(2):
        part = [{"_id": k, "title": "", "text": f"river {k}"} for k in ids[number::2]]
        write(f"corpus/corpus-0000{number}-of-00002.parquet", part)
    write("queries/queries-00000-of-00001.parquet", [{"_id": k, "text": f"fox {k}"} for k in ids])
    for split, judged in (("train", ids[:4]), ("test", ids[4:])):
        records = [{"query-id": k, "corpus-id": k, "score": 1} for k in judged]
        write(HUB_LAYOUTS[layout].format(split), records)
    path = tmp_path / "set"
    for split, count in ((None, 4), ("test", 2)):
        source = make_source(path, "mteb", split=split)
        folder = prepare(make_config(source, name=f"{split}"), num_workers=1)
        assert Dataset.open(folder).num_examples == count
    with pytest.raises(UserError, match="there are judgements of test, train"):
        prepare(make_config(make_source(path, "mteb", split="dev")), num_workers=1)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("column", ["negatives", "instruction", "concept"])
def test_a_column_whose_field_is_in_no_row_is_refused(
    column: str, suffix: str, tmp_path: Path, make_config: ConfigMaker
) -> None:
    """Rows may lack these fields, so that a misspelt name would otherwise read nothing."""
    rows = [{"query": f"q{k}", "positives": f"p{k}", "neg": "n", "tell": "t"} for k in range(300)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "csv":
        lines = ["query,positives,neg,tell", *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    else:
        write_jsonl(path, rows)
    for name in ("telll", "neg_*"):
        source = make_source(path, columns={column: name})
        with pytest.raises(UserError) as caught:
            prepare(make_config(source, block_bytes=2048), num_workers=1)
        assert f"sources.set.columns.{column}: no row has the field {name!r}" in str(caught.value)
        assert "fields found: query, positives, neg, tell" in str(caught.value)
    prepare(make_config(make_source(path, columns={column: "tell"})), num_workers=1)


def test_a_row_may_lack_a_column_that_others_have(tmp_path: Path, make_config: ConfigMaker) -> None:
    """The last of 300 lines has what the others lack, in another block."""
    rows: list[dict[str, str]] = [{"query": f"q{k}", "positives": f"p{k}"} for k in range(300)]
    rows[-1] |= {"neg": "n", "tell": "t"}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    columns = {"negatives": "neg", "instruction": "tell", "concept": "tell"}
    config = make_config(make_source(path, columns=columns), block_bytes=2048)
    dataset = Dataset.open(prepare(config, num_workers=1))
    assert dataset.num_examples == 300 and not dataset.manifest.sources[0].dropped
    lengths = dataset.examples.lengths("negatives", np.arange(300))
    assert lengths.sum() == 1
