"""One task's texts as columns: what decides about them in memory, the texts in an Arrow file.

Only the small columns travel between processes, and no text is ever a Python object of the plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from pipeline.config import OwnTask
from pipeline.evaluation.blocks.keys import byte_sizes, costs, digests, effective_lengths
from pipeline.evaluation.tasks.texts import Role

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
    from pipeline.evaluation.tasks.snapshots import task_texts

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
