"""Apply the rules to what the retrievers found, one block of queries at a time.

    positive scores of all blocks, found-KEY --measure_levels--> picked-KEY/levels.json
    found-KEY of all retrievers, marks, known positives, levels --> picked-KEY/000000.npz

A file holds the kept candidates of each query in their merged order, and counts for the audit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.batch import IntArray, Ragged
from pipeline.data.order import permute
from pipeline.data.prepare.clean import hashes_from_arrow
from pipeline.data.prepare.tokenise import NUM_HASHES
from pipeline.files import load_arrays, read_record, save_arrays, write_sealed
from pipeline.mining.plan import Mining, delete_and_mine, once
from pipeline.mining.retrieve import read_found
from pipeline.mining.rules import (
    CANDIDATE,
    CONCEPT,
    DUPLICATE,
    IN_SET,
    NEAR,
    OUTCOMES,
    POSITIVE,
    QUERY,
    Candidates,
    Judged,
    Limits,
    Outcomes,
    choose,
    judge,
    merge,
)
from pipeline.mining.texts import KnownPositives, lowest_scores, positives_of, read_texts

# Rows that the audit shows, and documents of each.
NUM_SAMPLES = 50
_SAMPLE_DOCUMENTS = 10
# Best allowed documents that are compared between retrievers.
_AGREEMENT = 10


def sample_examples(num_examples: int) -> IntArray:
    """Return the numbers of the examples that the audit shows, ascending."""
    # The first numbers of a fixed shuffle: the same in every mining of these shards.
    wanted = np.arange(min(NUM_SAMPLES, num_examples))
    found: IntArray = np.sort(permute(wanted, num_examples, 0))
    return found


def source_of_examples(mining: Mining, ids: IntArray) -> IntArray:
    """Return the number of each example's source in the manifest."""
    manifest = mining.source.manifest
    names = [source.name for source in manifest.sources]
    # Groups are in the order of the examples; a source has one for each of its instructions.
    starts = np.array([group.start for group in manifest.groups])
    sources = np.array([names.index(group.source) for group in manifest.groups])
    found: IntArray = sources[np.searchsorted(starts, ids, side="right") - 1]
    return found


def measure_levels(mining: Mining, task: int) -> None:
    """Write the percentile of all positives' scores that each retriever's margin names."""
    levels: list[float | None] = []
    for number, retriever in enumerate(mining.config.retrievers):
        percentile = mining.config.margin_of(retriever).percentile
        if percentile is None:
            levels.append(None)
            continue
        blocks = range(len(mining.query_blocks))
        scores = [read_found(mining, number, block)["positive_scores"] for block in blocks]
        levels.append(float(np.percentile(np.concatenate(scores), percentile)))
    write_sealed(mining.store("picked") / "levels.json", {"levels": levels})


def _text_keys(mining: Mining) -> NDArray[np.bytes_]:
    """(M,) hash of the bare text of every document: 16 bytes each in every process."""

    def read() -> NDArray[np.bytes_]:
        blocks = range(len(mining.document_blocks))
        columns = [read_texts(mining, "documents", block)["key"] for block in blocks]
        return np.concatenate([hashes_from_arrow(column) for column in columns])

    return once(mining.store("texts"), "keys", read)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Marks:
    """Marks of all documents that a block of queries concerns: ones found, and positives.

    Attributes:
        documents: (N,) numbers, ascending.
        signatures: (N, NUM_HASHES); zeros without near-duplicates in the config.
        in_sets: (N,) True in an evaluation set.
    """

    documents: IntArray
    signatures: NDArray[np.uint32]
    in_sets: NDArray[np.bool_]

    def rows(self, documents: IntArray) -> IntArray:
        """Return the rows of some of the documents."""
        found: IntArray = np.searchsorted(self.documents, documents)
        return found


