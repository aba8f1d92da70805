"""Find near-duplicate documents with MinHash.

    sign   text -> word 5-grams -> 128 smallest hashes, in 16 bands of 8 -> one key per band
    pair   documents with the same key in a band -> compare all 128 hashes -> (document, earlier)
    catalogue   connected documents -> the first of them is kept

Hand-written, because libraries choose other hash functions: other signatures would merge other
documents, so that shards made before could not be made again.

Letters: R documents of a slice, D of the dataset, S shingles of a text, P pairs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.data.batch import IntArray
from pipeline.data.order import mix
from pipeline.data.prepare.clean import read_distinct_texts
from pipeline.data.prepare.contamination import GOLDEN_RATIO, hash_ngrams, hash_words
from pipeline.data.prepare.plan import Build, PairSummary, SignSummary
from pipeline.data.shards import map_batch
from pipeline.files import save_array

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
    heads = np.repeat(order[starts], np.diff(np.append(starts, len(ordered))))
    different = order != heads
    later, earlier = order[different], heads[different]
    similar = _similarity(build, later, earlier) >= (build.config.near_duplicates or 1.0)
    save_array(build.pairs(task), np.stack([later[similar], earlier[similar]]))
    build.write_summary(task, PairSummary(pairs=int(similar.sum())))


def _similarity(build: Build, left: IntArray, right: IntArray) -> NDArray[np.float64]:
    """(P,) estimated Jaccard similarity of pairs of documents, numbered over all slices."""
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
