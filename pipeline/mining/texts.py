"""Restore the texts of shards, add further corpora, and mark documents that cannot be negatives.

    corpora   rows of the sources -> documents that the dataset lacks -> shards like its own
    texts     tokens -> text and instruction; compared with the hash of the text that was prepared
    marks     text -> MinHash signature; in an evaluation set or not
    known     positives of every query and concept, over all examples

Shards hold tokens only. A decoded text is known to be exact when its hash is the stored one; a
tokenizer that drops case or spaces gives another text that has the same tokens again, which is the
same to every model with that tokenizer, and to BM25.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import SourceConfig, Template
from pipeline.data.batch import IntArray, Ragged
from pipeline.data.manifest import LengthHistogram, ShardInfo
from pipeline.data.prepare.clean import hash_text, hashes_to_arrow
from pipeline.data.prepare.contamination import ContaminationIndex, build_index
from pipeline.data.prepare.tokenise import NUM_HASHES, minhash
from pipeline.data.shards import DOCUMENT_SCHEMA, ragged_array, write_table
from pipeline.data.sources import plan_source, read_rows
from pipeline.data.sources.corpus import corpus_records
from pipeline.data.sources.records import BadRows, refuse_bad_rows, stable_hash
from pipeline.errors import UserError
from pipeline.files import (
    batch_writer,
    load_arrays,
    read_batch,
    save_arrays,
    write_sealed,
)
from pipeline.mining.plan import CorpusReport, Mining, corpora_named
from pipeline.tokenizer import TextTokenizer, load_fast_tokenizer, load_tokenizer

TEXT_SCHEMA = pa.schema(
    [("text", pa.large_string()), ("instruction", pa.large_string()), ("key", pa.binary(16))]
)
# How a decoded text compares with the one that was prepared: see `_compare`.
SAME_TEXT, CUT, SAME_TOKENS, CHANGED = range(4)
# Tokens of a shard of a corpus: 256 MiB.
_SHARD_TOKENS = 2**26
# Documents that are tokenised in one call.
_TEXTS_PER_CALL = 512


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, fingerprint: str, append_eos: bool) -> tuple[Any, TextTokenizer]:
    """Return the dataset's tokenizer, to decode and to encode.

    Raises:
        UserError: it has changed since the dataset was prepared.
    """
    tree, info = load_fast_tokenizer(path, append_eos=append_eos)
    if info.fingerprint != fingerprint:
        raise UserError(
            f"data: the tokenizer {path} has changed since the dataset was prepared",
            fix="restore it, or prepare the dataset again",
        )
    encoder = TextTokenizer(tree, eos_id=info.eos_id, append_eos=append_eos)
    return load_tokenizer(path), encoder


def open_tokenizer(mining: Mining) -> tuple[Any, TextTokenizer]:
    """Return the dataset's tokenizer, loaded once per process."""
    info = mining.source.tokenizer
    return _tokenizer(info.path, info.fingerprint, info.append_eos)


# --- further corpora -------------------------------------------------------------------------


@corpora_named()
def read_corpora(mining: Mining, task: int) -> None:
    """Write the documents of the corpora that the dataset lacks as shards.

    Raises:
        UserError: a document cannot be used.
    """
    folder = mining.store("texts")
    # In one process, because each document must be compared with all before it.
    seen = set(mining.source.documents.hashes().tolist()) if mining.config.corpora else set()
    read: dict[str, int] = {}
    repeated: dict[str, int] = {}
    left_out: dict[str, dict[str, int]] = {}
    shards: list[ShardInfo] = []
    manifest = mining.source.manifest
    lengths = LengthHistogram.of(np.empty(0, np.int64), 1)
    for rows in _shards_of(_new_documents(mining, seen, read, repeated, left_out)):
        path = folder / "corpora" / f"documents-{len(shards):05d}.arrow"
        hashes = np.array([key for key, _, _ in rows], dtype="S16")
        columns = [
            ragged_array([tokens for _, tokens, _ in rows], pa.int32()),
            hashes_to_arrow(hashes),
            pa.array([count for _, _, count in rows], pa.int32()),
        ]
        write_table(path, pa.table(columns, schema=DOCUMENT_SCHEMA))
        shards.append(ShardInfo.of(path, len(rows)))
        sizes = np.array([len(tokens) for _, tokens, _ in rows])
        lengths = lengths.plus(LengthHistogram.of(sizes, manifest.max_document_length))
    # Last: it means that the step is done, also where the config names no corpora.
    report = CorpusReport(
        shards=tuple(shards), lengths=lengths, read=read, repeated=repeated, left_out=left_out
    )
    write_sealed(folder / "corpora.json", dataclasses.asdict(report))


