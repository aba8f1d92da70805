"""Vectors in a file: those of the export, whatever the processes, containers and interruptions."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ModelConfig, Template
from pipeline.errors import UserError
from pipeline.evaluation.vectors import encode
from pipeline.evaluation.vectors.encode import encode_file
from pipeline.evaluation.vectors.job import EncodeJob
from pipeline.model.load import load_export
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
import os, pickle, signal, sys
from pipeline.evaluation.vectors.encode import encode_file
from pipeline.model.load import LoadedExport
whole, calls = LoadedExport.encode_tokens, []
def encode_tokens(self, *tokens):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *tokens)
LoadedExport.encode_tokens = encode_tokens
encode_file(pickle.loads(sys.stdin.buffer.read()), num_processes=1)
"""


def test_a_killed_run_goes_on_with_the_blocks_that_are_missing(
    job: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(
        encode_file(
            dataclasses.replace(job, output=job.output.with_name("w.arrow")), num_processes=1
        )
    )
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED], input=pickle.dumps(job), env={**os.environ}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not job.output.exists()
    done = sorted(path.name for path in job.folder.glob("part-*.arrow"))
    assert done == [job.part(block).name for block in range(3)]
    numbers: list[int] = []
    encode_block = encode._encode_block

    def counting(job: EncodeJob, number: int) -> None:
        numbers.append(number)
        encode_block(job, number)

    monkeypatch.setattr(encode, "_encode_block", counting)
    names, vectors = read(encode_file(job, num_processes=1))
    assert numbers == list(range(3, 3 + len(numbers)))
    assert len(numbers) > 3
    assert names == whole[0]
    assert (vectors == whole[1]).all()
    encode_file(job)  # finished: nothing is done again
    assert len(numbers) == len(set(numbers))


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
    changed = dataclasses.replace(job, input=str(path), **changes)  # type: ignore[arg-type]
    names, vectors = read(encode_file(changed, num_processes=1))
    assert names == [str(k) for k in range(40)]
    assert vectors.dtype == np.float16
    wanted = load_export(job.model, dimensions=8).encode_texts(texts)
    np.testing.assert_allclose(vectors, wanted, atol=1e-3)


def test_memory_does_not_grow_with_the_input(job: EncodeJob, tmp_path: Path) -> None:
    # The worst case: a compressed file is one block. Long texts, of which few tokens are used.
    line = json.dumps({"text": " ".join(WORDS) * 40}) + "\n"
    path = tmp_path / "large.jsonl.gz"
    path.write_bytes(gzip.compress((line * 4000).encode(), 1))
    large = dataclasses.replace(job, input=str(path), max_length=4, instruction="")
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
        ({}, [{"name": 1, "text": "a"}, {"text": "b"}], r"rows.jsonl:2: name: missing"),
        ({}, [{"name": 1, "text": ["a"]}], r"text: list .*allowed: a text"),
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


def test_a_file_that_was_made_otherwise_is_kept(job: EncodeJob) -> None:
    job.output.write_text("precious")
    with pytest.raises(UserError, match="exists and was made otherwise"):
        encode_file(job, num_processes=1)
    assert job.output.read_text() == "precious"
