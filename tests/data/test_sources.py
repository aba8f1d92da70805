"""Every published format, from small files in its own layout to rows."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from data_support import make_source, rows_of, write_jsonl

from pipeline.config import SourceConfig
from pipeline.data.sources import FORMATS, expand_sources
from pipeline.data.sources.corpus import References, read_judgements
from pipeline.data.sources.records import Row
from pipeline.errors import UserError
from tests import forks
from tests.support import PATIENCE

PAIRS = [{"query": f"question {k}", "positives": [f"answer {k}", f"reply {k}"]} for k in range(50)]


@pytest.mark.parametrize("block_bytes", [7, 64, 100, 1000, 10**6])
def test_blocks_of_any_size_give_every_line_once(tmp_path: Path, block_bytes: int) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    rows = rows_of(make_source(path, "columns"), block_bytes=block_bytes)
    assert [row.query for row in rows] == [pair["query"] for pair in PAIRS]


def test_every_container_gives_the_same_rows(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(PAIRS), table, row_group_size=8)
    split = tmp_path / "parts"
    split.mkdir()
    write_jsonl(split / "1.jsonl", PAIRS[:20])
    write_jsonl(split / "2.jsonl", PAIRS[20:])
    (split / "README.md").write_text("not data")
    expected = rows_of(make_source(plain, "columns"))
    for path in (packed, table, split, tmp_path / "parts" / "*.jsonl"):
        assert rows_of(make_source(path, "columns"), block_bytes=300) == expected


def test_a_saved_hub_dataset_is_read_without_a_network(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(PAIRS).save_to_disk(str(tmp_path / "saved"))
    source = SourceConfig(name="set", format="columns", path=f"hub:{tmp_path / 'saved'}")
    assert [row.query for row in rows_of(source)] == [pair["query"] for pair in PAIRS]


READ = """
import sys
from pipeline.config import SourceConfig
from pipeline.data.sources import plan_source, read_rows
source = SourceConfig(name="set", format="columns", path=sys.argv[1])
for block in plan_source(source, block_bytes=300):
    print(*(row.query for _, row in read_rows(source, block, None)), sep="\\n")
"""


def test_a_hub_dataset_is_read_from_its_cache_when_offline(tmp_path: Path) -> None:
    """The cache as `datasets` leaves it after a download; its switches are read at import."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    folder = tmp_path / "cache" / "owner___pairs" / "default" / "0.0.0" / ("a" * 40)
    folder.mkdir(parents=True)
    features = datasets.Dataset.from_list(PAIRS).features
    with ArrowWriter(path=str(folder / "pairs-train.arrow"), features=features) as writer:
        for pair in PAIRS:
            writer.write(pair)
        rows, size = writer.finalize()
    split = {"name": "train", "num_bytes": size, "num_examples": rows, "dataset_name": "pairs"}
    datasets.DatasetInfo(
        features=features,
        builder_name="json",
        dataset_name="pairs",
        config_name="default",
        version="0.0.0",
        splits=[split],
    ).write_to_directory(str(folder))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    words = ["-c", READ, "hub:owner/pairs"]
    done = forks.run(words, folder=tmp_path, environment=offline, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [pair["query"] for pair in PAIRS]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_any_fsspec_address_is_read_like_a_file(tmp_path: Path, suffix: str) -> None:
    local = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    if suffix == "jsonl.gz":
        content = gzip.compress(local.read_bytes())
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "rows.parquet")
        content = (tmp_path / "rows.parquet").read_bytes()
    else:
        content = local.read_bytes()
    address = f"memory://{tmp_path.name}/rows.{suffix}"
    with fsspec.open(address, "wb") as handle:
        handle.write(content)
    source = SourceConfig(name="set", format="columns", path=address)
    assert rows_of(source, block_bytes=300) == rows_of(make_source(local, "columns"))


