"""List each distinct text of all tasks once, with its cost.

Letters: N texts.

Only the small columns travel between processes, and no text is ever a Python object of the plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from pipeline.config import OwnTask, Template
from pipeline.data.batch import text_cost
from pipeline.errors import UserError
from pipeline.evaluation.datasets import Role

# Characters of a token, at the dense end of what the benchmarks hold (mathematics 3.0, prose 4.3).
_BYTES_PER_TOKEN = 3.5
# Length at which attention costs as much as all else in a 7 B model with 28 layers of width 3584:
# 2 x parameters / (4 x layers x width). Not training's 32,500: blocks on disk are cut by it.
_ATTENTION_TOKENS = 35_000
# What a template may add to a text, in bytes; tokens never outnumber bytes.
_TEMPLATE_BYTES = 128


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextKey:
    """What a vector depends on, beside the model."""

    role: Role
    instruction: str
    max_length: int
    text: str


def byte_sizes(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    """(N,) bytes of each text; no text is touched."""
    return np.diff(_offsets(texts))


def effective_lengths(
    instruction: str, sizes_N: NDArray[np.int64], wanted: int, lengths: Sequence[int]
) -> NDArray[np.int32]:
    """(N,) the smallest length at which a text that is not cut at `wanted` is not cut either.

    A text that fits 512 tokens has the same vector at 32768, so both lengths share it. Tokens are
    bounded by bytes: no tokenizer is asked.

    Args:
        sizes_N: bytes of each text.
        lengths: all lengths of the evaluation, ascending.
    """
    bounds_N = sizes_N + len(instruction.encode()) + _TEMPLATE_BYTES
    choices = np.array([*lengths, np.iinfo(np.int32).max], dtype=np.int32)
    found_N = choices[np.searchsorted(choices, bounds_N)]
    return np.minimum(found_N, np.int32(wanted))


def require_short(template: Template, *, model: str) -> None:
    """Check that a template adds no more than `effective_lengths` allows for.

    Raises:
        UserError: it adds more: texts of two lengths that are cut differently would share a vector.
    """
    for role in ("query", "document"):
        frame = getattr(template, role).replace("{text}", "").replace("{instruction}", "")
        added = len(frame.encode())
        if added > _TEMPLATE_BYTES:
            raise UserError(
                f"{model}: the template of a {role} adds {added} bytes to a text",
                allowed=f"{_TEMPLATE_BYTES} where texts share vectors",
                fix="score this model with `diffembed evaluate run`, or shorten its template",
            )


def costs(
    instruction: str, sizes_N: NDArray[np.int64], lengths_N: NDArray[np.int32]
) -> NDArray[np.float64]:
    """(N,) work to embed each text, in tokens of a short text."""
    tokens_N = (sizes_N + len(instruction.encode())) / _BYTES_PER_TOKEN + 1
    tokens_N = np.minimum(tokens_N, lengths_N)
    return text_cost(tokens_N, _ATTENTION_TOKENS)


def digests(
    role: Role, instruction: str, texts: pa.LargeStringArray, lengths_N: NDArray[np.int32]
) -> NDArray[np.uint64]:
    """(N, 2) 16 bytes that stand for role, instruction, length and text."""
    starts = {
        int(length): hashlib.sha256(f"{role}\0{instruction}\0{length}\0".encode())
        for length in np.unique(lengths_N)
    }
    bounds, data = _offsets(texts).tolist(), memoryview(texts.buffers()[2] or b"")
    found = bytearray()
    for row, length in enumerate(lengths_N.tolist()):
        digest = starts[length].copy()
        digest.update(data[bounds[row] : bounds[row + 1]])
        found += digest.digest()[:16]
    return np.frombuffer(bytes(found), dtype=np.uint64).reshape(-1, 2)


def _offsets(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    """(N + 1,) where each text begins in the array's bytes."""
    offsets: NDArray[np.int64] = np.frombuffer(texts.buffers()[1], dtype=np.int64)
    return offsets[texts.offset : texts.offset + len(texts) + 1]


