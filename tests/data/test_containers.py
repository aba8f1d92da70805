"""Files as people have them: compressed, delimited, typed, split, linked, and of the wrong kind."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_support import make_source, rows_of, write_jsonl

from pipeline.config import DecontaminateConfig, EvaluationSetConfig, SourceConfig
from pipeline.data.prepare.contamination import build_index
from pipeline.data.sources import source_note
from pipeline.errors import UserError

PAIRS = [
    {"query": f"question {k}", "positives": [f"answer {k}"], "negatives": [f"reply {k}"]}
    for k in range(30)
]
QUERIES = [pair["query"] for pair in PAIRS]
TEXT = "".join(json.dumps(pair) + "\n" for pair in PAIRS).encode()
TRIPLET = {"query": "anchor", "positives": "positive", "negatives": "negative"}


def queries_of(source: SourceConfig, block_bytes: int = 10**9) -> list[str]:
    return [row.query for row in rows_of(source, block_bytes=block_bytes)]


def refused(source: SourceConfig) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_are_read_whole_or_refused(suffix: str, tmp_path: Path) -> None:
    pack = PACKERS[suffix]
    half = len(TEXT) // 2
    path = tmp_path / f"rows.jsonl.{suffix}"
    # Several frames or members, as programs that append or work in parallel write them.
    for data in (pack(TEXT), pack(TEXT[:half]) + pack(TEXT[half:])):
        path.write_bytes(data)
        assert queries_of(make_source(path)) == QUERIES
    whole = pack(TEXT)
    for data in (whole[: len(whole) * 6 // 10], whole[:-3], b"\xff" + whole[1:], TEXT):
        path.write_bytes(data)
        assert str(path) in refused(make_source(path))


@pytest.mark.parametrize("suffix", ["csv.zst", "tsv.gz", "txt.zst", "ndjson"])
def test_other_kinds_are_read_packed_and_under_other_names(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    text = {"csv": b"anchor,positive\nq,p\n", "tsv": b"anchor\tpositive\nq\tp\n", "txt": b"q\n"}
    data = text.get(suffix.split(".")[0], b'{"anchor": "q", "positive": "p"}\n')
    path.write_bytes(PACKERS.get(suffix.split(".")[-1], bytes)(data))
    if suffix.startswith("txt"):
        (row,) = rows_of(make_source(path, "lines"))
    else:
        columns = {"query": "anchor", "positives": "positive"}
        (row,) = rows_of(make_source(path, columns=columns))
        assert row.positives == ("p",)
    assert row.query == "q"


def test_the_last_ending_says_what_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "corpus.json.txt"
    path.write_text("a first line\nanother\n")
    assert queries_of(make_source(path, "lines")) == ["a first line", "another"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n "])
@pytest.mark.parametrize("suffix", ["json", "json.gz", "json.zst"])
def test_a_json_list_gives_a_row_per_object(
    indent: int | None, start: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{suffix}"
    text = (start + json.dumps(PAIRS, indent=indent)).encode()
    path.write_bytes(PACKERS.get(suffix.split(".")[-1], bytes)(text))
    assert queries_of(make_source(path), block_bytes=64) == QUERIES
    assert queries_of(make_source(path, max_rows=7)) == QUERIES[:7]


def test_a_bad_json_list_is_named_by_file_and_entry(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([PAIRS[0], ["q", "p"], PAIRS[1]]))
    assert f"{path}:2: a JSON list" in refused(make_source(path))
    for text in (json.dumps(PAIRS)[:-9], "[\n" + TEXT.decode(), "[" * 100_000):
        path.write_text(text)
        assert f"{path}: not JSON" in refused(make_source(path))
    path.write_bytes(b'[{"query": "\xff"}]')
    assert "not JSON ('utf-8' codec" in refused(make_source(path))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("block_bytes", [1, 70, 10**9])
def test_a_table_of_text_is_read_as_the_csv_module_wrote_it(
    delimiter: str, end: str, block_bytes: int, tmp_path: Path
) -> None:
    rows = [
        [f"q {k}, of; many", f'an "answer" {k}\nin two lines\n\nor four', "" if k % 3 else "no"]
        for k in range(20)
    ]
    path = tmp_path / ("rows.tsv" if delimiter == "\t" else "rows.csv")
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
        writer.writerows([["anchor", "positive", "negative"], *rows])
    found = rows_of(make_source(path, columns=TRIPLET), block_bytes=block_bytes)
    # An empty cell is no negative.
    expected = [row if row[2] else row[:2] for row in rows]
    assert [[row.query, *row.positives, *row.negatives] for row in found] == expected
    capped = rows_of(make_source(path, columns=TRIPLET, max_rows=7), block_bytes=block_bytes)
    assert capped == found[:7]


@pytest.mark.parametrize(
    "text", [f"query;positives;{'x' * 200_000}\nq;p;\n", "\n\r\nquery;positives\n\nq;p\n"]
)
def test_a_header_may_be_long_or_follow_blank_lines(text: str, tmp_path: Path) -> None:
    csv.field_size_limit(131_072)  # the library's own, which other tests have raised
    path = tmp_path / "rows.csv"
    path.write_text(text, newline="")
    for block_bytes in (1, 10**6):
        (row,) = rows_of(make_source(path), block_bytes=block_bytes)
        assert (row.query, row.positives) == ("q", ("p",))


@pytest.mark.parametrize("block_bytes", [1, 9, 40, 10**6])
def test_blank_lines_between_blocks_of_a_table_repeat_no_record(
    block_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    rows = "".join(f"q{k},p\n" + "\r\n" * (k % 4) for k in range(40))
    path.write_text(f"query,positives\n{rows}", newline="")
    found = [row.query for row in rows_of(make_source(path), block_bytes=block_bytes)]
    assert found == [f"q{k}" for k in range(40)]


def test_numbers_of_a_table_of_text_are_read_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("q;d;label\nwhat;this;1\nwho;that;0.0\nhow;so;high\n")
    columns = {"query": "q", "documents": "d", "labels": "label"}
    with pytest.raises(UserError, match=r"rows.csv:4: 'label' is high"):
        rows_of(make_source(path, columns=columns))
    first, second = rows_of(make_source(path, columns=columns, max_rows=2))
    assert (first.positives, second.negatives) == (("this",), ("that",))


TABLES = {
    "fields": (b"query,positives\nq,p,r\n", "rows.csv:2: 3 fields, the header has 2"),
    "an open quote": (
        b'query,positives\nq,p\n"a,b\nc,d\n',
        "rows.csv:3: a quoted field",
    ),
    "a quote within a cell": (
        b'query,positives\n"I have,a\nq,p\nr,"p" s\nt,u\n',
        """not a line of a table (',' expected after '"', in a record of 3 lines)""",
    ),
    "ends of lines of an old Mac": (
        b"query,positives\rq,p\r",
        "rows.csv:1: not a line of a table (a carriage return outside of quotes) | fix: quote",
    ),
    "a carriage return in a cell": (
        b"query,positives\nq,p\rr\n",
        "rows.csv:2: not a line of a table (a carriage return outside of quotes) | fix: quote",
    ),
    "text after a quote": (b'query,positives\n"a"b,c\n', "rows.csv:2: not a line of a table"),
    "Latin-1": (b"query,positives\nq,p\nq,\xe9\n", "rows.csv:3: byte 3"),
    "a column twice": (b"query,query\nq,p\n", "rows.csv:1: a column twice: query"),
    "other names": (b"anchor,positive\nq,p\n", "fields found: anchor, positive"),
    "only a header": (b"query,positives\n", "holds no rows"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_bad_table_of_text_is_named_by_file_and_line(kind: str, tmp_path: Path) -> None:
    content, said = TABLES[kind]
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    assert said in refused(make_source(path))


def invalid_text(values: list[bytes]) -> pa.Array:
    offsets = pa.array([0, *map(len, values)], pa.int32())
    ends = pa.compute.cumulative_sum(offsets).buffers()[1]
    return pa.StringArray.from_buffers(len(values), ends, pa.py_buffer(b"".join(values)))


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "stream.arrow"])
def test_a_column_nobody_asks_for_is_never_converted(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    table = pa.table(
        {
            "anchor": ["fox", "river"],
            "positive": [["a"], ["b"]],
            "raw": invalid_text([b"R\xc9UNION", b"fine"]),
            "day": pa.array([2**40, 0], pa.int64()).cast(pa.timestamp("s")),
            "zone": pa.array([0, 0], pa.timestamp("ns", "America/Nowhere")),
        }
    )
    if suffix == "parquet":
        pq.write_table(table, path, row_group_size=1)
    else:
        make = pa.ipc.new_file if suffix == "arrow" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table)
    columns = {"query": "anchor", "positives": "positive"}
    assert queries_of(make_source(path, columns=columns)) == ["fox", "river"]
    for column, said in {"raw": "byte 2 of it is not UTF-8", "day": "cannot be read"}.items():
        message = refused(make_source(path, columns={**columns, "query": column}))
        assert f"{path}:1: {column!r} cannot be read" in message and said in message
    message = refused(make_source(path, columns={**columns, "query": "zone"}))
    assert "'zone' cannot be read (its time zone is unknown on this machine)" in message


def test_a_parquet_column_that_cannot_be_decoded_fails_only_where_it_is_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.parquet"
    # A category whose text is not UTF-8 fails as the file is decoded, before any cell is asked for.
    codes = pa.array([0] * 1500 + [1] * 1500, pa.int16())
    kinds = pa.DictionaryArray.from_arrays(codes, invalid_text([b"fine", b"R\xc9UNION"]))
    anchors = [f"fox {k}" for k in range(3000)]
    table = pa.table({"kind": kinds, "anchor": anchors, "positive": [f"river {k}" for k in codes]})
    pq.write_table(table, path, row_group_size=2000)
    columns = {"query": "anchor", "positives": "positive"}
    assert queries_of(make_source(path, columns=columns)) == anchors
    assert queries_of(make_source(path, columns=columns), block_bytes=9000) == anchors
    message = refused(make_source(path, columns={**columns, "query": "kind"}))
    assert f"{path}: damaged Parquet file (column 'kind'" in message


def save(folder: Path) -> Path:
    """A DatasetDict as `save_to_disk` writes it, and its train part alone."""
    whole = datasets.Dataset.from_list(PAIRS)
    parts = {"train": whole.select(range(20)), "test": whole.select(range(20, 30))}
    datasets.DatasetDict(parts).save_to_disk(str(folder / "dict"))
    whole.save_to_disk(str(folder / "one"))
    return folder


def test_what_save_to_disk_wrote_is_read_from_its_folder_and_splits_are_honoured(
    tmp_path: Path,
) -> None:
    save(tmp_path)
    for head in ("", "hub:"):
        assert queries_of(make_source(f"{head}{tmp_path}/one")) == QUERIES
        assert queries_of(make_source(f"{head}{tmp_path}/dict")) == QUERIES[:20]
        assert queries_of(make_source(f"{head}{tmp_path}/dict", split="test")) == QUERIES[20:]
        assert queries_of(make_source(f"{head}{tmp_path}/dict/test")) == QUERIES[20:]
        assert "the split 'test'" in refused(make_source(f"{head}{tmp_path}/one", split="test"))
        said = refused(make_source(f"{head}{tmp_path}/dict", split="validation"))
        assert "the splits found: train, test" in said
    arrow = next((tmp_path / "one").glob("*.arrow"))
    assert queries_of(make_source(arrow)) == QUERIES


# Files of a folder, and the split that each holds.
LAYOUTS = {
    "clone of the hub": {
        "train": ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"),
        "test": ("data/test-00000-of-00001.jsonl",),
    },
    "files": {"train": ("train.jsonl",), "validation": ("dev.jsonl",), "test": ("test.jsonl",)},
    "prefixes": {"train": ("set.train.1.jsonl", "set_train_2.jsonl"), "test": ("set-eval.jsonl",)},
    "folders": {"train": ("train/a.jsonl", "train/b.jsonl"), "validation": ("val/a.jsonl",)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_is_known_by_the_names_of_files_and_folders(layout: str, tmp_path: Path) -> None:
    for split, files in LAYOUTS[layout].items():
        for number, file in enumerate(files):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(tmp_path / file, [{"query": f"{split} {number}", "positives": "p"}])
    splits = {
        split: [f"{split} {k}" for k in range(len(f))] for split, f in LAYOUTS[layout].items()
    }
    source = make_source(tmp_path)
    assert queries_of(source) == splits["train"]
    left = sorted(split for split in splits if split != "train")
    assert f"left out ({', '.join(left)})" in source_note(source)
    for split, expected in splits.items():
        assert queries_of(make_source(tmp_path, split=split)) == expected
        assert source_note(make_source(tmp_path, split=split)) == ""
    said = refused(make_source(tmp_path, split="unknown"))
    assert f"the splits found: {', '.join(sorted(splits))}" in said
    one = LAYOUTS[layout][left[0]][0]
    assert queries_of(make_source(tmp_path / one)) == [f"{left[0]} 0"]


def test_a_glob_takes_its_train_files_and_a_file_by_itself_is_taken(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "other.jsonl"):
        write_jsonl(tmp_path / name, [{"query": name, "positives": "p"}])
    assert queries_of(make_source(tmp_path / "*.jsonl")) == ["train.jsonl"]
    assert queries_of(make_source(tmp_path / "[ot]*.jsonl", split="test")) == ["test.jsonl"]
    assert queries_of(make_source(tmp_path / "test.jsonl")) == ["test.jsonl"]
    (tmp_path / "train.jsonl").unlink()
    assert queries_of(make_source(tmp_path)) == ["other.jsonl"]
    (tmp_path / "other.jsonl").unlink()
    assert "the splits found: test" in refused(make_source(tmp_path))


def test_a_readme_of_the_hub_says_which_files_a_split_has(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"query": name, "positives": "p"}])
    config = "- config_name: {}\n  data_files:\n  - split: train\n    path: [a.*, b.jsonl]\n"
    config += "  - {{split: test, path: c.jsonl}}\n"
    readme = tmp_path / "README.md"
    readme.write_text(f"---\nconfigs:\n{config.format('pairs')}---\n# Pairs\n")
    assert queries_of(make_source(tmp_path)) == ["a", "b"]
    assert "left out: test" in source_note(make_source(tmp_path))
    assert queries_of(make_source(tmp_path, split="test")) == ["c"]
    assert source_note(make_source(tmp_path, split="test")) == ""
    assert "the splits found: train, test" in refused(make_source(tmp_path, split="dev"))
    readme.write_text(f"---\nconfigs:\n{config.format('pairs')}{config.format('more')}---\n")
    assert f"choose one: hub:{tmp_path}:pairs" in refused(make_source(tmp_path))


def test_an_evaluation_set_is_read_from_the_test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"a text of {name}"}])
    rule = DecontaminateConfig(sets=(EvaluationSetConfig(name="mine", path=str(tmp_path)),))
    build_index(rule, tmp_path / "index")
    index = json.loads((tmp_path / "index" / "index.json").read_text())
    assert index["queries"] == [[0, "a text of test"]]


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to nothing": (link_to_nothing, "a symbolic link to"),
    "a link to itself": (link_to_itself, "a symbolic link to"),
    "a pipe": (os.mkfifo, "a pipe, socket or device"),
    "a pointer of git-lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "a pointer of git-lfs",
    ),
    "a locked file": (lambda path: (path.write_bytes(TEXT), path.chmod(0)), "may not read it"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_files_that_cannot_be_read_are_refused_before_they_are_opened(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, said = SPECIAL[kind]
    write_jsonl(tmp_path / "a.jsonl", PAIRS)
    make(tmp_path / "b.jsonl")
    if kind == "a locked file" and os.access(tmp_path / "b.jsonl", os.R_OK):  # as root
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "b.jsonl")
    for path in (tmp_path, tmp_path / "b.jsonl", tmp_path / "*.jsonl"):
        message = refused(make_source(path))
        assert str(tmp_path / "b.jsonl") in message and said in message, path


EMPTY: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(b""),
    "rows.csv": lambda path: path.write_bytes(b""),
    "rows.txt": lambda path: path.write_bytes(b""),
    "rows.parquet": lambda path: pq.write_table(pa.table({"query": pa.array([], "string")}), path),
    "saved": lambda path: datasets.Dataset.from_dict({"query": []}).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_source_without_rows_is_refused(name: str, tmp_path: Path) -> None:
    EMPTY[name](tmp_path / name)
    assert f"sources.set: {tmp_path / name} holds no rows" in refused(make_source(tmp_path / name))


def test_the_message_lists_every_kind_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "rows.xlsx", tmp_path / "nothing.jsonl"):
        message = refused(make_source(path))
        for kind in (".jsonl", ".csv", ".tsv", ".zst", ".parquet", ".arrow", "hub:OWNER/NAME"):
            assert kind in message
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "more" / "rows.jsonl", PAIRS)
    assert "name one of its folders with data files: more" in refused(make_source(tmp_path))


@pytest.mark.parametrize("path", ["", "*.jsonl", "f*.jsonl"])
def test_a_file_whose_name_is_not_utf8_is_refused(path: str, tmp_path: Path) -> None:
    """As archives of Latin-1 systems leave them."""
    (tmp_path / os.fsdecode(b"f\xfcr.jsonl")).write_bytes(TEXT)
    said = refused(make_source(tmp_path / path))
    assert "a name that is not UTF-8 | fix: rename" in said
    said.encode()