def _gather_marks(mining: Mining, documents: IntArray) -> _Marks:
    """Read the marks of ascending documents, each file once."""
    signatures = np.zeros((len(documents), NUM_HASHES), dtype=np.uint32)
    in_sets = np.zeros(len(documents), dtype=bool)
    for number, block in enumerate(mining.document_blocks):
        own = block.slice_of(documents)
        rows = documents[own] - block.first
        if not len(rows):
            continue
        path = mining.marks(number)
        stored = load_arrays(path, "signatures", "in_sets", fix=delete_and_mine(path))
        in_sets[own] = stored["in_sets"][rows]
        # Empty where the config names no near-duplicates.
        if len(stored["signatures"]):
            signatures[own] = stored["signatures"][rows]
    return _Marks(documents=documents, signatures=signatures, in_sets=in_sets)


def forbid(
    mining: Mining,
    documents: IntArray,
    *,
    positives: IntArray,
    concept: IntArray,
    query: bytes,
    marks: _Marks,
) -> Outcomes:
    """(K,) why each document can never be a negative of a query; CANDIDATE where it can.

    Args:
        mining: the mining.
        documents: (K,) their numbers.
        positives: of this query, over all examples.
        concept: positives of its concept.
        query: hash of its bare text.
        marks: of all these documents.
    """
    keys, rows = _text_keys(mining), marks.rows(documents)
    outcomes = np.full(len(documents), CANDIDATE, dtype=np.int8)
    # From the last rule of `OUTCOMES` to the first, which overwrites the others.
    outcomes[marks.in_sets[rows]] = IN_SET
    outcomes[keys[documents] == np.bytes_(query)] = QUERY
    if mining.config.near_duplicates is not None:
        # (K, 1, H) and (1, P, H): the share of equal hashes estimates the Jaccard similarity.
        own = marks.signatures[rows][:, None]
        others = marks.signatures[marks.rows(positives)][None]
        similar = (own == others).mean(axis=2) >= mining.config.near_duplicates
        # A text without words has no signature, and is not a near-duplicate of any other.
        similar &= own.any(axis=2) & others.any(axis=2)
        outcomes[similar.any(axis=1)] = NEAR
    # Two numbers may have one bare text: with different instructions, or equal up to the cut.
    outcomes[np.isin(keys[documents], keys[positives])] = DUPLICATE
    outcomes[np.isin(documents, concept)] = CONCEPT
    outcomes[np.isin(documents, positives)] = POSITIVE
    return outcomes


def pick_block(mining: Mining, task: int) -> None:
    """Write the candidates of one block of queries."""
    config, ids = mining.config, mining.query_blocks[task].numbers
    found = [read_found(mining, number, task) for number in range(len(config.retrievers))]
    own, known = positives_of(mining, ids), _known_of(mining, ids)
    lowest = [lowest_scores(own, part["positive_scores"]) for part in found]
    listed = [part["documents"].ravel() for part in found]
    every = np.unique(np.concatenate([*listed, own.values, *(row for row, _ in known)]))
    # -1 pads lists that are shorter than `depth`.
    marks = _gather_marks(mining, every[every >= 0])
    queries = hashes_from_arrow(read_texts(mining, "queries", task)["key"])
    levels = _read_levels(mining)
    tally = _Tally(mining, ids)
    kept: list[Candidates] = []
    for row, example in enumerate(ids.tolist()):
        positives, concept = known[row]
        lists: list[Judged] = []
        for number, part in enumerate(found):
            documents = part["documents"][row]
            documents = documents[documents >= 0]
            forbidden = forbid(
                mining,
                documents,
                positives=positives,
                concept=concept,
                query=bytes(queries[row]),
                marks=marks,
            )
            margin = config.margin_of(config.retrievers[number])
            limits = Limits.of(margin, float(lowest[number][row]), levels[number])
            scores = part["scores"][row][: len(documents)]
            lists.append(judge(config, documents, scores, forbidden, limits))
        merged = merge(config, lists)
        # In the order of the merged list, whatever the order of the draws: `choose` draws again
        # among these in `write`, after the teacher has removed some.
        chosen = np.sort(choose(config, merged, config.num_kept, example))
        kept.append(merged.take(chosen))
        tally.add(row, lists)
    save_arrays(mining.block_file("picked", task), **_columns(kept), **tally.arrays())