# Columns of a block's texts.
SCHEMA = pa.schema(
    [
        ("role", pa.string()),
        ("instruction", pa.string()),
        ("max_length", pa.int32()),
        ("text", pa.large_string()),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DistinctTexts:
    """Each distinct text once, dearest first; letters: N texts.

    Attributes:
        listings: what the places refer to.
        texts: the texts of each listing.
        places: (N, 3) listing, row of its file, head.
        lengths: (N,) maximum length of each text.
        costs: (N,) descending.
        digests: (N, 2).
    """

    listings: Sequence[Listing]
    texts: Sequence[pa.LargeStringArray]
    places: NDArray[np.int64]
    lengths: NDArray[np.int32]
    costs: NDArray[np.float64]
    digests: NDArray[np.uint64]

    @classmethod
    def of(cls, listings: Sequence[Listing]) -> DistinctTexts:
        """Drop repetitions and sort.

        Raises:
            RuntimeError: two texts share the 8 bytes by which they are found.
        """
        digests_N2 = np.concatenate([listing.digests for listing in listings])
        _, first, inverse = np.unique(digests_N2[:, 0], return_index=True, return_inverse=True)
        if (digests_N2[first, 1][inverse] != digests_N2[:, 1]).any():
            raise RuntimeError("two texts share the first 8 bytes of their digest")
        costs = np.concatenate([listing.costs for listing in listings])
        # Ties by digest: the same texts give the same blocks, whatever the order of tasks.
        order = first[np.lexsort((digests_N2[first, 0], -costs[first]))]
        owner = np.repeat(np.arange(len(listings)), [len(listing.rows) for listing in listings])
        rows = np.concatenate([listing.rows for listing in listings])
        head = np.concatenate([listing.head for listing in listings])
        return cls(
            listings=listings,
            texts=[listing.texts() for listing in listings],
            places=np.stack([owner, rows, head], axis=1)[order],
            lengths=np.concatenate([listing.lengths for listing in listings])[order],
            costs=costs[order],
            digests=digests_N2[order],
        )

    def only(self, chosen_N: NDArray[np.bool_]) -> DistinctTexts:
        """Some of the texts, in the same order."""
        return dataclasses.replace(
            self,
            places=self.places[chosen_N],
            lengths=self.lengths[chosen_N],
            costs=self.costs[chosen_N],
            digests=self.digests[chosen_N],
        )

    def block(self, rows: range) -> pa.RecordBatch:
        """The texts of a block with what they are asked for."""
        places = self.places[rows.start : rows.stop]
        heads = [self.listings[owner].heads[head] for owner, _, head in places.tolist()]
        by_owner = np.argsort(places[:, 0], kind="stable")
        taken = [
            self.texts[owner].take(pa.array(places[places[:, 0] == owner, 1]))
            for owner in np.unique(places[:, 0])
        ]
        texts = pa.concat_arrays(taken).take(pa.array(np.argsort(by_owner)))
        return pa.RecordBatch.from_arrays(
            [
                pa.array([role for role, _ in heads]),
                pa.array([instruction for _, instruction in heads]),
                pa.array(self.lengths[rows.start : rows.stop]),
                texts,
            ],
            schema=SCHEMA,
        )


# How a text is asked for: its role, and the instruction before it.
Head = tuple[Role, str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to list of a task: queries with each instruction, and all texts at each length."""

    task: str
    instructions: tuple[str, ...]
    lengths: tuple[int, ...]
    own: OwnTask | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Every occurrence of a text in a task, with repetitions; letters: N occurrences.

    Attributes:
        path: an Arrow file whose one column holds the texts.
        heads: ways in which texts are asked for.
        rows: (N,) row of the text in the file.
        head: (N,) place in `heads`.
        lengths: (N,) maximum length.
        costs: (N,) work to embed it.
        digests: (N, 2) what it is known by.
    """

    path: Path
    heads: tuple[Head, ...]
    rows: NDArray[np.int64]
    head: NDArray[np.int64]
    lengths: NDArray[np.int32]
    costs: NDArray[np.float64]
    digests: NDArray[np.uint64]

    def texts(self) -> pa.LargeStringArray:
        """The texts, memory-mapped."""
        with pa.memory_map(str(self.path)) as file:
            return pyarrow.ipc.open_file(file).get_batch(0).column(0)


def list_task(
    request: Request, *, snapshots: Path | None, all_lengths: Sequence[int], folder: Path
) -> Listing:
    """Load a task's data, prove them complete and list their texts.

    Args:
        all_lengths: lengths of the whole evaluation, ascending; texts that fit share the shortest.
        folder: where the file of texts goes.

    Raises:
        UserError: the task's data are missing or incomplete.
    """
    # Here, not at the top: reading a plan must not load mteb.
    from pipeline.evaluation.datasets import task_texts

    documents, queries = task_texts(request.task, snapshots=snapshots, own=request.own)
    texts = pa.array(documents + queries, type=pa.large_string())
    heads: tuple[Head, ...] = (("document", ""), *(("query", i) for i in request.instructions))
    parts = []
    for place, (role, instruction) in enumerate(heads):
        first, count = (0, len(documents)) if role == "document" else (len(documents), len(queries))
        own = texts.slice(first, count)
        sizes_N = byte_sizes(own)
        for wanted in request.lengths:
            lengths_N = effective_lengths(instruction, sizes_N, wanted, all_lengths)
            parts.append(
                (
                    np.arange(first, first + count),
                    np.full(count, place),
                    lengths_N,
                    costs(instruction, sizes_N, lengths_N),
                    digests(role, instruction, own, lengths_N),
                )
            )
    rows, head, lengths, work, words = (
        np.concatenate(columns) for columns in zip(*parts, strict=True)
    )
    path = folder / f"{request.task}.arrow"
    _write(path, texts)
    return Listing(
        path=path, heads=heads, rows=rows, head=head, lengths=lengths, costs=work, digests=words
    )


def _write(path: Path, texts: pa.LargeStringArray) -> None:
    batch = pa.record_batch([texts], names=["text"])
    with pa.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
