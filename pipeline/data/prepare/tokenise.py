"""Find near-duplicates, number the documents, tokenise them, and relate each example to its own.

    sign        text -> word 5-grams -> 128 smallest hashes, in 16 bands of 8 -> one key per band
    pair        documents with one key in a band -> compare 128 hashes -> (document, earlier)
    catalogue   connected documents -> the first of them is kept and gets a number
    tokenise    the kept documents of a slice, in the order of their hashes
    relate      positives and negatives of a block's examples -> numbers of documents

MinHash is written by hand, because libraries choose other hash functions: other signatures would
merge other documents, so that shards made before could not be made again.

Letters: R documents of a slice, D of the dataset, S shingles of a text, P pairs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.batch import IntArray, Ragged
from pipeline.data.manifest import FILE_NAME
from pipeline.data.order import GOLDEN_RATIO, mix
from pipeline.data.prepare.build import (
    Build,
    CatalogueSummary,
    CollectSummary,
    PairSummary,
    RelateSummary,
    SignSummary,
    TextHashes,
    TokeniseSummary,
    write_dropped,
)
from pipeline.data.prepare.clean import (
    MAX_INSTRUCTIONS,
    TemplatedText,
    hashes_from_arrow,
    hashes_to_arrow,
    read_distinct_texts,
)
from pipeline.data.prepare.contamination import hash_ngrams, hash_words
from pipeline.data.shards import (
    DOCUMENT_SCHEMA,
    EXAMPLE_SCHEMA,
    Dataset,
    map_batch,
    ragged_array,
    write_table,
)
from pipeline.errors import UserError
from pipeline.files import FileState, file_state, save_array

NUM_BANDS = 16
_ROWS_PER_BAND = 8
NUM_HASHES = NUM_BANDS * _ROWS_PER_BAND
_SHINGLE_WORDS = 5
# One per hash function: a hash of a shingle is mixed with it.
_SALTS = mix(np.arange(1, NUM_HASHES + 1, dtype=np.uint64) * np.uint64(GOLDEN_RATIO))


def sign_slice(build: Build, task: int) -> None:
    """Write the signatures and band keys of one slice's documents."""
    documents = read_distinct_texts(build, task, None)
    signatures = np.zeros((len(documents), NUM_HASHES), dtype=np.uint32)
    for row, document in enumerate(documents):
        signatures[row] = minhash(document.text)
    save_array(build.signatures(task), signatures)
    save_array(build.bands(task), band_keys(signatures))
    build.write_summary(task, SignSummary(documents=len(documents)))


def minhash(text: str) -> NDArray[np.uint32]:
    """Return the (NUM_HASHES,) MinHash signature of a text's word 5-grams (Broder, 1997).

    The share of equal values in two signatures estimates the Jaccard similarity of the sets with a
    standard error of at most 0.045.
    """
    shingles = np.unique(hash_ngrams(hash_words(text), _SHINGLE_WORDS))
    if not len(shingles):
        return np.zeros(NUM_HASHES, dtype=np.uint32)
    hashed = mix(shingles[None, :] ^ _SALTS[:, None])  # (NUM_HASHES, S)
    smallest: NDArray[np.uint64] = hashed.min(axis=1)
    # Half of the bits are enough: unequal ones agree by chance once in 2**32.
    return (smallest >> np.uint64(32)).astype(np.uint32)