_Document = tuple[bytes, NDArray[np.int32], int]  # hash, tokens, tokens of the instruction


def _shards_of(documents: Iterator[_Document]) -> Iterator[list[_Document]]:
    rows: list[_Document] = []
    tokens = 0
    for document in documents:
        rows.append(document)
        tokens += len(document[1])
        if tokens >= _SHARD_TOKENS:
            yield rows
            rows, tokens = [], 0
    if rows:
        yield rows


def _new_documents(
    mining: Mining,
    seen: set[bytes],
    read: dict[str, int],
    repeated: dict[str, int],
    left_out: dict[str, dict[str, int]],
) -> Iterator[_Document]:
    """Yield the tokenised documents of all corpora that are not in `seen`; count the others."""
    if not mining.config.corpora:
        return  # without loading a tokenizer
    _, encoder = open_tokenizer(mining)
    template, limit = mining.source.template, mining.source.max_document_length
    for corpus in mining.config.corpora:
        source = corpus.as_source()
        bad = BadRows(source)
        read[source.name] = repeated[source.name] = 0
        others: collections.Counter[str] = collections.Counter()
        texts = corpus_texts(source, bad, others)
        while part := list(itertools.islice(texts, _TEXTS_PER_CALL)):
            read[source.name] += len(part)
            kept = []
            for text, instruction in part:
                string = template.format_document(text, instruction)
                key = hash_text(string)
                # As numpy keeps the hashes in `seen`: without zero bytes at their end.
                if (short := key.rstrip(b"\0")) not in seen:
                    seen.add(short)
                    prefix = len(template.document_prefix(instruction).rstrip())
                    suffix = len(template.document_suffix(instruction))
                    kept.append((key, string, prefix, suffix))
            repeated[source.name] += len(part) - len(kept)
            if kept:
                keys, strings, prefixes, suffixes = zip(*kept, strict=True)
                rows, counts = encoder.encode(strings, limit, prefixes=prefixes, suffixes=suffixes)
                yield from zip(keys, rows, counts.tolist(), strict=True)
        refuse_bad_rows(source.name, [bad.summary], read[source.name])
        if bad.dropped:
            first = f"cannot be used, the first {bad.first[0][0]}"
            others[first] += len(bad.dropped)
        left_out[source.name] = dict(others)
        if not read[source.name]:
            raise UserError(f"corpora.{source.name}: {source.path} holds no documents")


def corpus_texts(
    source: SourceConfig, bad: BadRows, left_out: collections.Counter[str]
) -> Iterator[tuple[str, str]]:
    """Yield text and instruction of every document of a source, with repetitions.

    Args:
        source: the corpus.
        bad: takes records that cannot be used.
        left_out: counts the other records that are no documents, by reason.
    """

    def count_unwanted() -> None:
        left_out["left out by `where`"] += 1

    if source.format == "mteb":
        for _, text, _ in corpus_records(source, bad.add):
            if text.strip():
                yield text, source.document_instruction
            else:
                left_out["empty"] += 1
        return
    # 16 MiB of a file in memory at a time.
    for block in plan_source(source, block_bytes=2**24):
        rows = read_rows(source, block, None, on_bad=bad.add, on_unwanted=count_unwanted)
        for _, row in rows:
            # A line is a query and its own positive.
            if row.query.strip():
                yield row.query, source.document_instruction
            else:
                left_out["empty"] += 1


# --- texts -----------------------------------------------------------------------------------


def restore_texts(mining: Mining, task: int) -> None:
    """Decode a block of documents or queries, and record how each text compares with its hash."""
    role, number = mining.text_blocks[task]
    source = mining.source
    ids = mining.blocks(role)[number].numbers
    if role == "documents":
        table, limit = source.documents, source.max_document_length
        # The corpora have their own table, and no block has documents of both.
        if ids[0] >= len(table):
            table, ids = mining.added, ids - len(table)
        tokens, instructions = table.views("tokens", ids), [""] * len(ids)
    else:
        table, limit = source.examples, source.max_query_length
        tokens, instructions = table.views("query", ids), _instructions_of(mining, ids)
    counts = table.scalars("instruction_tokens", ids)
    restored = _restore(mining, role, tokens, counts, instructions)
    # Shards store the hash of a document's whole string, and of a query's bare text.
    if role == "documents":
        hashes = np.array([hash_text(whole) for whole, _, _ in restored], dtype="S16")
        equal = hashes == table.hashes()[ids]
    else:
        keys = np.array([stable_hash(text) for _, text, _ in restored], dtype=np.int64)
        equal = keys == table.scalars("query_key", ids)
    states = _compare(mining, [whole for whole, _, _ in restored], tokens, equal, limit)
    path = mining.texts(role, number)
    with batch_writer(path, TEXT_SCHEMA) as write:
        texts = [text for _, text, _ in restored]
        columns = [
            pa.array(texts, pa.large_string()),
            pa.array([instruction for _, _, instruction in restored], pa.large_string()),
            # Of the bare text, by which `pick` finds duplicates whatever their instructions are.
            pa.array([hash_text(text) for text in texts], pa.binary(16)),
        ]
        write(pa.record_batch(columns, schema=TEXT_SCHEMA))
    # Last: its existence means that the task is done.
    save_arrays(path.with_suffix(".npz"), states=states)


