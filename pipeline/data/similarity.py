"""How alike two texts are: word n-grams, MinHash signatures, matching characters."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import heapq
import re
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from pipeline.data.keyed import mix
from pipeline.data.sources.row import stable_hash

Words = NDArray[np.uint64]

NUM_BANDS = 16
_ROWS_PER_BAND = 8
NUM_HASHES = NUM_BANDS * _ROWS_PER_BAND
_SHINGLE_WORDS = 5
_WORD = re.compile(r"\w+")
_GOLDEN = 0x9E3779B97F4A7C15


@functools.lru_cache(maxsize=2**17)
def _word_hash(word: str) -> int:
    return stable_hash(word)


def hash_words(text: str) -> Words:
    """(W,) hash of each word; case, punctuation and spaces do not matter."""
    return np.array([_word_hash(word) for word in _WORD.findall(text.lower())], dtype=np.uint64)


def hash_ngrams(words: Words, size: int) -> Words:
    """(W - size + 1,) hash of each run of `size` words; a shorter text is one run."""
    if not len(words):
        return np.empty(0, dtype=np.uint64)
    size = min(size, len(words))
    count = len(words) - size + 1
    ngrams = np.full(count, size, dtype=np.uint64)
    for place in range(size):
        ngrams = mix(ngrams * np.uint64(_GOLDEN) + words[place : place + count])
    return ngrams


_SALTS = mix(np.arange(1, NUM_HASHES + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


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
            keys[band] = mix(keys[band] * np.uint64(_GOLDEN) + signatures[:, place])
    return keys


@dataclasses.dataclass(frozen=True, slots=True)
class Wording:
    """A text as characters and as words, to be matched with others."""

    characters: str
    words: list[str]

    @classmethod
    def of(cls, text: str) -> Wording:
        """Take a text apart; case, punctuation and spaces do not matter between words."""
        return cls(text, _WORD.findall(text.lower()))


def ratio_above(left: Wording, right: Wording, limit: float) -> float | None:
    """Share of two texts in matching blocks if it is above a limit, else None.

    The share is the larger of difflib's ratio (Ratcliff and Metzener, 1988) over characters, as
    published decontamination uses it, and over words: beyond 200 characters the former disregards
    every frequent letter, and so finds little.
    """
    ratios = (
        _ratio_above(left.characters, right.characters, limit, autojunk=True),
        _ratio_above(left.words, right.words, limit, autojunk=False),
    )
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def _ratio_above(
    left: Sequence[Hashable], right: Sequence[Hashable], limit: float, *, autojunk: bool
) -> float | None:
    """`SequenceMatcher(None, left, right, autojunk).ratio()` if it is above a limit, else None.

    Matching blocks are a common subsequence, so the longest one, which is a hundred times faster to
    find, bounds what a pair of regions can add. Once the bounds do not add up, the search ends.
    """
    total = len(left) + len(right)
    if not total:
        return 1.0 if limit < 1 else None
    # Matches that are needed; by difflib's own formula, so that rounding makes no difference.
    needed = max(0, int(limit * total / 2) - 1)
    while 2.0 * needed / total <= limit:
        needed += 1
    if needed > min(len(left), len(right)):
        return None
    possible: int = LCSseq.similarity(left, right, score_cutoff=needed)
    if possible < needed:
        return None
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=autojunk)
    matched, regions = 0, [(-possible, 0, len(left), 0, len(right))]
    while regions:
        bound, left_start, left_stop, right_start, right_stop = heapq.heappop(regions)
        i, j, size = matcher.find_longest_match(left_start, left_stop, right_start, right_stop)
        matched += size
        possible += size + bound
        if size:
            for region in (
                (left_start, i, right_start, j),
                (i + size, left_stop, j + size, right_stop),
            ):
                start, stop, other_start, other_stop = region
                inside = LCSseq.similarity(left[start:stop], right[other_start:other_stop])
                if inside:
                    possible += inside
                    heapq.heappush(regions, (-inside, *region))
        if possible < needed:
            return None
    return 2.0 * matched / total
