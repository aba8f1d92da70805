"""How alike two texts are: word n-grams, MinHash signatures, matching characters."""

from __future__ import annotations

import collections
import functools
import heapq
import re

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
_INVERSE = pow(_GOLDEN, -1, 2**64)


@functools.lru_cache(maxsize=2**17)
def _word_hash(word: str) -> int:
    return stable_hash(word)


def hash_words(text: str) -> Words:
    """(W,) hash of each word; case, punctuation and spaces do not matter."""
    words = _WORD.findall(text.lower())
    return np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))


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


@functools.lru_cache(maxsize=64)
def _powers(factor: int, bits: int) -> Words:
    """(2^bits,) powers of a factor modulo 2^64."""
    return np.full(2**bits, factor, dtype=np.uint64).cumprod()


def hash_runs(words: Words, size: int) -> Words:
    """Return other hashes of the same runs as `hash_ngrams`, in a time independent of the size.

    A run is a polynomial of its words, the difference of two running sums (Karp and Rabin, 1987).
    """
    if not len(words):
        return np.empty(0, dtype=np.uint64)
    size = min(size, len(words))
    bits = len(words).bit_length()
    sums = np.zeros(len(words) + 1, dtype=np.uint64)
    np.cumsum(words * _powers(_GOLDEN, bits)[: len(words)], out=sums[1:])
    return (sums[size:] - sums[:-size]) * _powers(_INVERSE, bits)[: len(words) - size + 1]


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


class Wording:
    """A text as characters and as words, to be matched with others."""

    def __init__(self, text: str) -> None:
        self.characters = text
        self.hashes = hash_words(text)

    @functools.cached_property
    def words(self) -> list[str]:
        """Words in lower case, without what stands between them."""
        return _WORD.findall(self.characters.lower())

    @functools.cached_property
    def letters(self) -> bytes:
        """A letter for each word; equal words have equal ones, and most others do not."""
        return self.hashes.astype(np.uint8).tobytes()

    @functools.cached_property
    def frequent(self) -> str:
        """Characters that difflib takes for no start of a match; none in a short text."""
        length = len(self.characters)
        if length < 200:
            return ""
        counts = collections.Counter(self.characters)
        return "".join(letter for letter, count in counts.items() if count > length // 100 + 1)


def ratio_above(left: Wording, right: Wording, limit: float) -> float | None:
    """Share of two texts in matching blocks if it is above a limit, else None.

    The share is the larger of difflib's ratio (Ratcliff and Metzener, 1988) over characters, as
    published decontamination uses it, and over words: beyond 200 characters the former disregards
    every frequent letter, and so finds little.
    """
    found = None
    if _may_exceed(left.letters, right.letters, limit):
        # Strings are searched faster than lists, but here no two words may have one letter.
        letter_of = {word: chr(number) for number, word in enumerate(dict.fromkeys(right.words), 1)}
        one, other = (
            "".join([letter_of.get(word, "\0") for word in text.words]) for text in (left, right)
        )
        found = _match(one, other, limit, frequent="")
    limit = limit if found is None else found
    if _may_exceed(left.characters, right.characters, limit):
        ratio = _match(left.characters, right.characters, limit, frequent=right.frequent)
        found = found if ratio is None else ratio
    return found


def _may_exceed(left: str | bytes, right: str | bytes, limit: float) -> bool:
    """Say whether the ratio of two texts may be above a limit.

    Matching blocks are a common subsequence; the longest one is found a hundred times faster.
    """
    least = int(limit * (len(left) + len(right)) / 2)
    if least > min(len(left), len(right)):
        return False
    return bool(LCSseq.similarity(left, right, score_cutoff=least) >= least)


def _needed(left: str, right: str, limit: float) -> int:
    """Least number of matches whose ratio is above a limit."""
    total = len(left) + len(right)
    if not total:
        return 0 if limit < 1 else 1  # two empty texts are equal
    needed = max(0, int(limit * total / 2) - 1)
    # By difflib's own formula, so that rounding makes no difference.
    while 2.0 * needed / total <= limit:
        needed += 1
    return needed


def _match(left: str, right: str, limit: float, *, frequent: str) -> float | None:
    """Difflib's ratio if it is above a limit, else None.

    The longest common subsequence of each pair of regions that is left to search bounds what it can
    add; once the bounds do not add up, the search ends.
    """
    needed = _needed(left, right, limit)
    regions = [(-min(len(left), len(right)), 0, len(left), 0, len(right))]
    matched, possible = 0, -regions[0][0]
    while regions and possible >= needed:
        bound, start, stop, right_start, right_stop = heapq.heappop(regions)
        i, j, size = _longest_match(left[start:stop], right[right_start:right_stop], frequent)
        matched += size
        possible += size + bound
        if not size:
            continue
        i, j = start + i, right_start + j
        for inner in ((start, i, right_start, j), (i + size, stop, j + size, right_stop)):
            one, other = left[inner[0] : inner[1]], right[inner[2] : inner[3]]
            if one and other and (inside := LCSseq.similarity(one, other)):
                possible += inside
                heapq.heappush(regions, (-inside, *inner))
    if possible < needed:
        return None
    total = len(left) + len(right)
    return 2.0 * matched / total if total else 1.0


def _longest_match(left: str, right: str, frequent: str) -> tuple[int, int, int]:
    """Return place and length of the match that `SequenceMatcher.find_longest_match` finds.

    The longest match of letters that are not frequent grows at both ends over any letters.
    """
    runs = [left]
    if frequent:
        divider = frequent[0]
        runs = left.translate(dict.fromkeys(map(ord, frequent), divider)).split(divider)
    best, size = "", 0
    for run in runs:
        place = 0
        while place + size < len(run):  # look for one that is longer than the best so far
            half, end = place + (size + 1) // 2, place + size + 1
            if run[half:end] not in right:
                place = half + 1  # no match holds all of this half
            elif (found := right.find(run[place:end])) < 0:
                place += 1
            else:
                size += 1 + _common_start(run[end:], right[found + size + 1 :])
                best = run[place : place + size]
    i, j = left.find(best), right.find(best)
    while i and j and left[i - 1] == right[j - 1]:
        i, j, size = i - 1, j - 1, size + 1
    return i, j, size + _common_start(left[i + size :], right[j + size :])


def _common_start(left: str, right: str) -> int:
    """Count the letters that two texts have in common at their start."""
    for count, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return count
    return min(len(left), len(right))
