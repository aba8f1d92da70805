"""Vectors in a file: equal for any number of processes, any container and after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import pickle
import random
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config import ModelConfig, Template
from pipeline.errors import UserError
from pipeline.evaluation import encode
from pipeline.evaluation.encode import EncodeJob, encode_file
from pipeline.files import hold_lock
from pipeline.model.load_export import LoadedExport, load_export
from tests import forks
from tests.support import PATIENCE
from tests.tiny_models import export_tiny, tiny_starter

WORDS = ("river", "stone", "cloud", "amber", "forest", "signal", "copper", "meadow")


def make_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that leaves instructions out of its vectors."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "corpus.txt").write_text("\n".join(make_texts(50)))
    starter = tiny_starter(folder / "starter", folder / "corpus.txt", num_layers=1)
    config = ModelConfig(path=str(starter), dtype="float32", pool_instruction=False)
    return export_tiny(config, folder / "model")


@pytest.fixture
def job(export: Path, tmp_path: Path) -> EncodeJob:
    """300 queries with names, in blocks of a few."""
    rows = [{"name": f"q{k}", "text": text} for k, text in enumerate(make_texts(300))]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EncodeJob(
        model=export,
        input=str(source),
        output=tmp_path / "out.arrow",
        id_field="name",
        role="query",
        instruction="Find the place",
        max_tokens=500,
        block_bytes=8000,
    )


def read(path: Path) -> tuple[list[str], np.ndarray]:
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    width = table.schema.field("vector").type.list_size
    vectors = np.concatenate([c.flatten().to_numpy() for c in table["vector"].chunks])
    return table["id"].to_pylist(), vectors.reshape(-1, width)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Each of several processes has one thread; products of two threads differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_vectors_are_those_of_the_export_for_any_number_of_processes(job: EncodeJob) -> None:
    names, vectors = read(encode_file(job, num_processes=1))
    assert names == [f"q{k}" for k in range(300)]
    prefix = Template().query_prefix(job.instruction)
    wanted = load_export(job.model).encode_texts(make_texts(300), prefix)
    np.testing.assert_allclose(vectors, wanted, atol=1e-6)
    both = dataclasses.replace(job, output=job.output.with_name("both.arrow"))
    again = read(encode_file(both, num_processes=2))
    assert again[0] == names
    assert (again[1] == vectors).all()
    assert {path.name for path in job.output.parent.iterdir()} == {
        *("rows.jsonl", "out.arrow", "both.arrow"),
    }


_KILLED = """
import os, pickle, pathlib, signal, sys
from pipeline.evaluation.encode import encode_file
from pipeline.model.load_export import LoadedExport
whole, calls = LoadedExport.encode_tokens, []
def encode_tokens(self, *tokens):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *tokens)
LoadedExport.encode_tokens = encode_tokens
encode_file(pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()), num_processes=1)
"""


def count_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the number of each block that is embedded from now on is added."""
    numbers: list[int] = []
    encode_block = encode._encode_block

    def counting(job: EncodeJob, number: int) -> None:
        numbers.append(number)
        encode_block(job, number)

    monkeypatch.setattr(encode, "_encode_block", counting)
    return numbers