def band_keys(signatures: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return (NUM_BANDS, R) keys of (R, NUM_HASHES) signatures; near-duplicates share one of them.

    With 16 bands of 8, texts of similarity 0.9 share a key with probability 0.9999, of 0.7 with
    0.61.
    """
    keys = np.zeros((NUM_BANDS, len(signatures)), dtype=np.uint64)
    for band in range(NUM_BANDS):
        for column in range(band * _ROWS_PER_BAND, (band + 1) * _ROWS_PER_BAND):
            keys[band] = mix(keys[band] * np.uint64(GOLDEN_RATIO) + signatures[:, column])
    return keys


def pair_band(build: Build, task: int) -> None:
    """Compare documents that share a key of one band; write the pairs that are similar enough."""
    slices = range(build.plan.num_slices)
    keys = np.concatenate([np.load(build.bands(k), mmap_mode="r")[task] for k in slices])
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    # Each run of equal keys is compared with its first document only: pairs stay linear in number.
    # The slice matters where there are no documents, and so no first one.
    is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
    starts = np.flatnonzero(is_first)
    # The stable sort puts the smallest number first in its run: it is the one to keep.
    heads = np.repeat(order[starts], np.diff(np.append(starts, len(ordered))))
    different = order != heads
    later, earlier = order[different], heads[different]
    similar = _similarity(build, later, earlier) >= (build.config.near_duplicates or 1.0)
    save_array(build.pairs(task), np.stack([later[similar], earlier[similar]]))
    build.write_summary(task, PairSummary(pairs=int(similar.sum())))


def _similarity(build: Build, left: IntArray, right: IntArray) -> NDArray[np.float64]:
    """(P,) estimated Jaccard similarity of pairs of documents, numbered over all slices."""
    # Only the signatures that occur in pairs are loaded, slice by slice.
    sizes = [map_batch(build.distinct(k)).num_rows for k in range(build.plan.num_slices)]
    ends = np.cumsum(sizes)
    wanted, inverse = np.unique(np.concatenate([left, right]), return_inverse=True)
    signatures = np.empty((len(wanted), NUM_HASHES), dtype=np.uint32)
    slices = np.searchsorted(ends, wanted, side="right")
    for number in np.unique(slices).tolist():
        own = slices == number
        stored = np.load(build.signatures(number), mmap_mode="r")
        signatures[own] = stored[wanted[own] - (ends[number] - sizes[number])]
    equal = signatures[inverse[: len(left)]] == signatures[inverse[len(left) :]]
    similarity: NDArray[np.float64] = equal.mean(axis=1, dtype=np.float64)
    return similarity


def find_representatives(build: Build, num_documents: int) -> IntArray:
    """(D,) for each document the first one that it is a near-duplicate of; itself if none."""
    first = np.arange(num_documents, dtype=np.int64)
    if not build.finds_near_duplicates:
        return first
    pairs = [np.load(build.pairs(band)) for band in range(NUM_BANDS)]
    return join_pairs(first, np.unique(np.concatenate(pairs, axis=1), axis=1))


def join_pairs(first: IntArray, pairs: IntArray) -> IntArray:
    """Give all members of a connected group its smallest number.

    Args:
        first: (D,) numbers 0..D-1; changed in place.
        pairs: (2, P) connected numbers.
    """
    # Numbers only decrease, so the loop ends.
    while True:
        left, right = first[pairs[0]], first[pairs[1]]
        if np.array_equal(left, right):
            return first
        smaller = np.minimum(left, right)
        np.minimum.at(first, left, smaller)
        np.minimum.at(first, right, smaller)
        # Shorten chains of representatives before the next round.
        while not np.array_equal(first, shorter := first[first]):
            first = shorter


def make_catalogue(build: Build, task: int) -> None:
    """Number the documents in the order of their hashes, and name the groups of examples.

    A near-duplicate gets the number of the document that is kept for it. A source with more than
    1,024 instructions probably has a different one for each query; its examples form one group.
    """
    plan = build.plan
    slices = [
        hashes_from_arrow(map_batch(build.distinct(number)).column("hash"))
        for number in range(plan.num_slices)
    ]
    sizes = [len(part) for part in slices]
    first = find_representatives(build, sum(sizes))
    kept = first == np.arange(len(first))
    # Kept documents are numbered in their order; a merged one takes the number of its first, by
    # which examples find the shared document without knowing of the merge.
    numbers = np.cumsum(kept) - 1
    save_array(build.catalogue("hashes"), np.concatenate(slices))
    save_array(build.catalogue("numbers"), numbers[first])
    save_array(build.catalogue("first"), first)
    instructions: list[set[str]] = [set() for _ in plan.sources]
    for number, planned in enumerate(plan.blocks):
        # One more than the limit is enough to know that the limit is passed.
        if len(instructions[planned.source]) <= MAX_INSTRUCTIONS:
            found = build.read_summary(CollectSummary, number).instructions
            instructions[planned.source].update(found)
    groups = [
        (source, instruction)
        for source, names in enumerate(instructions)
        for instruction in (sorted(names) if len(names) <= MAX_INSTRUCTIONS else [""])
    ]
    build.write_summary(task, CatalogueSummary(groups=groups, slices=sizes))


def _map_catalogue(build: Build, column: str) -> NDArray[Any]:
    """(D,) a column of the catalogue, memory-mapped: documents in the order of their hashes."""
    mapped: NDArray[Any] = np.load(build.catalogue(column), mmap_mode="r")
    return mapped


def tokenise_slice(build: Build, task: int) -> None:
    """Tokenise the documents of one slice that are kept, in the order of their hashes."""
    sizes = build.read_summary(CatalogueSummary, 0).slices
    start = sum(sizes[:task])
    first = np.asarray(_map_catalogue(build, "first")[start : start + sizes[task]])
    kept = first == np.arange(start, start + sizes[task])
    _report_near_duplicates(build, task, np.flatnonzero(~kept), first[~kept])
    hashes = np.asarray(_map_catalogue(build, "hashes")[start : start + sizes[task]])[kept]
    known = _reuse_tokens(build, hashes)
    # `known` has an entry for each kept document; what it lacks is tokenised in the same order.
    missing = np.array([tokens is None for tokens in known], dtype=bool)
    wanted = np.flatnonzero(kept)[missing]
    limit = build.config.max_document_length
    new = zip(*_encode(build, read_distinct_texts(build, task, wanted), limit), strict=True)
    rows = [next(new) if row is None else row for row in known]
    tokens = [ids for ids, _ in rows]
    num_instruction = pa.array([count for _, count in rows], pa.int32())
    columns = [ragged_array(tokens, pa.int32()), hashes_to_arrow(hashes), num_instruction]
    write_table(build.documents(task), pa.table(columns, schema=DOCUMENT_SCHEMA))
    build.write_summary(
        task,
        TokeniseSummary(
            kept=len(hashes),
            near_duplicates=int((~kept).sum()),
            tokens=sum(len(row) for row in tokens),
        ),
    )


def _report_near_duplicates(build: Build, task: int, merged: IntArray, first: IntArray) -> None:
    """List the documents at the positions `merged` of a slice, for which `first` are kept."""
    numbers = _map_catalogue(build, "numbers")
    documents = read_distinct_texts(build, task, merged)
    entries = [
        {
            "source": "",
            "where": "documents",
            "dropped": "document",
            "reason": "near-duplicate",
            "text": document.text,
            "detail": f"document {numbers[other]} is kept in its place",
        }
        for document, other in zip(documents, first.tolist(), strict=True)
    ]
    write_dropped(build, "tokenise", task, entries)


def _reuse_tokens(build: Build, hashes: TextHashes) -> list[tuple[NDArray[np.int32], int] | None]:
    """Return each document's tokens from the dataset of `reuse`; None if missing or cut there.

    With the tokens comes the number of them that belong to the document's instruction.
    """
    found: list[tuple[NDArray[np.int32], int] | None] = [None] * len(hashes)
    if build.config.reuse is None:
        return found
    dataset, stored = _open_earlier(build, build.config.reuse)
    # Clipped, because beyond the largest stored hash there is no entry to compare with.
    nearest = np.minimum(np.searchsorted(stored, hashes), len(stored) - 1)
    rows = np.flatnonzero(stored[nearest] == hashes)
    lengths = dataset.documents.lengths("tokens", nearest[rows])
    # A text that reaches the earlier limit may have been cut there.
    is_whole = lengths < dataset.max_document_length
    # One that is longer than the new limit has to be cut, with its suffix kept.
    is_whole &= lengths <= build.config.max_document_length
    rows = rows[is_whole]
    views = dataset.documents.views("tokens", nearest[rows])
    counts = dataset.documents.scalars("instruction_tokens", nearest[rows])
    for row, view, count in zip(rows.tolist(), views, counts.tolist(), strict=True):
        found[row] = view.astype(np.int32), count
    return found


def _open_earlier(build: Build, path: Path) -> tuple[Dataset, TextHashes]:
    """Return the dataset named by `reuse`, and the sorted hashes of its documents.

    Raises:
        UserError: it was made with another tokenizer, or with other special tokens.
    """
    dataset, hashes = _map_earlier(path, file_state(path / FILE_NAME))
    earlier, current = dataset.tokenizer, build.plan.tokenizer
    if (earlier.fingerprint, earlier.append_eos) != (current.fingerprint, current.append_eos):
        raise UserError(
            f"reuse: {path} was prepared with another tokenizer or append_eos than "
            f"{build.config.tokenizer}",
            fix="remove `reuse` from the config",
        )
    return dataset, hashes


@functools.lru_cache(maxsize=1)
def _map_earlier(path: Path, state: FileState) -> tuple[Dataset, TextHashes]:
    dataset = Dataset.open(path)
    hashes = dataset.documents.hashes()
    # Documents are searched by hash; mining puts further corpora's behind the others.
    if (hashes[1:] < hashes[:-1]).any():
        raise UserError(
            f"reuse: {path} was mined with further corpora",
            fix="name the dataset it was mined from",
        )
    return dataset, hashes


# The library's encodings, which hold more than ids, exist for this many texts at a time.
_TEXTS_PER_CALL = 512


def _encode(
    build: Build, texts: list[TemplatedText], limit: int
) -> tuple[list[NDArray[np.int32]], list[int]]:
    """Return the token ids of each text, and how many of them belong to its instruction."""
    tokens: list[NDArray[np.int32]] = []
    num_instruction: list[int] = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        part = texts[start : start + _TEXTS_PER_CALL]
        rows, counts = build.tokenizer.encode(
            [entry.text for entry in part],
            limit,
            prefixes=[entry.prefix for entry in part],
            suffixes=[entry.suffix for entry in part],
        )
        tokens += rows
        num_instruction += counts.tolist()
    return tokens, num_instruction


def relate_block(build: Build, task: int) -> None:
    """Tokenise the queries of one block, relate them to documents, and sort them by group."""
    rows = map_batch(build.rows(task))
    groups = build.read_summary(CatalogueSummary, 0).groups
    source = build.plan.blocks[task].source
    group_of = {name: number for number, (owner, name) in enumerate(groups) if owner == source}
    # A source with too many instructions has the single group "".
    group = np.array(
        [group_of.get(name, group_of.get("", -1)) for name in rows["instruction"].to_pylist()],
        dtype=np.int64,
    )
    # Stable: within a group the order of the file stays, whatever the size of blocks.
    order = np.argsort(group, kind="stable")
    ordered = pa.Table.from_batches([rows]).take(pa.array(order)).combine_chunks()
    positives, negatives = (
        _document_numbers(build, ordered[name]) for name in ("positives", "negatives")
    )
    scores, num_first = ordered["scores"], ordered["num_first_negatives"]
    if build.finds_near_duplicates:
        merged = _merge_numbers(positives, negatives, scores.to_pylist(), num_first.to_pylist())
        positives, negatives, scores, num_first = merged
    columns = (ordered[name].to_pylist() for name in ("query", "prefix", "suffix"))
    queries = list(map(TemplatedText, *columns))
    tokens, num_instruction = _encode(build, queries, build.config.max_query_length)
    table = pa.table(
        [
            ragged_array(tokens, pa.int32()),
            pa.array(num_instruction, pa.int32()),
            ragged_array(positives, pa.int64()),
            ragged_array(negatives, pa.int64()),
            num_first,
            ordered["concept"],
            ordered["query_key"],
            scores,
        ],
        schema=EXAMPLE_SCHEMA,
    )
    write_table(build.examples(task), table)
    counts = np.bincount(group, minlength=len(groups))
    found = {number: int(counts[number]) for number in np.flatnonzero(counts).tolist()}
    build.write_summary(task, RelateSummary(groups=found))


def _document_numbers(build: Build, column: pa.ChunkedArray) -> Ragged:
    """Turn a list column of hashes into one of document numbers."""
    lists = column.combine_chunks()
    wanted = hashes_from_arrow(lists.values)
    offsets: IntArray = lists.offsets.to_numpy()
    # Every hash is there: the catalogue was made from all blocks.
    found = np.searchsorted(_map_catalogue(build, "hashes"), wanted)
    numbers: IntArray = _map_catalogue(build, "numbers")[found]
    return Ragged(offsets=offsets, values=np.asarray(numbers, dtype=np.int64))


def _merge_numbers(
    positives: Ragged, negatives: Ragged, scores: list[list[float]], num_first: list[int]
) -> tuple[Ragged, Ragged, pa.Array, pa.Array]:
    """Drop repeated documents: near-duplicates of a positive or of each other have one number now.

    A repeated positive keeps the score of its first occurrence, as does a repeated negative. A
    negative that repeats a positive is dropped.
    """
    new_positives, new_negatives, new_scores, new_num_first = [], [], [], []
    for good, bad, score, count in zip(positives, negatives, scores, num_first, strict=True):
        first_good: dict[int, int] = {}  # number -> index of its first occurrence
        for index, number in enumerate(good.tolist()):
            first_good.setdefault(number, index)
        first_bad: dict[int, int] = {}
        for index, number in enumerate(bad.tolist()):
            if number not in first_good:
                first_bad.setdefault(number, index)
        new_positives.append(np.array(list(first_good), dtype=np.int64))
        new_negatives.append(np.array(list(first_bad), dtype=np.int64))
        # Scores list the positives, then the negatives, as they were before.
        chosen = [*first_good.values(), *(len(good) + index for index in first_bad.values())]
        new_scores.append([score[index] for index in chosen] if score else [])
        new_num_first.append(sum(index < count for index in first_bad.values()))
    return (
        Ragged.from_rows(new_positives),
        Ragged.from_rows(new_negatives),
        pa.array(new_scores, pa.large_list(pa.float32())),
        pa.array(new_num_first, pa.int32()),
    )