class FileServer(http.server.SimpleHTTPRequestHandler):
    """Files of a folder by ranges; the first folder of an address says how it misbehaves."""

    def do_GET(self) -> None:
        _, manner, name = self.path.split("/", 2)
        content = (Path(self.directory) / name).read_bytes()
        if manner in ("403", "404", "500"):
            self.send_error(int(manner))
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, len(content)
        ranges = manner not in ("whole", "no-size")
        if wanted and ranges:
            first = int(wanted[1])
            last = min(int(wanted[2] or last) + 1, last)
        part = content[first:last]
        self.send_response(206 if len(part) < len(content) else 200)
        if manner != "no-size":
            self.send_header("Content-Length", str(len(part)))
        if ranges:
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part[: len(part) // 2] if manner == "cut" else part)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of `tmp_path` on a server."""
    handler = functools.partial(FileServer, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "jsonl.gz", "jsonl.zst", "parquet", "arrow"])
def test_a_file_on_a_server_is_read_like_a_local_one(
    tmp_path: Path, address: str, suffix: str
) -> None:
    table = pa.Table.from_pylist(PAIRS)
    write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    plain = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(plain))
    with pa.CompressedOutputStream(tmp_path / "rows.jsonl.zst", "zstd") as packed:
        packed.write(plain)
    lines = [f"{pair['query']},{pair['positives'][0]}\n" for pair in PAIRS]
    (tmp_path / "rows.csv").write_text("".join(["query,positives\n", *lines]))
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=8)
    pyarrow.feather.write_feather(table, tmp_path / "rows.arrow")

    local = make_source(tmp_path / f"rows.{suffix}", "columns")
    remote = SourceConfig(name="set", format="columns", path=f"{address}/fine/rows.{suffix}")
    assert rows_of(remote, block_bytes=300) == rows_of(local)
    assert len(rows_of(remote)) == len(PAIRS)


@pytest.mark.parametrize(
    ("manner", "words"),
    [
        ("404", "no such file"),
        ("403", "Forbidden"),
        ("500", "Internal Server Error"),
        ("cut", "cannot be read"),
        ("whole", "range"),
        ("no-size", "does not tell its size"),
    ],
)
def test_a_server_that_fails_is_named_with_a_cure(
    tmp_path: Path, address: str, manner: str, words: str
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    path = f"{address}/{manner}/rows.jsonl"
    source = SourceConfig(name="set", format="columns", path=path)
    with pytest.raises(UserError, match=words) as caught:
        rows_of(source, block_bytes=300)
    assert path in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["http://127.0.0.1:1/rows.jsonl", "ftp://127.0.0.1:1/rows.jsonl"])
def test_a_server_that_is_not_there_is_named_with_a_cure(path: str) -> None:
    with pytest.raises(
        UserError, match=r"sources\.set\.path: .*rows.jsonl: cannot be read .*fix: "
    ):
        rows_of(SourceConfig(name="set", format="columns", path=path))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("max_rows", [1, 9, 49, 80])
def test_a_cap_takes_the_first_rows(tmp_path: Path, suffix: str, max_rows: int) -> None:
    path = tmp_path / f"rows.{suffix}"
    text = "".join(json.dumps(pair) + "\n\n" for pair in PAIRS)
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(PAIRS), path, row_group_size=8)
    else:
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    rows = rows_of(make_source(path, "columns", max_rows=max_rows), block_bytes=200)
    assert [row.query for row in rows] == [pair["query"] for pair in PAIRS[:max_rows]]


def test_a_cap_counts_over_the_files_of_a_folder(tmp_path: Path) -> None:
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", PAIRS[number * 10 : number * 10 + 10])
    rows = rows_of(make_source(tmp_path, "columns", max_rows=15))
    assert [row.query for row in rows] == [pair["query"] for pair in PAIRS[:15]]


def test_columns_are_mapped_also_inside_fields(tmp_path: Path) -> None:
    record = {
        "q": {"text": "what"},
        "pos": {"title": "T", "text": "yes"},
        "neg": ["no", {"text": "never"}],
        "how": "Answer",
        "topic": "c1",
        "s": [0.9, 0.1, 0],
    }
    path = write_jsonl(tmp_path / "rows.jsonl", [record])
    columns = {
        "query": "q.text",
        "positives": "pos",
        "negatives": "neg",
        "instruction": "how",
        "concept": "topic",
        "scores": "s",
    }
    (row,) = rows_of(make_source(path, "columns", columns=columns))
    assert row == Row(
        query="what",
        positives=("T yes",),
        negatives=("no", "never"),
        instruction="Answer",
        concept="c1",
        scores=(0.9, 0.1, 0.0),
    )


