"""List every distinct text of all tasks once, with its cost.

    PlannedTask --list_texts--> TaskTexts --DistinctTexts.of--> DistinctTexts
    task, instructions,         occurrences: role,              repetitions dropped,
    lengths                     instruction, length, row        most expensive first

A text of a plan is known by the digest of everything that its vector depends on, in addition to the
model: role, instruction, length, and the text itself. For example, the query "how to loop" of two
tasks with one instruction is two occurrences of one text:

    task   row  prompt                length   cost   digest
    A        7  ("query", "Find")       4096    5.1   9f3c...
    B        2  ("query", "Find")       4096    5.1   9f3c...   dropped

Only such small columns travel between processes; the texts stay in memory-mapped Arrow files.

Letters: N texts, or occurrences of texts.
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

from pipeline.config import OwnTask, Role, Template
from pipeline.data.batch import text_cost
from pipeline.errors import UserError

# At the dense end of the benchmarks (mathematics 3.0, prose 4.3).
BYTES_PER_TOKEN = 3.5
# Length at which attention costs as much as all else in a 7 B model with 28 layers of width 3584:
# 2 x parameters / (4 x layers x width). Not training's 32,500: it decides the blocks on disk.
_ATTENTION_TOKENS = 35_000
# Bytes that a template may add to a text; tokens never outnumber bytes.
_TEMPLATE_BYTES = 128


# Columns of a block's texts: the fields of `PlannedText`.
SCHEMA = pa.schema(
    [
        ("role", pa.string()),
        ("instruction", pa.string()),
        ("max_length", pa.int32()),
        ("text", pa.large_string()),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedText:
    """A text to embed, with everything that its vector depends on in addition to the model."""

    role: Role
    instruction: str
    max_length: int
    text: str


# The role and the instruction of a text.
Prompt = tuple[Role, str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTask:
    """A task whose queries are embedded with each instruction, and all its texts at each length."""

    task: str
    instructions: tuple[str, ...]
    lengths: tuple[int, ...]
    own: OwnTask | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TaskTexts:
    """The texts of a task, with repetitions: one row per prompt and length of each.

    Attributes:
        path: an Arrow file whose one column holds the texts.
        prompts: the different ones.
        rows: (N,) row of the text in the file.
        prompt: (N,) index into `prompts`.
        lengths: (N,) maximum length.
        costs: (N,) work to embed it.
        digests: (N, 2) the identity of the text.
    """

    path: Path
    prompts: tuple[Prompt, ...]
    rows: NDArray[np.int64]
    prompt: NDArray[np.int64]
    lengths: NDArray[np.int32]
    costs: NDArray[np.float64]
    digests: NDArray[np.uint64]

    def texts(self) -> pa.LargeStringArray:
        """Return the texts, memory-mapped."""
        with pa.memory_map(str(self.path)) as file:
            return pyarrow.ipc.open_file(file).get_batch(0).column(0)


def list_texts(
    task: PlannedTask, *, snapshots: Path | None, all_lengths: Sequence[int], folder: Path
) -> TaskTexts:
    """Load a task's data, check that they are complete, and list their texts.

    Args:
        all_lengths: lengths of the whole evaluation, ascending; texts that fit share the shortest.
        folder: for the file of texts.

    Raises:
        UserError: the task's data are missing or incomplete.
    """
    # Not at the top: reading a plan must not load mteb.
    from pipeline.evaluation.datasets import load_texts

    documents, queries = load_texts(task.task, snapshots=snapshots, own=task.own)
    # One column; the texts of each prompt are a slice of it.
    texts = pa.array(documents + queries, type=pa.large_string())
    prompts: tuple[Prompt, ...] = (("document", ""), *(("query", i) for i in task.instructions))
    columns = []
    for index, (role, instruction) in enumerate(prompts):
        # Documents have no instruction: models with different wordings share them.
        first, count = (0, len(documents)) if role == "document" else (len(documents), len(queries))
        # A view of the same bytes.
        of_role = texts.slice(first, count)
        sizes_N = byte_sizes(of_role)
        for wanted in task.lengths:
            lengths_N = effective_lengths(instruction, sizes_N, wanted, all_lengths)
            columns.append(
                (
                    np.arange(first, first + count),
                    np.full(count, index),
                    lengths_N,
                    costs(instruction, sizes_N, lengths_N),
                    digests(role, instruction, of_role, lengths_N),
                )
            )
    rows, prompt, lengths, costs_N, digests_N2 = map(np.concatenate, zip(*columns, strict=True))
    path = folder / f"{task.task}.arrow"
    batch = pa.record_batch([texts], names=["text"])
    with pa.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    return TaskTexts(
        path=path,
        prompts=prompts,
        rows=rows,
        prompt=prompt,
        lengths=lengths,
        costs=costs_N,
        digests=digests_N2,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DistinctTexts:
    """Each distinct text once, most expensive first.

    Attributes:
        tasks: the tasks that hold the texts.
        texts: of each task.
        origins: (N, 3) task, row in its file, and prompt of each text.
        lengths: (N,) maximum length of each text.
        costs: (N,) descending.
        digests: (N, 2).
    """

    tasks: Sequence[TaskTexts]
    texts: Sequence[pa.LargeStringArray]
    origins: NDArray[np.int64]
    lengths: NDArray[np.int32]
    costs: NDArray[np.float64]
    digests: NDArray[np.uint64]

    @classmethod
    def of(cls, tasks: Sequence[TaskTexts]) -> DistinctTexts:
        """Drop repetitions and sort.

        Raises:
            RuntimeError: two texts share the 8 bytes that lookups search for.
        """
        # Of all tasks, with repetitions.
        digests_N2 = np.concatenate([task.digests for task in tasks])
        # Lookups search only the first 8 bytes; the rest confirms a hit.
        _, first, inverse = np.unique(digests_N2[:, 0], return_index=True, return_inverse=True)
        if (digests_N2[first, 1][inverse] != digests_N2[:, 1]).any():
            raise RuntimeError("two texts share the first 8 bytes of their digest")
        costs = np.concatenate([task.costs for task in tasks])
        # Ties by digest: the same texts give the same blocks, in whatever order the tasks are.
        order = first[np.lexsort((digests_N2[first, 0], -costs[first]))]
        # (occurrences,) of all tasks, one after another.
        task_N = np.repeat(np.arange(len(tasks)), [len(task.rows) for task in tasks])
        row_N = np.concatenate([task.rows for task in tasks])
        prompt_N = np.concatenate([task.prompt for task in tasks])
        return cls(
            tasks=tasks,
            texts=[task.texts() for task in tasks],
            origins=np.stack([task_N, row_N, prompt_N], axis=1)[order],
            lengths=np.concatenate([task.lengths for task in tasks])[order],
            costs=costs[order],
            digests=digests_N2[order],
        )

    def only(self, chosen_N: NDArray[np.bool_]) -> DistinctTexts:
        """Return some of the texts, in the same order."""
        return dataclasses.replace(
            self,
            origins=self.origins[chosen_N],
            lengths=self.lengths[chosen_N],
            costs=self.costs[chosen_N],
            digests=self.digests[chosen_N],
        )

    def block(self, rows: range) -> pa.RecordBatch:
        """Return consecutive texts with their prompts and lengths, as `SCHEMA`."""
        origins = self.origins[rows.start : rows.stop]
        prompts = [self.tasks[task].prompts[prompt] for task, _, prompt in origins.tolist()]
        # One `take` per task, then back into the order of the block.
        by_task = np.argsort(origins[:, 0], kind="stable")
        taken = [
            self.texts[task].take(pa.array(origins[origins[:, 0] == task, 1]))
            for task in np.unique(origins[:, 0])
        ]
        texts = pa.concat_arrays(taken).take(pa.array(np.argsort(by_task)))
        return pa.RecordBatch.from_arrays(
            [
                pa.array([role for role, _ in prompts]),
                pa.array([instruction for _, instruction in prompts]),
                pa.array(self.lengths[rows.start : rows.stop]),
                texts,
            ],
            schema=SCHEMA,
        )


def byte_sizes(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    """Return (N,) bytes of each text, from the offsets alone."""
    return np.diff(_offsets(texts))


def effective_lengths(
    instruction: str, sizes_N: NDArray[np.int64], wanted: int, lengths: Sequence[int]
) -> NDArray[np.int32]:
    """Return (N,) shortest lengths that give each text the same vector as the wanted length.

    A text that fits 512 tokens has the same vector at 32768, so both lengths share it. Bytes bound
    tokens, so that no tokenizer is needed.

    Args:
        sizes_N: bytes of each text.
        wanted: maximum length of the task.
        lengths: all lengths of the evaluation, ascending.
    """
    bounds_N = sizes_N + len(instruction.encode()) + _TEMPLATE_BYTES
    # Texts longer than every length keep the wanted one.
    choices = np.array([*lengths, np.iinfo(np.int32).max], dtype=np.int32)
    found_N = choices[np.searchsorted(choices, bounds_N)]
    return np.minimum(found_N, np.int32(wanted))


def require_short(template: Template, *, model: str) -> None:
    """Check that a template adds no more than `effective_lengths` allows for.

    Raises:
        UserError: it adds more: texts of two lengths that are cut differently would share a vector.
    """
    for role in ("query", "document"):
        # All that the template adds, with empty text and instruction.
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
    """Return (N,) work to embed each text, in tokens of a short text."""
    # At least one token: even an empty text has special tokens.
    tokens_N = (sizes_N + len(instruction.encode())) / BYTES_PER_TOKEN + 1
    tokens_N = np.minimum(tokens_N, lengths_N)
    return text_cost(tokens_N, _ATTENTION_TOKENS)


def digests(
    role: Role, instruction: str, texts: pa.LargeStringArray, lengths_N: NDArray[np.int32]
) -> NDArray[np.uint64]:
    """Return (N, 2): 16 bytes that identify role, instruction, length and text."""
    # Texts continue a copy of the hash of their prompt and length.
    starts = {
        int(length): hashlib.sha256(f"{role}\0{instruction}\0{length}\0".encode())
        for length in np.unique(lengths_N)
    }
    # One view of the bytes of all texts: no Python string per text.
    bounds, data = _offsets(texts).tolist(), memoryview(texts.buffers()[2] or b"")
    found = bytearray()
    for row, length in enumerate(lengths_N.tolist()):
        digest = starts[length].copy()
        digest.update(data[bounds[row] : bounds[row + 1]])
        found += digest.digest()[:16]
    return np.frombuffer(bytes(found), dtype=np.uint64).reshape(-1, 2)


def _offsets(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    """Return (N + 1,) start of each text in the array's bytes."""
    # Buffers of a string array are validity, offsets and bytes; a slice shares them.
    offsets: NDArray[np.int64] = np.frombuffer(texts.buffers()[1], dtype=np.int64)
    return offsets[texts.offset : texts.offset + len(texts) + 1]
