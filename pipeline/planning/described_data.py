"""Plan for data that is only described: shards without texts, from numbers of tokens.

Rows and lengths decide batches, memory and time, so a plan needs no more than these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import Template, TrainConfig
from pipeline.data.batch import IntArray, Ragged
from pipeline.data.manifest import (
    FILE_NAME,
    VERSION,
    LengthHistogram,
    Manifest,
    ShardInfo,
    SourceInfo,
)
from pipeline.data.order import Group
from pipeline.data.shards import DOCUMENT_SCHEMA, EXAMPLE_SCHEMA, write_table
from pipeline.tokenizer import TokenizerInfo


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Mean and standard deviation of a log-normal number of tokens, cut at `limit`."""

    mean: float
    deviation: float
    limit: int

    def draw(self, count: int) -> IntArray:
        """Draw (count,) lengths, the same at every call."""
        # Moments of the log-normal: its logarithm has variance s = log(1 + (deviation / mean)^2),
        # and mean log(mean) - s / 2.
        variance = np.log1p((self.deviation / self.mean) ** 2)
        drawn = np.random.default_rng(0).lognormal(
            np.log(self.mean) - variance / 2, np.sqrt(variance), count
        )
        return np.clip(drawn, 4, self.limit).astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of one data set's shards."""

    groups: tuple[tuple[str, str, int], ...]  # (source, instruction, examples)
    query: Lengths
    document: Lengths
    num_negatives: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """A data set as a user knows it: rows, and the mean lengths of their texts in tokens."""

    rows: int
    query_tokens: int
    document_tokens: int


@contextlib.contextmanager
def described(config: TrainConfig, description: Description) -> Iterator[TrainConfig]:
    """Yield the config with shards as described, which are removed at the end.

    Lengths are log-normal, with half the mean as their deviation and four times the mean as the
    longest. Each row has its own document, and the hard negatives that the config takes.
    """
    # A plan lays out one batch; more rows would change nothing.
    rows = min(description.rows, 2 * config.data.global_batch_size)
    query, document = (
        Lengths(mean=mean, deviation=mean / 2, limit=max(4, 4 * mean))
        for mean in (description.query_tokens, description.document_tokens)
    )
    negatives = config.data.num_hard_negatives if config.objective is None else 0
    shape = Shape(
        groups=(("described", "", rows),), query=query, document=document, num_negatives=negatives
    )
    with tempfile.TemporaryDirectory() as scratch:
        shards = write_shards(Path(scratch) / "shards", shape)
        yield dataclasses.replace(config, data=dataclasses.replace(config.data, path=shards))


def write_shards(folder: Path, shape: Shape, *, tokenizer: str = "") -> Path:
    """Write a dataset folder whose examples have one positive and a list of negatives.

    Groups share their documents: a batch of one group never holds one twice, and the files stay
    small.

    Args:
        folder: to write, which must not exist.
        shape: sizes and groups.
        tokenizer: fingerprint of the tokenizer that the shards claim to be made with.
    """
    folder.mkdir(parents=True)
    counts = [count for _, _, count in shape.groups]
    num_examples, per_example = sum(counts), 1 + shape.num_negatives
    num_documents = max(counts) * per_example  # the largest group uses all of them
    queries, documents = shape.query.draw(num_examples), shape.document.draw(num_documents)
    # Documents of example e of a group: its positive e * per_example, then its negatives.
    first = np.concatenate([np.arange(count) for count in counts]) * per_example
    negatives = first[:, None] + np.arange(1, per_example)  # (examples, negatives)
    columns = {
        "query": _tokens(queries),
        "positives": Ragged.from_lengths(np.ones(num_examples, np.int64), first),
        "negatives": Ragged.from_lengths(
            np.full(num_examples, shape.num_negatives), negatives.reshape(-1)
        ),
        "concept": np.full(num_examples, -1),  # none
        "query_key": np.arange(num_examples),
    }
    ends = np.cumsum(counts).tolist()
    manifest = Manifest(
        version=VERSION,
        recipe="",
        tokenizer=TokenizerInfo(
            path="", fingerprint=tokenizer, vocab_size=10, eos_id=None, append_eos=False
        ),
        template=Template(),
        max_query_length=shape.query.limit,
        max_document_length=shape.document.limit,
        num_examples=num_examples,
        num_documents=num_documents,
        num_near_duplicates=0,
        has_scores=False,
        sources=_sources(shape),
        groups=tuple(
            Group(source=source, instruction=instruction, start=end - count, count=count)
            for (source, instruction, count), end in zip(shape.groups, ends, strict=True)
        ),
        query_lengths=LengthHistogram.of(queries, shape.query.limit),
        document_lengths=LengthHistogram.of(documents, shape.document.limit),
        example_shards=(_write(folder, "examples.arrow", EXAMPLE_SCHEMA, num_examples, columns),),
        document_shards=(
            _write(
                folder, "documents.arrow", DOCUMENT_SCHEMA, num_documents,
                {"tokens": _tokens(documents)},
            ),
        ),
    )  # fmt: skip
    (folder / FILE_NAME).write_text(manifest.to_json())
    return folder


def _sources(shape: Shape) -> tuple[SourceInfo, ...]:
    counts: dict[str, int] = {}
    for source, _, count in shape.groups:
        counts[source] = counts.get(source, 0) + count
    return tuple(
        SourceInfo(
            name=name, format="", path="", weight=1.0, rows=count, examples=count, dropped={}
        )
        for name, count in counts.items()
    )


def _tokens(lengths: IntArray) -> Ragged:
    # Any token will do: a plan reads lengths only.
    return Ragged.from_lengths(lengths, np.zeros(int(lengths.sum()), dtype=np.int32))


def _write(
    folder: Path, name: str, schema: pa.Schema, rows: int, columns: dict[str, Any]
) -> ShardInfo:
    """Write an Arrow file with these columns; others of the schema are zeros and empty lists."""
    arrays = [_column(field, columns.get(field.name), rows) for field in schema]
    path = folder / name
    write_table(path, pa.table(arrays, schema=schema))
    return ShardInfo.of(path, rows)


def _column(field: pa.Field, values: Any, rows: int) -> pa.Array:
    if pa.types.is_fixed_size_binary(field.type):
        # The 16 bytes of a text's hash, from two integers: different for every row.
        raw = np.arange(2 * rows, dtype=np.int64).tobytes()
        return pa.FixedSizeBinaryArray.from_buffers(field.type, rows, [None, pa.py_buffer(raw)])
    if not pa.types.is_large_list(field.type):
        filled = np.zeros(rows) if values is None else values
        return pa.array(filled.astype(np.int64)).cast(field.type)
    if values is None:
        values = Ragged.from_lengths(np.zeros(rows, np.int64), np.empty(0, np.int64))
    inner = pa.array(values.values, type=field.type.value_type)
    return pa.LargeListArray.from_arrays(pa.array(values.offsets), inner)