def test_where_keeps_records_with_equal_fields(tmp_path: Path) -> None:
    records = [{**pair, "domain": "even" if k % 2 == 0 else "odd"} for k, pair in enumerate(PAIRS)]
    path = write_jsonl(tmp_path / "rows.jsonl", records)
    rows = rows_of(make_source(path, "columns", where={"domain": "odd"}))
    assert [row.query for row in rows] == [pair["query"] for pair in PAIRS[1::2]]


def test_reasonaug_rows_carry_task_as_instruction_and_instance_as_concept(tmp_path: Path) -> None:
    record = {
        "id": 1,
        "domain": "algorithm",
        "instance": "Heap",
        "task_type": "p2i",
        "task": "Find the concept",
        "user_query": "problem",
        "positive_document": "heap",
        "hard_negative_document": None,
        "negative_instance": None,
    }
    path = write_jsonl(tmp_path / "rows.jsonl", [record])
    (row,) = rows_of(make_source(path, "reasonaug"))
    assert row == Row(
        query="problem", positives=("heap",), instruction="Find the concept", concept="Heap"
    )


def test_an_e5_folder_is_one_source_per_set_with_its_own_instruction(tmp_path: Path) -> None:
    record = {"query": "who", "positive": "p", "negative": "n"}
    for name in ("nq", "allnli_split2", "quora_duplicates"):
        write_jsonl(tmp_path / f"{name}.jsonl", [record] * 5)
    source = make_source(tmp_path, "e5", max_rows=3)
    expanded = expand_sources([source])
    assert [own.name for own in expanded] == ["set.allnli_split2", "set.nq", "set.quora_duplicates"]
    rows = rows_of(source)
    assert len(rows) == 9
    assert "Wikipedia" in rows[3].instruction and rows[3].document_instruction == ""
    # A split of a symmetric set is still symmetric.
    assert (
        rows[0].document_instruction == rows[0].instruction == "Retrieve semantically similar text"
    )


def test_documents_of_entailment_carry_no_instruction(tmp_path: Path) -> None:
    """A premise retrieves what follows from it: the two sides are not the same kind of text."""
    records = [{"query": f"q{k}", "positive": "p", "negative": "n"} for k in range(50)]
    for name in ("allnli", "allnli_split1"):
        rows = rows_of(make_source(write_jsonl(tmp_path / f"{name}.jsonl", records), "e5"))
        found = {(row.instruction, row.document_instruction) for row in rows}
        entailment = "Given a premise, retrieve a hypothesis that is entailed by the premise"
        assert (entailment, "") in found
        assert found - {(entailment, "")} <= {("Retrieve semantically similar text",) * 2}
        assert len(found) == (2 if name == "allnli" else 1)


def test_symmetric_sets_use_each_of_their_instructions(tmp_path: Path) -> None:
    records = [{"query": f"q{k}", "positive": "p", "negative": "n"} for k in range(200)]
    path = write_jsonl(tmp_path / "quora_duplicates.jsonl", records)
    instructions = [row.instruction for row in rows_of(make_source(path, "e5"))]
    assert len(set(instructions)) == 2
    assert 60 < instructions.count(instructions[0]) < 140


def test_msmarco_takes_instruction_negatives_first_and_samples_the_others(tmp_path: Path) -> None:
    def passages(kind: str, count: int) -> list[dict[str, str]]:
        return [{"docid": f"{k}", "title": kind, "text": f"{k}"} for k in range(count)]

    record = {
        "query": "q",
        "positive_passages": passages("good", 2),
        "negative_passages": passages("bad", 40),
        "new_negatives": passages("new", 5),
    }
    path = write_jsonl(tmp_path / "rows.jsonl", [record])
    (row,) = rows_of(make_source(path, "msmarco_instructions"))
    assert row.positives == ("good 0",)
    assert len(row.negatives) == len(set(row.negatives)) == 15
    assert row.num_first_negatives == 3
    # As published, the first three.
    assert row.negatives[:3] == ("new 0", "new 1", "new 2")
    assert [text.split()[0] for text in row.negatives[3:]] == ["bad"] * 12
    assert rows_of(make_source(path, "msmarco_instructions")) == [row]