def _known_of(mining: Mining, ids: IntArray) -> list[tuple[IntArray, IntArray]]:
    """Return the positives of each example's query and of its concept, over all examples."""
    known = once(mining.store("texts"), "known", lambda: KnownPositives(mining))
    examples = mining.source.examples
    columns = (examples.scalars(name, ids).tolist() for name in ("query_key", "concept"))
    return [
        (known.find("query_key", key), known.find("concept", concept))
        for key, concept in zip(*columns, strict=True)
    ]


def _read_levels(mining: Mining) -> list[float]:
    path = mining.store("picked") / "levels.json"
    # null without a percentile in the margin, because JSON has no NaN.
    levels = read_record(path, dict[str, list[float | None]], fix=f"delete {path}")["levels"]
    return [np.nan if level is None else level for level in levels]


def _columns(kept: list[Candidates]) -> dict[str, NDArray[Any]]:
    documents = Ragged.from_rows([row.documents for row in kept])
    return {
        "offsets": documents.offsets,
        "documents": documents.values.astype(np.int64),
        "scores": np.concatenate([row.scores for row in kept]),
        "bands": np.concatenate([row.bands for row in kept]),
        "inside": np.concatenate([row.inside for row in kept]),
    }


class _Tally:
    """Counts of a block of queries for the audit, and the verdicts on some of them."""

    def __init__(self, mining: Mining, ids: IntArray) -> None:
        num_retrievers = len(mining.config.retrievers)
        num_sources = len(mining.source.manifest.sources)
        self._sources = source_of_examples(mining, ids)
        self._is_sample = np.isin(ids, sample_examples(len(mining.source.examples)))
        self._ids = ids
        self._counts = np.zeros((num_sources, num_retrievers, len(OUTCOMES)), np.int64)
        # Sums over queries of the share of a retriever's best documents that another has, too.
        self._shared = np.zeros((num_retrievers, num_retrievers))
        # Rows of (example, retriever, document, outcome), and their scores.
        self._verdicts: list[tuple[int, int, int, int]] = []
        self._scores: list[float] = []

    def add(self, row: int, lists: list[Judged]) -> None:
        """Count one query's outcomes: a list for each retriever."""
        for number, part in enumerate(lists):
            counts = np.bincount(part.outcomes, minlength=len(OUTCOMES))
            self._counts[self._sources[row], number] += counts
        best = [part.documents[(part.ranks > 0) & (part.ranks <= _AGREEMENT)] for part in lists]
        for one, left in enumerate(best):
            for other, right in enumerate(best):
                self._shared[one, other] += len(np.intersect1d(left, right)) / max(1, len(left))
        if not self._is_sample[row]:
            return
        for number, part in enumerate(lists):
            for place in range(min(_SAMPLE_DOCUMENTS, len(part.documents))):
                document, verdict = int(part.documents[place]), int(part.outcomes[place])
                self._verdicts.append((int(self._ids[row]), number, document, verdict))
                self._scores.append(float(part.scores[place]))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the counts as arrays of a block's file."""
        return {
            "counts": self._counts,
            "shared": self._shared,
            # Four columns also where the block has no sample.
            "verdicts": np.array(self._verdicts, dtype=np.int64).reshape(-1, 4),
            "verdict_scores": np.array(self._scores),
        }


def read_picked(mining: Mining, block: int) -> dict[str, NDArray[Any]]:
    """Return the candidates of a block and its counts."""
    path = mining.block_file("picked", block)
    names = ("offsets", "documents", "scores", "bands", "inside")
    counts = ("counts", "shared", "verdicts", "verdict_scores")
    return load_arrays(path, *names, *counts, fix=delete_and_mine(path))
