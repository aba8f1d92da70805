"""How alike two texts are: word n-grams, MinHash signatures, matching characters."""

from __future__ import annotations

import bisect
import collections
import functools
import heapq
import re
from collections.abc import Sequence

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


class Wording:
    """A text as characters and as words, to be matched with others.

    Case, punctuation and spaces between words do not matter to its words.
    """

    def __init__(self, text: str) -> None:
        self.characters = text
        self.words: list[str] = _WORD.findall(text.lower())

    @functools.cached_property
    def frequent(self) -> frozenset[str]:
        """Characters that difflib takes for no start of a match; none in a short text."""
        length = len(self.characters)
        if length < 200:
            return frozenset()
        counts = collections.Counter(self.characters)
        return frozenset(letter for letter, count in counts.items() if count > length // 100 + 1)


def ratio_above(left: Wording, right: Wording, limit: float) -> float | None:
    """Share of two texts in matching blocks if it is above a limit, else None.

    The share is the larger of difflib's ratio (Ratcliff and Metzener, 1988) over characters, as
    published decontamination uses it, and over words: beyond 200 characters the former disregards
    every frequent letter, and so finds little.
    """
    ratios = []
    needed = _needed(left.characters, right.characters, limit)
    if _may_match(left.characters, right.characters, needed):
        ratios.append(_match(left.characters, right.characters, needed, frequent=right.frequent))
    needed = _needed(left.words, right.words, limit)
    if _may_match(left.words, right.words, needed):
        # A letter for each word: strings are searched faster than lists.
        letter_of = {word: chr(number) for number, word in enumerate(dict.fromkeys(right.words), 1)}
        one, other = (
            "".join(letter_of.get(word, "\0") for word in text.words) for text in (left, right)
        )
        ratios.append(_match(one, other, needed, frequent=frozenset()))
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def _needed(left: Sequence[str], right: Sequence[str], limit: float) -> int:
    """Least number of matches whose ratio is above a limit."""
    total = len(left) + len(right)
    if not total:
        return 0 if limit < 1 else 1  # two empty texts are equal
    needed = max(0, int(limit * total / 2) - 1)
    # By difflib's own formula, so that rounding makes no difference.
    while 2.0 * needed / total <= limit:
        needed += 1
    return needed


def _may_match(left: Sequence[str], right: Sequence[str], needed: int) -> bool:
    """Say whether so many matches are possible.

    Matching blocks are a common subsequence; the longest one is found a hundred times faster.
    """
    if needed > min(len(left), len(right)):
        return False
    return bool(LCSseq.similarity(left, right, score_cutoff=needed) >= needed)


def _match(left: str, right: str, needed: int, *, frequent: frozenset[str]) -> float | None:
    """Difflib's ratio if it has the needed matches, else None.

    The longest common subsequence of each pair of regions that is left to search bounds what it can
    add; once the bounds do not add up, the search ends.
    """
    starts: Sequence[int] = range(len(left))
    if frequent:
        starts = [place for place, letter in enumerate(left) if letter not in frequent]
    regions = [(-min(len(left), len(right)), 0, len(left), 0, len(right))]
    matched, possible = 0, -regions[0][0]
    while regions:
        bound, *region = heapq.heappop(regions)
        i, j, size = _longest_match(left, right, region, starts)
        matched += size
        possible += size + bound
        if size:
            left_start, left_stop, right_start, right_stop = region
            for inner in (
                (left_start, i, right_start, j),
                (i + size, left_stop, j + size, right_stop),
            ):
                one, other = left[inner[0] : inner[1]], right[inner[2] : inner[3]]
                if inside := LCSseq.similarity(one, other):
                    possible += inside
                    heapq.heappush(regions, (-inside, *inner))
        if possible < needed:
            return None
    total = len(left) + len(right)
    return 2.0 * matched / total if total else 1.0


def _longest_match(
    left: str, right: str, region: Sequence[int], starts: Sequence[int]
) -> tuple[int, int, int]:
    """Where and how long the match is that `SequenceMatcher.find_longest_match` finds.

    Args:
        left, right: the texts.
        region: start and stop in the left text, start and stop in the right one.
        starts: places in the left text whose letters are not frequent, in order; a match grows from
            a run of them, over frequent letters too.
    """
    start, stop, right_start, right_stop = region
    inside = right[right_start:right_stop]
    best, place = 0, start
    allowed = starts[bisect.bisect_left(starts, start) : bisect.bisect_left(starts, stop)]
    for number, i in enumerate(allowed):
        # Longer than the best so far, and without a frequent letter.
        while number + best < len(allowed) and allowed[number + best] == i + best:
            if left[i : i + best + 1] not in inside:
                break
            best, place = best + 1, i
    i, j = place, right_start + inside.find(left[place : place + best])
    while i > start and j > right_start and left[i - 1] == right[j - 1]:
        i, j, best = i - 1, j - 1, best + 1
    while i + best < stop and j + best < right_stop and left[i + best] == right[j + best]:
        best += 1
    return i, j, best
