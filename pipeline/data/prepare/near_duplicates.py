"""Find near-duplicate documents with MinHash."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.data.batch import IntArray
from pipeline.data.order import mix
from pipeline.data.prepare.clean import read_chosen_texts
from pipeline.data.prepare.contamination import GOLDEN_RATIO, hash_ngrams, hash_words
from pipeline.data.prepare.plan import Build
from pipeline.data.shards import map_batch
from pipeline.files import atomic_path, write_json

NUM_BANDS = 16
_ROWS_PER_BAND = 8
NUM_HASHES = NUM_BANDS * _ROWS_PER_BAND
_SHINGLE_WORDS = 5
_SALTS = mix(np.arange(1, NUM_HASHES + 1, dtype=np.uint64) * np.uint64(GOLDEN_RATIO))


def minhash(text: str) -> NDArray[np.uint32]:
    """(NUM_HASHES,) MinHash signature of a text's word 5-grams (Broder, 1997).

    The share of equal places in two signatures estimates the Jaccard similarity of the sets with a
    standard error of at most 0.045.
    """
    shingles = np.unique(hash_ngrams(hash_words(text), _SHINGLE_WORDS))
    if not len(shingles):
        return np.zeros(NUM_HASHES, dtype=np.uint32)
    hashed = mix(shingles[None, :] ^ _SALTS[:, None])  # (NUM_HASHES, S)
    smallest: NDArray[np.uint64] = hashed.min(axis=1)
    return (smallest >> np.uint64(32)).astype(np.uint32)


def band_keys(signatures: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """(NUM_BANDS, R) keys of (R, NUM_HASHES) signatures; near-duplicates share one of them.

    With 16 bands of 8, texts of similarity 0.9 meet with probability 0.9999, of 0.7 with 0.61.
    """
    keys = np.zeros((NUM_BANDS, len(signatures)), dtype=np.uint64)
    for band in range(NUM_BANDS):
        for place in range(band * _ROWS_PER_BAND, (band + 1) * _ROWS_PER_BAND):
            keys[band] = mix(keys[band] * np.uint64(GOLDEN_RATIO) + signatures[:, place])
    return keys


def sign_slice(build: Build, task: int) -> None:
    """Write the signatures and band keys of one slice's documents."""
    documents = read_chosen_texts(build, task, None)
    signatures = np.zeros((len(documents), NUM_HASHES), dtype=np.uint32)
    for row, document in enumerate(documents):
        signatures[row] = minhash(document.text)
    for suffix, array in (("signatures", signatures), ("bands", band_keys(signatures))):
        path = build.beside("sign", task, suffix)
        with atomic_path(path) as temporary, temporary.open("wb") as handle:
            np.save(handle, array)
    write_json(build.output("sign", task), {"documents": len(documents)})


def pair_band(build: Build, task: int) -> None:
    """Compare documents that share one band; write pairs (document, earlier one it repeats)."""
    num_slices = build.plan.num_slices
    keys = np.concatenate(
        [
            np.load(build.beside("sign", number, "bands"), mmap_mode="r")[task]
            for number in range(num_slices)
        ]
    )
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    # Each run of equal keys is compared with its first document.
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]  # none of none
    starts = np.flatnonzero(first)
    heads = np.repeat(order[starts], np.diff(np.append(starts, len(ordered))))
    different = order != heads
    later, earlier = order[different], heads[different]
    similar = _similarity(build, later, earlier) >= (build.config.near_duplicates or 1.0)
    path = build.beside("pair", task, "pairs")
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, np.stack([later[similar], earlier[similar]]))
    write_json(build.output("pair", task), {"pairs": int(similar.sum())})


def _similarity(build: Build, left: IntArray, right: IntArray) -> NDArray[np.float64]:
    """Estimated Jaccard similarity of pairs of documents, by places in the catalogue."""
    sizes = [
        map_batch(build.beside("dedup", number, "documents")).num_rows
        for number in range(build.plan.num_slices)
    ]
    ends = np.cumsum(sizes)
    wanted, inverse = np.unique(np.concatenate([left, right]), return_inverse=True)
    signatures = np.empty((len(wanted), NUM_HASHES), dtype=np.uint32)
    slices = np.searchsorted(ends, wanted, side="right")
    for number in np.unique(slices).tolist():
        own = slices == number
        stored = np.load(build.beside("sign", number, "signatures"), mmap_mode="r")
        signatures[own] = stored[wanted[own] - (ends[number] - sizes[number])]
    equal = signatures[inverse[: len(left)]] == signatures[inverse[len(left) :]]
    similarity: NDArray[np.float64] = equal.mean(axis=1, dtype=np.float64)
    return similarity


def representatives(build: Build, num_documents: int) -> IntArray:
    """(D,) for each document the first of those it is a near-duplicate of, itself if none."""
    first = np.arange(num_documents, dtype=np.int64)
    if build.config.near_duplicates is None:
        return first
    pairs = [np.load(build.beside("pair", band, "pairs")) for band in range(NUM_BANDS)]
    return join_pairs(first, np.unique(np.concatenate(pairs, axis=1), axis=1))


def join_pairs(first: IntArray, pairs: IntArray) -> IntArray:
    """Give all members of a connected group its smallest number.

    Args:
        first: (D,) numbers 0..D-1.
        pairs: (2, P) connected numbers.
    """
    while True:
        left, right = first[pairs[0]], first[pairs[1]]
        if np.array_equal(left, right):
            return first
        smaller = np.minimum(left, right)
        np.minimum.at(first, left, smaller)
        np.minimum.at(first, right, smaller)
        # Chains of representatives are cut short before the next round.
        while not np.array_equal(first, shorter := first[first]):
            first = shorter
