"""Damaged or wrong inputs of every kind end in one clear line that names the culprit."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_support import ConfigMaker, write_jsonl
from transformers import AutoTokenizer

from pipeline.config import DataConfig, DecontaminateConfig, EvaluationSetConfig, SourceConfig
from pipeline.data.loader import Loader
from pipeline.data.manifest import ShardInfo
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.data.text_loader import TextLoader
from pipeline.errors import UserError
from pipeline.files import hash_file
from pipeline.tokenizer import tokenizer_fingerprint

GOOD = {"query": "q", "positives": ["p"], "negatives": ["n"]}
LINE = json.dumps(GOOD).encode()

# The second line of a JSON-lines source, and the message that it must lead to.
LINES: dict[str, tuple[bytes, str]] = {
    "cut off": (LINE[:-9], "not JSON"),
    "prose": (b"hello", "not JSON"),
    "single quotes": (b"{'query': 'q'}", "not JSON"),
    "a list": (b'["q", "p"]', "a JSON list"),
    "a number": (b"7", "a JSON int"),
    "null": (b"null", "a JSON NoneType"),
    "a string": (b'"q"', "a JSON str"),
    "not UTF-8": (LINE[:11] + b"\xff" + LINE[11:], "is not UTF-8"),
    "UTF-16": (LINE.decode().encode("utf-16"), "is not UTF-8"),
    "bytes of zero": (b"\0" * 20, "not JSON"),
    "nested too deep": (b'{"query":' + b"[" * 100_000, "not JSON"),
    "no fields": (b"{}", "'query' is missing"),
    "no query": (b'{"positives": ["p"]}', "'query' is missing"),
    "no positives": (b'{"query": "q"}', "'positives' is missing"),
    "null query": (b'{"query": null, "positives": ["p"]}', "'query' is null"),
    "query is a list": (b'{"query": ["q"], "positives": ["p"]}', "'query' is a list"),
    "query is a number": (b'{"query": 1, "positives": ["p"]}', "'query' is a int"),
    "null positives": (b'{"query": "q", "positives": null}', "'positives' holds null"),
    "positive is a number": (b'{"query": "q", "positives": [1]}', "'positives' holds a int"),
    "positive without text": (
        b'{"query": "q", "positives": [{"title": "t"}]}',
        "'positives' holds a dict",
    ),
    "negative is null": (
        b'{"query": "q", "positives": ["p"], "negatives": [null]}',
        "'negatives' holds null",
    ),
    "negatives are nested": (
        b'{"query": "q", "positives": ["p"], "negatives": [["n"]]}',
        "'negatives' holds a list",
    ),
    "half a surrogate pair": (b'{"query": "q\\ud800", "positives": ["p"]}', "surrogate"),
}

# Format, a record in place of a good one, and the message that it must lead to.
RECORDS: dict[str, tuple[str, Any, str]] = {
    "reasonaug without query": ("reasonaug", {"positive_document": "p"}, "'user_query' is missing"),
    "reasonaug with a list": (
        "reasonaug",
        {"user_query": "q", "positive_document": ["p"]},
        "'positive_document' is a list",
    ),
    "reasonaug with a number as task": (
        "reasonaug",
        {"user_query": "q", "positive_document": "p", "task": 3},
        "'task' is a int",
    ),
    "e5 of an unknown set": ("e5", {"query": "q", "positive": "p"}, "not a known E5 set"),
    "msmarco with bare ids": (
        "msmarco_instructions",
        {"query": "q", "positive_passages": [17]},
        "'positive_passages' holds a int",
    ),
    "reasonir without a pair": (
        "reasonir_vl",
        {"query": "q", "pos": [], "neg": []},
        "'query' holds a str",
    ),
    "reasonir with three parts": (
        "reasonir_vl",
        {"query": ["i", "q"], "pos": [["a", "b", "c"]], "neg": []},
        "'pos' holds a list",
    ),
    "reasonir without a list": (
        "reasonir_vl",
        {"query": ["i", "q"], "pos": "p", "neg": []},
        "'pos' is a str",
    ),
    "too few scores": ("scored", {**GOOD, "s": [1]}, "1 scores"),
    "scores in words": ("scored", {**GOOD, "s": ["good", "bad"]}, "entry 1 of 's' is a str"),
    "scores of null": ("scored", {**GOOD, "s": None}, "'s' is null"),
    "scores missing": ("scored", GOOD, "'s' is missing"),
}


def one_line(error: UserError, *parts: str) -> None:
    message = str(error)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("kind", LINES)
def test_a_bad_line_is_named_by_file_and_line(
    kind: str, make_config: ConfigMaker, tmp_path: Path
) -> None:
    line, said = LINES[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE + b"\n" + line + b"\n" + LINE + b"\n")
    source = SourceConfig(name="s", format="columns", path=str(path))
    with pytest.raises(UserError) as caught:
        prepare(make_config(source), num_workers=1)
    one_line(caught.value, f"{path}:2: ", said)


@pytest.mark.parametrize("kind", RECORDS)
def test_a_bad_record_is_named_by_file_and_line(
    kind: str, make_config: ConfigMaker, tmp_path: Path
) -> None:
    format, record, said = RECORDS[kind]
    path = write_jsonl(tmp_path / "rows.jsonl", [record])
    columns = {}
    if format == "scored":
        format, columns = "columns", {"scores": "s"}
    source = SourceConfig(name="s", format=format, path=str(path), columns=columns)
    with pytest.raises(UserError) as caught:
        prepare(make_config(source), num_workers=1)
    one_line(caught.value, f"{path}:1: ", said)


def cut_gzip(path: Path) -> None:
    data = gzip.compress(b"\n".join([LINE] * 5000))
    path.write_bytes(data[: len(data) // 2])


def damaged_gzip(path: Path) -> None:
    data = bytearray(gzip.compress(random.Random(0).randbytes(5000)))
    data[2000:2100] = b"x" * 100
    path.write_bytes(data)


def cut_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([GOOD] * 100), path)
    path.write_bytes(path.read_bytes()[:-40])


def damaged_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([GOOD] * 100), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[10:200] = b"\xee" * 190
    path.write_bytes(data)


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no such file": ("rows.jsonl", lambda path: None),
    "an unknown ending": ("rows.csv", lambda path: path.write_bytes(LINE)),
    "an empty folder": ("folder", lambda path: path.mkdir()),
    "a folder without data": (
        "folder",
        lambda path: (path.mkdir(), (path / "notes.md").write_text("x")),
    ),
    "a gzip cut off": ("rows.jsonl.gz", cut_gzip),
    "a gzip with damage": ("rows.jsonl.gz", damaged_gzip),
    "no gzip": ("rows.jsonl.gz", lambda path: path.write_bytes(LINE)),
    "a parquet cut off": ("rows.parquet", cut_parquet),
    "a parquet with damage": ("rows.parquet", damaged_parquet),
    "no parquet": ("rows.parquet", lambda path: path.write_bytes(LINE)),
    "an empty parquet file": ("rows.parquet", lambda path: path.write_bytes(b"")),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_named(kind: str, make_config: ConfigMaker, tmp_path: Path) -> None:
    name, make = FILES[kind]
    make(tmp_path / name)
    source = SourceConfig(name="s", format="columns", path=str(tmp_path / name))
    with pytest.raises(UserError) as caught:
        prepare(make_config(source), num_workers=1)
    one_line(caught.value, str(tmp_path / name))
    if "damaged" in caught.value.found:
        assert caught.value.fix == "write or fetch the file again"


def test_sources_that_leave_no_example_are_refused(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    blank = write_jsonl(tmp_path / "blank.jsonl", [{"query": "", "positives": ["p"]}])
    for number, path in enumerate((empty, blank)):
        source = SourceConfig(name="s", format="columns", path=str(path))
        with pytest.raises(UserError, match="no example is left") as caught:
            prepare(make_config(source, name=f"d{number}"), num_workers=1)
        said = "rows read 0 (empty" if path == empty else "rows read 1, query: empty 1"
        one_line(caught.value, f"s ({path}): {said}")


def test_each_source_says_why_no_example_of_it_is_left(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    rows = [{**GOOD, "language": "de"}, {"query": "q", "positives": [" "], "language": "en"}]
    one = write_jsonl(tmp_path / "one.jsonl", rows)
    other = write_jsonl(
        tmp_path / "other.jsonl", [{"query": q, "positives": ["p"]} for q in ("q", "")]
    )
    sources = (
        SourceConfig(name="a", format="columns", path=str(one), where={"language": "en"}),
        SourceConfig(name="b", format="columns", path=str(other), require_negatives=True),
    )
    with pytest.raises(UserError) as caught:
        prepare(make_config(*sources), num_workers=1)
    one_line(
        caught.value,
        f"a ({one}): rows read 2, positive: empty 1, query: no positive left 1, "
        "left out by `where` 1",
        f"b ({other}): rows read 2, query: empty 1, query: no hard negative 1",
    )


def test_a_hub_dataset_that_is_not_there_is_named(make_config: ConfigMaker, tmp_path: Path) -> None:
    source = SourceConfig(name="s", format="columns", path=f"hub:{tmp_path}/nothing")
    with pytest.raises(UserError) as caught:
        prepare(make_config(source), num_workers=1)
    one_line(caught.value, "hub:")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def put(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


MTEB: dict[str, tuple[Callable[[Path], None], str]] = {
    "no corpus": (remove("corpus.jsonl"), "corpus is missing"),
    "no queries": (remove("queries.jsonl"), "queries is missing"),
    "no qrels": (remove("qrels/train.tsv"), "train is missing"),
    "a score in words": (put("qrels/train.tsv", "q\td\tgood\n"), "train.tsv:1: no judgement"),
    "two columns": (put("qrels/train.tsv", "q\td\n"), "train.tsv:1: no judgement"),
    "a judged document not there": (put("qrels/train.tsv", "q\tx\t1\n"), "'x' is not in"),
    "a document without id": (put("corpus.jsonl", '{"text": "t"}\n'), "corpus.jsonl:1: no id"),
    "a document without text": (put("corpus.jsonl", '{"_id": "d"}\n'), "corpus.jsonl:1: no text"),
    # Not even of a document without judgements: it is written with all others.
    "half a surrogate pair": (
        put("corpus.jsonl", '{"_id": "d", "text": "t"}\n{"_id": "e", "text": "\\ud83d"}\n'),
        "corpus.jsonl:2: a text with half a surrogate pair",
    ),
    "a query without text": (put("queries.jsonl", '{"_id": "q"}\n'), "queries.jsonl:1: field"),
}


@pytest.mark.parametrize("kind", MTEB)
def test_a_bad_retrieval_folder_is_named(
    kind: str, make_config: ConfigMaker, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", [{"_id": "d", "text": "t"}])
    write_jsonl(folder / "queries.jsonl", [{"_id": "q", "text": "t"}])
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    damage, said = MTEB[kind]
    damage(folder)
    source = SourceConfig(name="s", format="mteb", path=str(folder))
    with pytest.raises(UserError) as caught:
        prepare(make_config(source), num_workers=1)
    one_line(caught.value, str(folder), said)


TOKENIZERS: dict[str, Callable[[Path], object]] = {
    "no folder": lambda path: shutil.rmtree(path),
    "no files": lambda path: [file.unlink() for file in path.iterdir()],
    "no JSON": lambda path: (path / "tokenizer.json").write_text("{"),
    "no tokenizer": lambda path: (path / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_bad_tokenizer_is_named(
    kind: str, make_config: ConfigMaker, tmp_path: Path, tokenizer_path: Path
) -> None:
    broken = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_path, broken)
    TOKENIZERS[kind](broken)
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    source = SourceConfig(name="s", format="columns", path=str(path))
    with pytest.raises(UserError) as caught:
        prepare(make_config(source, tokenizer=str(broken)), num_workers=1)
    one_line(caught.value, "tokenizer: ", str(broken))


def test_a_bad_evaluation_set_is_named(make_config: ConfigMaker, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    source = SourceConfig(name="s", format="columns", path=str(path))
    cases = {str(path): "rows.jsonl:1: field 'text'", str(empty): "no text", "/no/where": "no such"}
    for place, said in cases.items():
        rule = DecontaminateConfig(sets=(EvaluationSetConfig(name="bench", path=place),))
        with pytest.raises(UserError) as caught:
            prepare(make_config(source, decontaminate=rule), num_workers=1)
        one_line(caught.value, place, said)


def test_bad_rows_of_all_evaluation_sets_are_told_at_once(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    one, other = tmp_path / "one.jsonl", tmp_path / "other.csv"
    lines = [b'{"text": "a"}', b"{", b'{"text": null}', b'{"body": "a"}', b"\xff"]
    one.write_bytes(b"\n".join(lines))
    other.write_text("body\na\nb\n")
    sets = (
        EvaluationSetConfig(name="one", path=str(one)),
        EvaluationSetConfig(name="other", path=str(other)),
    )
    source = SourceConfig(name="s", format="columns", path=str(path))
    with pytest.raises(UserError) as caught:
        prepare(make_config(source, decontaminate=DecontaminateConfig(sets=sets)), num_workers=1)
    one_line(caught.value, str(one), "decontaminate.sets: 6 rows cannot be used", "; and 1 more")
    for place in (f"{one}:2: not JSON", f"{one}:3: field 'text'", f"{one}:4: ", f"{one}:5: byte 1"):
        assert place in caught.value.found
    assert f"{other}:2: field 'text' is missing" in caught.value.found
    for name in ("one", "other"):
        assert f"set decontaminate.{name}.fields" in caught.value.fix


@pytest.fixture
def copied(dataset: Dataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset.folder, tmp_path / "copied"))


def use(folder: Path) -> None:
    """Open, verify and draw batches from a dataset."""
    opened = Dataset.open(folder, verify=True)
    draw(opened)


def draw(opened: Dataset) -> None:
    config = DataConfig(path=opened.folder, global_batch_size=64)
    loader = Loader(opened, config, max_chunk_tokens=400)
    for step in range(8):
        loader.batch(step)


def edit(*, sealed: bool = False, **changes: Any) -> Callable[[Path], None]:
    """Change keys of the manifest; a value of None removes the key.

    Args:
        sealed: leave the hash of the content, which an older manifest lacks.
    """

    def apply(folder: Path) -> None:
        tree = json.loads((folder / "manifest.json").read_text())
        if not sealed:
            del tree["sha256"]
        for key, value in changes.items():
            if value is None:
                del tree[key]
            else:
                tree[key] = value(tree[key]) if callable(value) else value
        (folder / "manifest.json").write_text(json.dumps(tree))

    return apply


def change_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return apply


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DOCUMENTS, EXAMPLES = "documents-00001.arrow", "examples-00001.arrow"
DATASETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (remove("manifest.json"), "manifest.json is missing"),
    "an empty manifest": (put("manifest.json", ""), "manifest.json: damaged"),
    "a manifest that is no JSON": (put("manifest.json", "{"), "manifest.json: damaged"),
    "a manifest that is a list": (put("manifest.json", "[]"), "manifest.json: damaged"),
    "a manifest of null": (put("manifest.json", "null"), "manifest.json: damaged"),
    "a manifest with another number": (
        edit(sealed=True, max_query_length=47),
        "manifest.json: damaged (its content does not match its sha256)",
    ),
    "a newer manifest": (edit(version=99), "version 99"),
    "a manifest without version": (edit(version=None), "manifest.json: damaged"),
    "a manifest without template": (edit(template=None), "template"),
    "a manifest with a word for a count": (edit(num_examples="many"), "num_examples"),
    "a manifest with a wrong count": (edit(num_examples=7), "do not hold 7 examples"),
    "a manifest with fewer documents": (edit(num_documents=7), "do not hold 7 documents"),
    "a manifest without groups": (edit(groups=[]), "groups end at 0"),
    "a manifest with a gap": (edit(groups=lambda groups: groups[1:]), "does not start at 0"),
    "a manifest without sources": (edit(sources=[]), "unknown sources"),
    "a manifest without shards": (edit(document_shards=[]), "do not hold"),
    "a manifest with a path for a shard": (
        edit(example_shards=lambda s: [{**s[0], "file": "../x"}, *s[1:]]),
        "'../x'",
    ),
    "a shard missing": (remove(DOCUMENTS), DOCUMENTS),
    "a shard cut off": (change_bytes(EXAMPLES, lambda data: data[:-100]), EXAMPLES),
    "a longer shard": (change_bytes(EXAMPLES, lambda data: data + b"x"), EXAMPLES),
    "an empty shard": (change_bytes(DOCUMENTS, lambda data: b""), DOCUMENTS),
    "a shard of zeros": (change_bytes(DOCUMENTS, lambda data: bytes(len(data))), DOCUMENTS),
    "a flipped first bit": (change_bytes(DOCUMENTS, lambda data: flip(data, 0)), DOCUMENTS),
    "a flipped bit inside": (
        change_bytes(DOCUMENTS, lambda data: flip(data, len(data) // 2)),
        DOCUMENTS,
    ),
    "a flipped last bit": (
        change_bytes(EXAMPLES, lambda data: flip(data, len(data) - 1)),
        EXAMPLES,
    ),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_a_damaged_dataset_is_refused_by_name(kind: str, copied: Path) -> None:
    damage, said = DATASETS[kind]
    damage(copied)
    with pytest.raises(UserError) as caught:
        use(copied)
    one_line(caught.value, str(copied), said)


@pytest.mark.parametrize("kind", ["a longer shard", "a shard cut off", "an empty shard"])
def test_a_shard_of_another_size_is_refused_before_it_is_read(kind: str, copied: Path) -> None:
    damage, said = DATASETS[kind]
    damage(copied)
    with pytest.raises(UserError, match=rf"{said}: \d+ bytes \| allowed: \d+ bytes"):
        Dataset.open(copied)


def test_flipping_any_byte_of_a_shard_is_found(copied: Path) -> None:
    path = copied / DOCUMENTS
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        path.write_bytes(flip(whole, rng.randrange(len(whole))))
        with pytest.raises(UserError, match=DOCUMENTS):
            Dataset.open(copied, verify=True)


def test_damage_without_verification_is_either_harmless_or_one_clear_error(copied: Path) -> None:
    rng = random.Random(1)
    refused = 0
    for name in (DOCUMENTS, EXAMPLES):
        path = copied / name
        whole = path.read_bytes()
        for trial in range(40):
            damaged = bytearray(whole)
            # Every other time at an end of the file, where Arrow keeps its own structure.
            middle = trial % 2
            first = rng.randrange(len(whole)) if middle else rng.choice([0, len(whole) - 900])
            for place in range(first, min(first + rng.choice([1, 8, 64, 900]), len(whole))):
                damaged[place] = rng.randrange(256)
            path.write_bytes(damaged)
            try:
                draw(Dataset.open(copied))
            except UserError as error:
                refused += 1
                one_line(error, str(copied))
            path.write_bytes(whole)
    assert refused > 20


def rewrite(folder: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace a shard by a well-formed one with another content, and tell the manifest."""
    path = folder / name
    with pa.memory_map(str(path)) as source:
        table = change(pa.ipc.open_file(source).read_all())
        with (
            pa.OSFile(str(path) + ".new", "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    Path(str(path) + ".new").replace(path)
    info = ShardInfo(
        file=name, rows=table.num_rows, bytes=path.stat().st_size, sha256=hash_file(path)
    )
    key = f"{name.split('-')[0].removesuffix('s')}_shards"
    entry = {field: getattr(info, field) for field in ("file", "rows", "bytes", "sha256")}
    edit(**{key: lambda shards: [entry if s["file"] == name else s for s in shards]})(folder)


def set_values(column: str, value: int) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        lists = table[column].combine_chunks()
        values = np.full(len(lists.values), value)
        new = pa.LargeListArray.from_arrays(lists.offsets, pa.array(values, lists.values.type))
        return table.set_column(table.schema.get_field_index(column), column, new)

    return change


def without_values(column: str) -> Callable[[pa.Table], pa.Table]:
    """Empty the list of the first row, whose values then are the next row's, and of the last."""

    def change(table: pa.Table) -> pa.Table:
        lists = table[column].combine_chunks().to_pylist()
        lists[0] = lists[-1] = []
        kind = table.schema.field(column).type
        return table.set_column(table.schema.get_field_index(column), column, pa.array(lists, kind))

    return change


CONTENTS: dict[str, tuple[str, Callable[[pa.Table], pa.Table]]] = {
    "a token outside the vocabulary": (DOCUMENTS, set_values("tokens", 10**6)),
    "a negative token": (EXAMPLES, set_values("query", -1)),
    "a document outside the store": (EXAMPLES, set_values("positives", 10**9)),
    "a negative document": (EXAMPLES, set_values("negatives", -2)),
    "no positive": (EXAMPLES, without_values("positives")),
    "another column": (
        EXAMPLES,
        lambda table: table.rename_columns([*table.column_names[:-1], "x"]),
    ),
    "a column less": (EXAMPLES, lambda table: table.drop_columns(["concept"])),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_consistent_shard_with_impossible_content_is_refused(kind: str, copied: Path) -> None:
    name, change = CONTENTS[kind]
    rewrite(copied, name, change)
    with pytest.raises(UserError) as caught:
        use(copied)
    one_line(caught.value, str(copied))


@pytest.mark.parametrize("length", [None, 16])
def test_an_example_without_a_positive_is_no_text_of_another_one(
    length: int | None, copied: Path
) -> None:
    rewrite(copied, EXAMPLES, without_values("positives"))
    config = DataConfig(path=copied, global_batch_size=600, block_length=length)
    with pytest.raises(UserError, match="an example without a positive"):
        TextLoader(Dataset.open(copied), config, max_chunk_tokens=1000).batch(0)


def test_another_tokenizer_is_refused_and_a_saved_copy_is_not(
    dataset: Dataset, tokenizer_path: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    dataset.require_tokenizer(tokenizer_fingerprint(again), "again")
    again.add_tokens(["<new>"])
    with pytest.raises(UserError, match="prepared with the tokenizer"):
        dataset.require_tokenizer(tokenizer_fingerprint(again), "again")


def test_at_least_sixty_kinds_of_damage_are_tried() -> None:
    kinds = [*LINES, *RECORDS, *FILES, *MTEB, *TOKENIZERS, *DATASETS, *CONTENTS]
    assert len(kinds) >= 60
