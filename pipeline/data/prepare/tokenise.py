"""Number documents, tokenise them, and sort examples by group."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.batch import IntArray, Ragged
from pipeline.data.prepare.clean import (
    MAX_INSTRUCTIONS,
    FramedText,
    binary_to_numpy,
    fixed_binary,
    read_chosen_texts,
)
from pipeline.data.prepare.near_duplicates import representatives
from pipeline.data.prepare.plan import Build, Hashes, write_dropped
from pipeline.data.shards import (
    DOCUMENT_SCHEMA,
    EXAMPLE_SCHEMA,
    Dataset,
    map_batch,
    ragged_array,
    write_table,
)
from pipeline.data.sources.records import EXCERPT
from pipeline.errors import UserError
from pipeline.files import atomic_path, write_json


def earlier_tokens(build: Build, hashes: Hashes) -> list[tuple[NDArray[np.int32], int] | None]:
    """For each document its tokens, and how many are its instruction's; None where not whole."""
    found: list[tuple[NDArray[np.int32], int] | None] = [None] * len(hashes)
    if build.config.reuse is None:
        return found
    dataset = open_earlier(build)
    stored = _stored_hashes(build.config.reuse)
    places = np.minimum(np.searchsorted(stored, hashes), len(stored) - 1)
    rows = np.flatnonzero(stored[places] == hashes)
    lengths = dataset.documents.lengths("tokens", places[rows])
    # A text that reaches the earlier limit may have been cut there.
    whole = lengths < dataset.max_document_length
    whole &= lengths <= build.config.max_document_length
    rows = rows[whole]
    views = dataset.documents.views("tokens", places[rows])
    skipped = dataset.documents.scalars("instruction_tokens", places[rows])
    for row, view, count in zip(rows.tolist(), views, skipped.tolist(), strict=True):
        found[row] = view.astype(np.int32), count
    return found


def open_earlier(build: Build) -> Dataset:
    """The dataset named by `reuse`.

    Raises:
        UserError: it was made with another tokenizer, or with other special tokens.
    """
    assert build.config.reuse is not None
    dataset = _open(build.config.reuse)
    earlier, own = dataset.tokenizer, build.plan.tokenizer
    if (earlier.fingerprint, earlier.append_eos) != (own.fingerprint, own.append_eos):
        raise UserError(
            f"reuse: {build.config.reuse} was prepared with another tokenizer or append_eos than "
            f"{build.config.tokenizer}",
            fix="remove `reuse` from the config",
        )
    return dataset


@functools.lru_cache(maxsize=1)
def _open(path: Path) -> Dataset:
    return Dataset.open(path)


@functools.lru_cache(maxsize=1)
def _stored_hashes(path: Path) -> Hashes:
    """Hashes of all documents of a dataset; they are sorted, as documents are."""
    return _open(path).documents.hashes()


_TEXTS_PER_CALL = 512


def make_catalogue(build: Build, task: int) -> None:
    """Number the documents in the order of their hashes, and name the groups of examples.

    A near-duplicate gets the number of the document that stands for it. A source with more than
    1,024 instructions has one of its own for each query; its examples form one group.
    """
    plan = build.plan
    slices = [
        binary_to_numpy(map_batch(build.beside("dedup", number, "documents")).column("hash"))
        for number in range(plan.num_slices)
    ]
    sizes = [len(part) for part in slices]
    first = representatives(build, sum(sizes))
    kept = first == np.arange(len(first))
    numbers = np.cumsum(kept) - 1
    _save(build, "hashes", np.concatenate(slices))
    _save(build, "numbers", numbers[first])
    _save(build, "first", first)
    instructions: list[set[str]] = [set() for _ in plan.sources]
    for number, planned in enumerate(plan.blocks):
        found = json.loads(build.output("collect", number).read_text())["instructions"]
        # One more than the limit is enough to know that the limit is passed.
        if len(instructions[planned.source]) <= MAX_INSTRUCTIONS:
            instructions[planned.source].update(found)
    groups = [
        [source, instruction]
        for source, names in enumerate(instructions)
        for instruction in (sorted(names) if len(names) <= MAX_INSTRUCTIONS else [""])
    ]
    write_json(build.output("catalogue", task), {"groups": groups, "slices": sizes})


def _save(build: Build, suffix: str, array: NDArray[Any]) -> None:
    path = build.beside("catalogue", 0, suffix)
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, array)


def _load(build: Build, suffix: str) -> NDArray[Any]:
    """A column of the catalogue, memory-mapped: all documents in the order of their hashes."""
    column: NDArray[Any] = np.load(build.beside("catalogue", 0, suffix), mmap_mode="r")
    return column


def read_groups(build: Build) -> list[list[Any]]:
    """The groups of examples in their order on disk, as [number of the source, instruction]."""
    groups: list[list[Any]] = json.loads(build.output("catalogue", 0).read_text())["groups"]
    return groups


def tokenise_slice(build: Build, task: int) -> None:
    """Tokenise the documents of one slice that are kept, in the order of their hashes."""
    sizes = json.loads(build.output("catalogue", 0).read_text())["slices"]
    start = sum(sizes[:task])
    first = np.asarray(_load(build, "first")[start : start + sizes[task]])
    kept = first == np.arange(start, start + sizes[task])
    _report_near_duplicates(build, task, np.flatnonzero(~kept), first[~kept])
    hashes = np.asarray(_load(build, "hashes")[start : start + sizes[task]])[kept]
    known = earlier_tokens(build, hashes)
    missing = np.array([tokens is None for tokens in known], dtype=bool)
    wanted = np.flatnonzero(kept)[missing]
    limit = build.config.max_document_length
    fresh = zip(*_encode(build, read_chosen_texts(build, task, wanted), limit), strict=True)
    rows = [next(fresh) if row is None else row for row in known]
    tokens = [ids for ids, _ in rows]
    skipped = pa.array([count for _, count in rows], pa.int32())
    columns = [ragged_array(tokens, pa.int32()), fixed_binary(hashes), skipped]
    write_table(
        build.beside("tokenise", task, "documents"), pa.table(columns, schema=DOCUMENT_SCHEMA)
    )
    write_json(
        build.output("tokenise", task),
        {
            "kept": len(hashes),
            "near_duplicates": int((~kept).sum()),
            "tokenised": len(wanted),
            "tokens": sum(len(row) for row in tokens),
        },
    )


