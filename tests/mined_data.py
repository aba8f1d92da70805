"""A mined dataset folder made from a prepared one, without any model."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.batch import Ragged
from pipeline.data.manifest import FILE_NAME, MiningInfo, ShardInfo, TeacherInfo, write_manifest
from pipeline.data.shards import MINED_EXAMPLE_SCHEMA, Dataset, map_batch, ragged_array, write_table
from pipeline.data.vectors import vector_file, write_teacher_vectors
from pipeline.files import hash_file

BANDS = ("hard", "middle", "easy")
WIDTH = 8
NUM_CANDIDATES = 10


def draw_vectors(count: int, width: int, seed: int) -> NDArray[np.float32]:
    """(count, width) vectors of different lengths, the same at every call."""
    drawn = np.random.default_rng(seed).standard_normal((count, width))
    return (drawn * 3).astype(np.float32)


def mine_by_hand(
    dataset: Dataset,
    folder: Path,
    *,
    width: int = WIDTH,
    num_candidates: int = NUM_CANDIDATES,
    seed: int = 0,
) -> Path:
    """Write a mined folder: the same documents, drawn candidates and drawn teacher vectors.

    Example e has the candidates of `candidates_of`, in three bands. The vectors of documents and
    queries are `draw_vectors` with the seed and the next one.
    """
    folder.mkdir(parents=True)
    manifest = dataset.manifest
    for info in manifest.document_shards:
        os.link(dataset.folder / info.file, folder / info.file)
    examples, first = [], 0
    for info in manifest.example_shards:
        examples.append(_add_candidates(dataset, folder, info, first=first, count=num_candidates))
        first += info.rows
    vectors = {
        kind: _write_vectors(folder, kind, shards, width=width, seed=seed + number)
        for number, (kind, shards) in enumerate(
            (("documents", manifest.document_shards), ("queries", manifest.example_shards))
        )
    }
    mining = MiningInfo(
        source=manifest.fingerprint,
        settings={"by": "hand"},
        models={},
        bands=BANDS,
        candidates=True,
        teacher=TeacherInfo(
            name="drawn", fingerprint="0" * 64, width=width, norm="unit", **vectors
        ),
    )
    mined = dataclasses.replace(
        manifest, has_scores=True, example_shards=tuple(examples), mining=mining
    )
    write_manifest(folder / FILE_NAME, mined)
    return folder


def candidates_of(example: int, *, listed: list[int], num_documents: int, count: int) -> list[int]:
    """`count` documents that the example does not list; every fifth example has only two."""
    drawn = np.random.default_rng(example).permutation(num_documents).tolist()
    free = [document for document in drawn if document not in listed]
    return free[: 2 if example % 5 == 0 else count]


def _add_candidates(
    dataset: Dataset, folder: Path, info: ShardInfo, *, first: int, count: int
) -> ShardInfo:
    table = pa.Table.from_batches([map_batch(dataset.folder / info.file)])
    lists = [*zip(table["positives"].to_pylist(), table["negatives"].to_pylist(), strict=True)]
    rows = [
        np.array(
            candidates_of(
                first + row,
                listed=[*positives, *negatives],
                num_documents=len(dataset.documents),
                count=count,
            ),
            dtype=np.int64,
        )
        for row, (positives, negatives) in enumerate(lists)
    ]
    candidates = Ragged.from_rows(rows)
    bands = Ragged.from_rows([np.arange(len(row)) * len(BANDS) // max(len(row), 1) for row in rows])
    scores = Ragged.from_rows([np.linspace(1, 0, len(row), dtype=np.float32) for row in rows])
    listed = [np.linspace(2, 1, len([*p, *n]), dtype=np.float32) for p, n in lists]
    columns = [
        *table.drop_columns(["scores"]).columns,
        ragged_array(Ragged.from_rows(listed), pa.float32()),
        ragged_array(candidates, pa.int64()),
        ragged_array(scores, pa.float32()),
        ragged_array(bands, pa.int8()),
    ]
    path = folder / info.file
    write_table(path, pa.table(columns, schema=MINED_EXAMPLE_SCHEMA))
    return ShardInfo(
        file=info.file, rows=info.rows, bytes=path.stat().st_size, sha256=hash_file(path)
    )


def _write_vectors(
    folder: Path, kind: str, shards: tuple[ShardInfo, ...], *, width: int, seed: int
) -> tuple[ShardInfo, ...]:
    drawn = draw_vectors(sum(shard.rows for shard in shards), width, seed)
    parts = np.split(drawn, np.cumsum([shard.rows for shard in shards])[:-1])
    return tuple(
        write_teacher_vectors(
            folder,
            vector_file(kind, number),
            np.array_split(part, 3),
            rows=len(part),
            width=width,
        )
        for number, part in enumerate(parts)
    )