def test_a_killed_run_continues_with_the_blocks_that_are_missing(
    job: EncodeJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = read(
        encode_file(
            dataclasses.replace(job, output=job.output.with_name("w.arrow")), num_processes=1
        )
    )
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    killed = forks.run(["-c", _KILLED, tmp_path / "job"], folder=tmp_path, timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL
    assert not job.output.exists()
    done = sorted(path.name for path in job.folder.glob("part-*.arrow"))
    assert done == [job.part(block).name for block in range(3)]
    numbers = count_blocks(monkeypatch)
    part = job.part(0)
    content = part.read_bytes()
    middle = len(content) // 2  # among the vectors
    part.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(UserError, match=f"{part.name}: damaged"):
        encode_file(job, num_processes=1)
    part.write_bytes(content)
    names, vectors = read(encode_file(job, num_processes=1))
    assert numbers == list(range(3, 3 + len(numbers)))
    assert len(numbers) > 3
    assert names == whole[0]
    assert (vectors == whole[1]).all()
    encode_file(job)  # finished: nothing is done again
    assert len(numbers) == len(set(numbers))


def test_of_two_commands_for_one_output_the_second_waits_and_finds_it_finished(
    job: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = count_blocks(monkeypatch)
    lock = job.output.with_name(".out.arrow.lock")
    call = {"args": (job,), "kwargs": {"num_processes": 1}}
    with hold_lock(lock, tell=print), contextlib.redirect_stderr(io.StringIO()) as printed:
        second = threading.Thread(target=encode_file, **call)  # type: ignore[arg-type]
        second.start()
        while "waiting for another process" not in printed.getvalue():
            assert second.is_alive()
            time.sleep(0.01)
        # The parts of the first one stay.
        assert not job.folder.exists()
    encode_file(job, num_processes=1)
    second.join()
    assert len(numbers) == len(set(numbers)) > 3
    assert read(job.output)[0] == [f"q{k}" for k in range(300)]
    assert not lock.exists()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl.gz", ".parquet"])
def test_every_container_gives_the_same_vectors_in_half_precision_and_fewer_dimensions(
    job: EncodeJob, suffix: str, tmp_path: Path
) -> None:
    texts = make_texts(40)
    path = tmp_path / f"texts{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(texts))
    elif suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_bytes(gzip.compress("".join(f'{{"text": "{t}"}}\n' for t in texts).encode()))
    changes = {"role": "document", "instruction": "", "dtype": "float16", "dimensions": 8}
    changes["id_field"] = ""
    changed = dataclasses.replace(job, input=str(path), **changes)  # type: ignore[arg-type]
    names, vectors = read(encode_file(changed, num_processes=1))
    assert names == [str(k) for k in range(40)]
    assert vectors.dtype == np.float16
    wanted = load_export(job.model, dimensions=8).encode_texts(texts)
    np.testing.assert_allclose(vectors, wanted, atol=1e-3)


@pytest.fixture
def plain(job: EncodeJob) -> EncodeJob:
    """Documents without names or instruction."""
    return dataclasses.replace(job, id_field=None, role="document", instruction="")


def encode_rows(job: EncodeJob, name: str, content: str) -> tuple[list[str], np.ndarray]:
    path = job.output.with_name(name)
    path.write_text(content)
    changed = dataclasses.replace(job, input=str(path), output=path.with_suffix(".arrow"))
    return read(encode_file(changed, num_processes=1))


def test_vector_i_belongs_to_line_i_also_where_lines_are_blank(
    plain: EncodeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    small = dataclasses.replace(plain, block_bytes=8)  # blocks may start and end with blank lines
    names, vectors = encode_rows(small, "lines.txt", "\nriver\n\n   \nstone\n\n")
    wanted = load_export(plain.model).encode_texts(["", "river", "", "   ", "stone", ""])
    assert names == [str(line) for line in range(6)]
    np.testing.assert_allclose(vectors, wanted, atol=1e-6)
    assert "4 of 6 texts are blank; each keeps its row" in capsys.readouterr().err


def test_texts_that_reach_the_maximum_length_are_counted(
    plain: EncodeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    short = dataclasses.replace(plain, max_length=8)
    encode_rows(short, "lines.txt", "river\n" + "stone " * 40 + "\n" + "amber " * 40 + "\n")
    assert ", 2 texts at the limit of 8 tokens, " in capsys.readouterr().err


def test_blank_lines_between_json_records_are_left_out_and_counted(
    plain: EncodeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = '{"text": "river"}\n\n{"text": "stone"}\n \n'
    names, vectors = encode_rows(plain, "rows.json", rows)
    assert names == ["0", "1"]
    np.testing.assert_allclose(
        vectors, load_export(plain.model).encode_texts(["river", "stone"]), atol=1e-6
    )
    assert "left out and not numbered: 2" in capsys.readouterr().err


def test_a_beir_corpus_has_its_ids_and_its_titles_before_the_texts(
    plain: EncodeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"_id": "a", "title": "River", "text": "stone"},
        {"_id": 7, "title": None, "text": "cloud"},
        {"_id": 7, "text": "amber"},
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    names, vectors = encode_rows(plain, "corpus.jsonl", content)
    assert names == ["a", "7", "7"]
    model = load_export(plain.model)
    np.testing.assert_allclose(
        vectors, model.encode_texts(["River stone", "cloud", "amber"]), atol=1e-6
    )
    said = capsys.readouterr().err
    assert "'title' precedes the text" in said
    assert "1 of 3 records repeat an earlier _id" in said
    bare = dataclasses.replace(plain, id_field="", title_field="")
    names, vectors = encode_rows(bare, "bare.jsonl", content)
    assert names == ["0", "1", "2"]
    np.testing.assert_allclose(vectors, model.encode_texts(["stone", "cloud", "amber"]), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_and_numpy_hold_what_arrow_holds(job: EncodeJob, dtype: str) -> None:
    job = dataclasses.replace(job, dtype=dtype)  # type: ignore[arg-type]
    names, vectors = read(encode_file(job, num_processes=1))
    parquet, numpy = (job.output.with_suffix(suffix) for suffix in (".parquet", ".npy"))
    for output in (parquet, numpy):
        other = dataclasses.replace(job, output=output)
        encode_file(other, num_processes=1)
        assert encode_file(other) == output  # known again as finished
    table = pq.read_table(parquet)
    assert table["id"].to_pylist() == names
    rows = np.stack([np.asarray(row, dtype) for row in table["vector"].to_pylist()])
    np.testing.assert_array_equal(rows, vectors)
    loaded = np.load(numpy)
    assert loaded.dtype == dtype
    np.testing.assert_array_equal(loaded, vectors)
    assert json.loads(numpy.with_suffix(".ids.json").read_text())["ids"] == names


@pytest.mark.parametrize("name", ["out.txt", "out", "out.npz"])
def test_a_name_of_another_format_is_refused(job: EncodeJob, name: str) -> None:
    with pytest.raises(UserError, match=r"allowed: a name in \.arrow, \.parquet, \.npy"):
        dataclasses.replace(job, output=job.output.with_name(name))


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(
    job: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_load", None)
    (job.output.parent / "file").touch()
    changed = dataclasses.replace(job, output=job.output.parent / "file" / "out.arrow")
    with pytest.raises(UserError, match=r"--output: .*/file: "):
        encode_file(changed, num_processes=1)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (1e6, "float16")])
def test_vectors_that_are_not_finite_are_never_written(
    job: EncodeJob, value: float, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LoadedExport.encode_tokens

    def broken(self: LoadedExport, *tokens: list[list[int]]) -> np.ndarray:
        vectors = whole(self, *tokens)
        vectors[3, 1] = value
        return vectors

    monkeypatch.setattr(LoadedExport, "encode_tokens", broken)
    changed = dataclasses.replace(job, dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"rows.jsonl:4: the vector of this text is not finite"):
        encode_file(changed, num_processes=1)
    assert not job.output.exists()


def test_memory_does_not_grow_with_the_input(job: EncodeJob, tmp_path: Path) -> None:
    # The worst case: a compressed file is one block. Long texts, of which few tokens are used.
    line = json.dumps({"text": " ".join(WORDS) * 40}) + "\n"
    path = tmp_path / "large.jsonl.gz"
    path.write_bytes(gzip.compress((line * 4000).encode(), 1))
    large = dataclasses.replace(job, input=str(path), max_length=4, instruction="", id_field="")
    encode_file(
        dataclasses.replace(job, output=job.output.with_name("warm.arrow")), num_processes=1
    )
    tracemalloc.start()
    try:
        encode_file(large, num_processes=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 4000 * len(line) > 7.5e6
    assert peak < 5e6  # two groups of a million characters, and what belongs to them


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"field": "body"}, None, r"rows.jsonl:1: body: no such field .*fields are name, text"),
        ({}, [{"name": 1, "text": "a"}, {"text": "b"}], r"name: missing in .*rows.jsonl:2; 1 of 2"),
        ({"id_field": None}, [{"text": "a"}, {"id": 7, "text": "b"}], r"id: missing in .*:1; 1 of"),
        ({"id_field": None}, [{"id": None, "text": "a"}, {"id": 7, "text": "b"}], r"id: missing"),
        ({"id_field": "nam"}, None, r"nam: missing in 300 records: .*:1, .*:2, .*:3, \.\.\."),
        ({}, [{"name": True, "text": "a"}], r":1: name: bool .*allowed: a text or a number"),
        ({}, [{"name": 1, "text": ["a"]}], r"text: list .*allowed: a text"),
        ({}, [{"name": 1, "text": None}], r"rows.jsonl:1: text: null \| allowed: a text"),
        (
            {},
            [{"name": 1}, {"name": 2, "text": 3}],
            r"2 rows cannot be used: .*:1: text: no such field .*; .*:2: text: int \| allowed",
        ),
        ({}, [{"name": 1, "text": "cut \ud83d"}], r"rows.jsonl:1: a text with half a surrogate"),
        ({}, [{"name": "\ud83d", "text": "a"}], r"rows.jsonl:1: a text with half a surrogate"),
        (
            {"title_field": "head"},
            [{"name": 1, "head": "\ud83d", "text": "a"}],
            r"rows.jsonl:1: a text with half a surrogate",
        ),
        ({"title_field": "head"}, None, "--title-field: no record has a text in 'head'"),
        ({"id_field": None}, [{"text": " "}], "holds no text"),
        ({}, [], "holds no text"),
        ({"dimensions": 64}, None, "allowed: 1 to 32"),
        ({"model": Path("nowhere")}, None, "nowhere: no export there"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_output(
    job: EncodeJob, changes: dict[str, object], rows: list[object] | None, message: str
) -> None:
    if rows is not None:
        Path(job.input).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        encode_file(dataclasses.replace(job, **changes), num_processes=1)  # type: ignore[arg-type]
    assert not job.output.exists()


def test_bad_rows_of_every_kind_are_told_at_once(job: EncodeJob) -> None:
    good = json.dumps({"name": "q", "text": "a"})
    bad = ["{", "[1]", '{"name": 1}', '{"name": [1], "text": "b"}', '{"name": 1, "text": 2}', "]"]
    lines = [line for row in bad for line in (good, row)]
    Path(job.input).write_bytes(b"\n".join([*map(str.encode, lines), b"\xff\xfe", good.encode()]))
    with pytest.raises(UserError) as caught:
        encode_file(job, num_processes=1)
    assert caught.value.found.startswith("--input: 7 rows cannot be used: ")
    for number, reason in ((2, "not JSON"), (4, "a JSON list"), (6, "no such"), (8, "name: list")):
        assert f"{job.input}:{number}: {reason}" in caught.value.found.replace("text: no", "no")
    assert caught.value.found.endswith("; and 2 more")
    assert not job.output.exists()


def test_a_file_that_was_made_otherwise_is_kept(job: EncodeJob) -> None:
    job.output.write_text("precious")
    with pytest.raises(UserError, match="exists, but was not made from this input"):
        encode_file(job, num_processes=1)
    assert job.output.read_text() == "precious"