def _report_near_duplicates(build: Build, task: int, places: IntArray, first: IntArray) -> None:
    numbers = _load(build, "numbers")
    documents = read_chosen_texts(build, task, places)
    entries = [
        {
            "source": "",
            "where": "documents",
            "dropped": "document",
            "reason": "near-duplicate",
            "text": document.text[:EXCERPT],
            "detail": f"document {numbers[other]} stands for it",
        }
        for document, other in zip(documents, first.tolist(), strict=True)
    ]
    write_dropped(build, "tokenise", task, entries)


def _encode(
    build: Build, texts: list[FramedText], limit: int
) -> tuple[list[NDArray[np.int32]], list[int]]:
    """Token ids of each text, and how many of them are its instruction's."""
    tokens: list[NDArray[np.int32]] = []
    skipped: list[int] = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        part = texts[start : start + _TEXTS_PER_CALL]
        rows, counts = build.encoder.encode(
            [entry.text for entry in part],
            limit,
            prefixes=[entry.prefix for entry in part],
            suffixes=[entry.suffix for entry in part],
        )
        tokens += rows
        skipped += counts.tolist()
    return tokens, skipped


def relate_block(build: Build, task: int) -> None:
    """Tokenise the queries of one block, point them to documents, and sort them by group."""
    rows = map_batch(build.beside("collect", task, "rows"))
    groups = read_groups(build)
    source = build.plan.blocks[task].source
    group_of = {name: number for number, (owner, name) in enumerate(groups) if owner == source}
    # A source with too many instructions has the single group "".
    own = np.array(
        [group_of.get(name, group_of.get("", -1)) for name in rows["instruction"].to_pylist()],
        dtype=np.int64,
    )
    order = np.argsort(own, kind="stable")
    taken = pa.Table.from_batches([rows]).take(pa.array(order)).combine_chunks()
    positives, negatives = (
        _document_numbers(build, taken[name]) for name in ("positives", "negatives")
    )
    scores, first = taken["scores"], taken["num_first_negatives"]
    if build.config.near_duplicates is not None:
        positives, negatives, scores, first = _separate(positives, negatives, scores, first)
    framed = (taken[name].to_pylist() for name in ("query", "prefix", "suffix"))
    queries = list(map(FramedText, *framed))
    tokens, skipped = _encode(build, queries, build.config.max_query_length)
    columns = [
        ragged_array(tokens, pa.int32()),
        pa.array(skipped, pa.int32()),
        ragged_array(positives, pa.int64()),
        ragged_array(negatives, pa.int64()),
        first,
        taken["concept"],
        taken["query_key"],
        scores,
    ]
    write_table(build.beside("relate", task, "examples"), pa.table(columns, schema=EXAMPLE_SCHEMA))
    counts = np.bincount(own, minlength=len(groups))
    found = {str(number): int(counts[number]) for number in np.flatnonzero(counts)}
    write_json(build.output("relate", task), {"groups": found})


def _document_numbers(build: Build, column: pa.ChunkedArray) -> Ragged:
    """A list column of hashes as one of document numbers."""
    lists = column.combine_chunks()
    wanted: Hashes = binary_to_numpy(lists.values)
    offsets: IntArray = lists.offsets.to_numpy()
    numbers: IntArray = _load(build, "numbers")[np.searchsorted(_load(build, "hashes"), wanted)]
    return Ragged(offsets=offsets, values=np.asarray(numbers, dtype=np.int64))


def _separate(
    positives: Ragged, negatives: Ragged, scores: pa.ChunkedArray, first: pa.ChunkedArray
) -> tuple[Ragged, Ragged, pa.Array, pa.Array]:
    """Clean rows again: near-duplicates of a positive or of each other have become one number."""
    out: tuple[list[Any], list[Any], list[Any], list[int]] = ([], [], [], [])
    for good, bad, score, count in zip(
        positives, negatives, scores.to_pylist(), first.to_pylist(), strict=True
    ):
        kept_good = dict.fromkeys(good.tolist())
        places = {number: len(good) - 1 - k for k, number in enumerate(good.tolist()[::-1])}
        kept_bad: dict[int, int] = {}
        for place, number in enumerate(bad.tolist()):
            if number not in kept_good:
                kept_bad.setdefault(number, place)
        out[0].append(np.array(list(kept_good), dtype=np.int64))
        out[1].append(np.array(list(kept_bad), dtype=np.int64))
        chosen = [places[n] for n in kept_good] + [len(good) + k for k in kept_bad.values()]
        out[2].append([score[place] for place in chosen] if score else [])
        out[3].append(sum(place < count for place in kept_bad.values()))
    clean = []
    for rows in out[:2]:
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        values = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        clean.append(Ragged.from_lengths(lengths, values))
    return (
        clean[0],
        clean[1],
        pa.array(out[2], pa.large_list(pa.float32())),
        pa.array(out[3], pa.int32()),
    )