def test_reasonir_hq_finds_its_positives_by_id(tmp_path: Path) -> None:
    record = {
        "query": ["Given a post", "why"],
        "pos": [["", "docs/1.txt"]],
        "neg": [["", "wrong"], ["", "false"]],
    }
    path = write_jsonl(tmp_path / "rows.jsonl", [record])
    source = make_source(path, "reasonir_hq", documents=str(path))
    texts = {"docs/1.txt": "because"}
    references = References(document=texts.get, judgements={})
    (row,) = rows_of(source, references=references)
    assert row.query == "why" and row.instruction == "Given a post"
    assert row.positives == ("because",) and row.negatives == ("wrong", "false")
    empty = References(document={}.get, judgements={})
    with pytest.raises(UserError, match=r"rows\.jsonl:1: document id 'docs/1\.txt' is not in"):
        rows_of(source, references=empty)
    (plain,) = rows_of(make_source(path, "reasonir_vl"))
    assert plain.positives == ("docs/1.txt",)


@pytest.mark.parametrize("text", [" Given a post. ", "Given a post", "Given a post."])
def test_instructions_of_reasonir_are_trimmed_as_published(tmp_path: Path, text: str) -> None:
    record = {"query": [text, "why"], "pos": [["", " because. "]], "neg": []}
    (row,) = rows_of(make_source(write_jsonl(tmp_path / "vl.jsonl", [record]), "reasonir_vl"))
    assert row.instruction == "Given a post"
    assert row.positives == (" because. ",)


def test_lines_of_a_plain_file_are_stripped_and_fields_are_not(tmp_path: Path) -> None:
    plain = tmp_path / "wiki.txt"
    plain.write_text("  A line. \n")
    (row,) = rows_of(make_source(plain, "lines"))
    assert row.query == "A line." == row.positives[0]
    (row,) = rows_of(
        make_source(write_jsonl(tmp_path / "w.jsonl", [{"text": " = A = \n"}]), "lines")
    )
    assert row.query == " = A = \n"


def test_lines_are_their_own_positives(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text("A first line.\n\nAnother one.\r\n")
    rows = rows_of(make_source(path, "lines"))
    assert [(row.query, row.positives) for row in rows] == [
        ("A first line.", ("A first line.",)),
        ("Another one.", ("Another one.",)),
    ]


@pytest.mark.parametrize("layout", ["jsonl and tsv", "folders of parquet"])
def test_a_folder_in_mteb_layout_joins_queries_to_judged_documents(
    tmp_path: Path, layout: str
) -> None:
    corpus = [{"_id": f"d{k}", "title": "T", "text": f"text {k}"} for k in range(4)]
    queries = [{"_id": "q0", "text": "zero"}, {"_id": "q1", "text": "not judged"}]
    judged = [("q0", "d1", 1), ("q0", "d3", 2), ("q0", "d0", 0)]
    if layout == "jsonl and tsv":
        write_jsonl(tmp_path / "corpus.jsonl", corpus)
        write_jsonl(tmp_path / "queries.jsonl", queries)
        (tmp_path / "qrels").mkdir()
        lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, line)) for line in judged)]
        (tmp_path / "qrels" / "train.tsv").write_text("\n".join(lines))
    else:
        qrels = [
            dict(zip(("query-id", "corpus-id", "score"), line, strict=True)) for line in judged
        ]
        for part, rows in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
            (tmp_path / part).mkdir()
            name = "train.parquet" if part == "qrels" else "part-0.parquet"
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / part / name)
    source = make_source(tmp_path, "mteb", instruction="Find")
    texts = {row["_id"]: row["text"] for row in corpus}
    references = References(document=texts.get, judgements=read_judgements(source))
    assert rows_of(source, references=references) == [
        Row(
            query="zero",
            positives=("text 1", "text 3"),
            negatives=("text 0",),
            instruction="Find",
        )
    ]


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        expand_sources([make_source(tmp_path, "json")])
    assert all(name in str(caught.value) for name in FORMATS)


def test_errors_name_the_line_of_the_file_also_in_a_later_block(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*PAIRS, {"query": 3, "positives": "p"}])
    with pytest.raises(UserError, match=r"rows.jsonl:51: 'query' is a int"):
        rows_of(make_source(path, "columns"), block_bytes=100)