def _instructions_of(mining: Mining, ids: IntArray) -> list[str]:
    """Return each example's instruction; empty where its group has several."""
    # Groups are in the order of the examples.
    groups = mining.source.manifest.groups
    starts = np.array([group.start for group in groups])
    owners = np.searchsorted(starts, ids, side="right") - 1
    return [groups[owner].instruction for owner in owners.tolist()]


def _restore(
    mining: Mining,
    role: str,
    tokens: Sequence[NDArray[np.int64]],
    counts: IntArray,
    instructions: list[str],
) -> list[tuple[str, str, str]]:
    """Return the whole string, the bare text and the instruction of each row of tokens."""
    tokenizer, _ = open_tokenizer(mining)
    decode = functools.partial(
        tokenizer.batch_decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    rows = [row.tolist() for row in tokens]
    # The parts separately, too: a decoder may change the prefix, and then only tokens say where it
    # ends.
    wholes: list[str] = decode(rows)
    behind: list[str] = decode([row[n:] for row, n in zip(rows, counts.tolist(), strict=True)])
    before: list[str] = decode([row[:n] for row, n in zip(rows, counts.tolist(), strict=True)])
    template = mining.source.template
    return [
        (whole, *divide_text(template, role, whole, head, tail, instruction))
        for whole, head, tail, instruction in zip(wholes, before, behind, instructions, strict=True)
    ]


def divide_text(
    template: Template, role: str, whole: str, head: str, tail: str, instruction: str
) -> tuple[str, str]:
    """Return the text without its template, and its instruction."""
    # Documents, and queries of a group with several: the instruction is in the text alone. A query
    # template that starts with it would match the plain prefix of a document, too.
    own = role == "documents" and _same_letters(head, template.document_prefix())
    if head and not instruction and not own:
        instruction = _read_instruction(template, head)
    if role == "queries":
        prefix, suffix = template.query_prefix(instruction), template.query_suffix()
    else:
        prefix = template.document_prefix(instruction)
        suffix = template.document_suffix(instruction)
    # A tokenizer may change letters or spaces; then the tokens say where the prefix ends.
    is_whole = whole.startswith(prefix)
    text = whole.removeprefix(prefix) if is_whole else tail.removeprefix(" ")
    return text.removesuffix(suffix), instruction


def _same_letters(one: str, other: str) -> bool:
    """Compare texts without spaces and case, which a tokenizer may change."""
    first, second = ("".join(text.split()).casefold() for text in (one, other))
    return first == second


def _read_instruction(template: Template, head: str) -> str:
    """Return the instruction in the decoded prefix of a text; empty without one."""
    # The template of queries: a document that has an instruction is written as a query.
    before, found, after = template.query.partition("{text}")[0].partition("{instruction}")
    if not found:
        return ""
    # Case and spaces may have changed.
    parts = [r"\s*".join(map(re.escape, part.split())) for part in (before, after)]
    match = re.fullmatch(rf"\s*{parts[0]}\s*(.*?)\s*{parts[1]}\s*", head, re.S | re.I)
    return match[1] if match else ""


def _compare(
    mining: Mining,
    wholes: Sequence[str],
    tokens: Sequence[NDArray[np.int64]],
    equal: NDArray[np.bool_],
    limit: int,
) -> NDArray[np.int8]:
    """Say of each decoded text whether it is the prepared one, or at least has its tokens."""
    states = np.full(len(wholes), SAME_TEXT, dtype=np.int8)
    _, encoder = open_tokenizer(mining)
    others = np.flatnonzero(~equal)
    # One more than the limit: a text of `limit` tokens whose decoded form has more would be cut to
    # the same tokens, and look equal.
    again, _ = encoder.encode([wholes[row] for row in others.tolist()], limit + 1)
    for row, ids in zip(others.tolist(), again, strict=True):
        if not np.array_equal(ids, tokens[row]):
            states[row] = CHANGED
        else:
            states[row] = CUT if len(tokens[row]) >= limit else SAME_TOKENS
    return states


def read_texts(mining: Mining, role: str, block: int) -> pa.RecordBatch:
    """Return the texts of a block."""
    path = mining.texts(role, block)
    return read_batch(path, 0, fix=f"delete {path.parent.parent} and run `diffembed mine` again")


def texts_by_number(mining: Mining, role: str, numbers: IntArray) -> dict[int, str]:
    """Return the bare texts of some documents or queries by their numbers."""
    wanted = np.unique(numbers)
    found: dict[int, str] = {}
    for place, block in enumerate(mining.blocks(role)):
        own = wanted[block.slice_of(wanted)]
        if len(own):
            column = read_texts(mining, role, place)["text"].take(own - block.first)
            found |= zip(own.tolist(), column.to_pylist(), strict=True)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextCounts:
    """Count texts that were restored exactly, only up to a cut, only by their tokens, or not."""

    exact: int
    cut: int
    same_tokens: int
    changed: int


def count_states(mining: Mining) -> TextCounts:
    """Count the outcomes of `restore_texts` over all documents and queries."""
    counts = np.zeros(4, dtype=np.int64)
    for role, number in mining.text_blocks:
        path = mining.texts(role, number).with_suffix(".npz")
        states = load_arrays(path, "states", fix=f"delete {path}")["states"]
        counts += np.bincount(states, minlength=4)
    exact, cut, same, changed = counts.tolist()
    return TextCounts(exact=exact, cut=cut, same_tokens=same, changed=changed)


# --- marks -----------------------------------------------------------------------------------


def mark_documents(mining: Mining, task: int) -> None:
    """Sign the texts of a block of documents, and look them up in the evaluation sets."""
    texts = read_texts(mining, "documents", task)["text"].to_pylist()
    config = mining.config
    signatures = np.zeros((len(texts) if config.near_duplicates else 0, NUM_HASHES), np.uint32)
    if config.near_duplicates:
        for row, text in enumerate(texts):
            signatures[row] = minhash(text)
    in_sets = np.zeros(len(texts), dtype=bool)
    if config.decontaminate is not None:
        index = ContaminationIndex(config.decontaminate, mining.store("marks") / "contamination")
        in_sets[:] = [index.find(text, is_query=False) is not None for text in texts]
    save_arrays(mining.marks(task), signatures=signatures, in_sets=in_sets)


def index_evaluation_sets(mining: Mining, task: int) -> None:
    """Hash the evaluation sets whose texts are never negatives."""
    assert mining.config.decontaminate is not None
    build_index(mining.config.decontaminate, mining.store("marks") / "contamination")


# --- known positives -------------------------------------------------------------------------


def list_known(mining: Mining, task: int) -> None:
    """List the positives of every query, and of every concept, over all examples."""
    examples = mining.source.examples
    ids = np.arange(len(examples), dtype=np.int64)
    positives = examples.ragged("positives", ids)
    arrays: dict[str, NDArray[Any]] = {}
    for name in ("query_key", "concept"):
        values = examples.scalars(name, ids)
        # -1 marks an example without a concept; a query always has a key, which is never -1.
        used = np.flatnonzero(values[positives.rows] != -1)
        pairs = np.stack([values[positives.rows[used]], positives.values[used]])
        pairs = np.unique(pairs, axis=1)
        labels, starts = np.unique(pairs[0], return_index=True)
        arrays |= {
            f"{name}_labels": labels,
            f"{name}_offsets": np.append(starts, pairs.shape[1]),
            f"{name}_documents": pairs[1],
        }
    save_arrays(mining.store("texts") / "known.npz", **arrays)


class KnownPositives:
    """The positives of a query, and of its concept, over all examples."""

    def __init__(self, mining: Mining) -> None:
        path = mining.store("texts") / "known.npz"
        names = [
            f"{name}_{part}"
            for name in ("query_key", "concept")
            for part in ("labels", "offsets", "documents")
        ]
        self._arrays = load_arrays(path, *names, fix=f"delete {path}")

    def find(self, name: str, label: int) -> IntArray:
        """Return the documents of one `query_key` or `concept`."""
        labels, offsets = self._arrays[f"{name}_labels"], self._arrays[f"{name}_offsets"]
        place = int(np.searchsorted(labels, label))
        if place == len(labels) or labels[place] != label:
            return np.empty(0, dtype=np.int64)
        found: IntArray = self._arrays[f"{name}_documents"][offsets[place] : offsets[place + 1]]
        return found


def positives_of(mining: Mining, ids: IntArray) -> Ragged:
    """Return the positives of examples, of which each has at least one."""
    return mining.source.examples.ragged("positives", ids)


def lowest_scores(positives: Ragged, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) score of each example's hardest positive, the one with the lowest: margins refer to it.

    Args:
        positives: from `positives_of`.
        scores: of the positives, value for value.
    """
    lowest: NDArray[np.float64] = np.minimum.reduceat(scores, positives.offsets[:-1])
    return lowest
