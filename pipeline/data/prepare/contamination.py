"""Find training texts that occur in an evaluation set.

    build_index   evaluation texts -> hashes of their word n-grams, and of each query's runs of
                  three words
    find          share of the text's n-grams in the index > max_overlap                -> Match
                  a query: the 16 evaluation queries with most runs in common,
                           matching ratio with one of them > max_ratio                  -> Match

    file in contamination/       content
    ngrams.npy, owners.npy       (G,) n-gram hashes, ascending, and the evaluation set of each
    runs.npy, run_queries.npy    (U,) hashes of runs, ascending, and the query of each
    index.json                   names of the sets; queries as [number of the set, text]

Letters: W words of a text. `hash_words` and `hash_ngrams` at the end serve near-duplicates, too.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import heapq
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq, Postfix, Prefix

from pipeline.config import DecontaminateConfig, EvaluationSetConfig
from pipeline.data.order import GOLDEN_RATIO, mix
from pipeline.data.sources.containers import read_file, split_to_read
from pipeline.data.sources.paths import list_files
from pipeline.data.sources.records import BadRecords, stable_hash
from pipeline.errors import UserError
from pipeline.files import save_array, write_text

# Words of a run: evaluation queries with most runs in common may be similar to a query ...
_CANDIDATE_WORDS = 3
# ... and this many of them are compared character by character.
_CANDIDATES = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The evidence that a training text occurs in an evaluation set."""

    reason: str
    where: str  # name of the evaluation set, and the text found


def contamination_files(evaluation: EvaluationSetConfig) -> Iterator[tuple[str, str | None]]:
    """Yield all files of one evaluation set, with the split to read of each."""
    key = f"decontaminate.{evaluation.name}.path"
    files = list_files(evaluation.path, key, split=evaluation.split, default_split="test")
    for file in files:
        yield file, split_to_read(file, evaluation.split, default="test")


def build_index(config: DecontaminateConfig, folder: Path) -> None:
    """Hash the n-grams of all evaluation texts into `folder`; keep the queries' text."""
    ngrams: list[WordHashes] = []
    owners: list[NDArray[np.int32]] = []
    names: list[str] = []
    queries: list[tuple[int, str]] = []
    bad = BadRecords("decontaminate.sets")
    for number, evaluation in enumerate(config.sets):
        found = 0
        for text in _texts(config, number, bad):
            found += 1
            own = np.unique(hash_runs(hash_words(text), config.ngram))
            ngrams.append(own)
            owners.append(np.full(len(own), number, dtype=np.int32))
            if evaluation.queries:
                queries.append((number, text))
        if not found and not bad.count:
            raise UserError(
                f"decontaminate.{evaluation.name}: no text in {evaluation.path}",
                fix="name the fields that hold its texts, or remove the set",
            )
        names.append(evaluation.name)
    bad.refuse()
    # Of an n-gram in several sets, the first set is named.
    keys, first = np.unique(np.concatenate(ngrams), return_index=True)
    save_array(folder / "ngrams.npy", keys)
    save_array(folder / "owners.npy", np.concatenate(owners)[first])
    short = [hash_runs(hash_words(text), _CANDIDATE_WORDS) for _, text in queries]
    of_query = np.repeat(np.arange(len(short)), [len(hashes) for hashes in short])
    runs = np.concatenate(short) if short else np.empty(0, dtype=np.uint64)
    order = np.argsort(runs, kind="stable")
    save_array(folder / "runs.npy", runs[order])
    save_array(folder / "run_queries.npy", of_query[order])
    write_text(folder / "index.json", json.dumps({"names": names, "queries": queries}))


def _texts(config: DecontaminateConfig, number: int, bad: BadRecords) -> Iterator[str]:
    """Yield the texts of one evaluation set; records without text go to `bad`."""
    evaluation = config.sets[number]
    for file, split in contamination_files(evaluation):
        for record in read_file(file, split=split, on_bad=bad.add):
            for field in evaluation.fields:
                text = record.value.get(field)
                if isinstance(text, str):
                    yield text
                    continue
                fault = record.fail(
                    f"field {field!r} is missing or no text",
                    allowed=record.fields_found,
                    fix=f"set decontaminate.{evaluation.name}.fields",
                )
                bad.add(fault)
                break


class ContaminationIndex:
    """The n-grams and queries of the evaluation sets, memory-mapped."""

    def __init__(self, config: DecontaminateConfig, folder: Path) -> None:
        self._config = config
        # Viewed as plain arrays, because slicing a memmap takes ten times as long.
        self._ngrams, self._owners, self._runs, self._run_queries = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
            for name in ("ngrams", "owners", "runs", "run_queries")
        )
        index = json.loads((folder / "index.json").read_text())
        self._names, self._queries = index["names"], index["queries"]
        self._compared_query = functools.cache(
            lambda number: ComparedText(self._queries[number][1])
        )

    def find(self, text: str, *, is_query: bool) -> Match | None:
        """Return where a text occurs in the evaluation sets, if it does.

        Either more than `max_overlap` of its word n-grams are there (Brown et al., arXiv
        2005.14165, appendix C, use 13), or, for a query, its matching ratio with an evaluation
        query is above `max_ratio`.
        """
        if not len(self._ngrams):  # the evaluation texts have no words
            return None
        compared = ComparedText(text)
        # Sorted, because numpy narrows the search for a hash by the one before it if they ascend.
        ngrams = np.sort(hash_runs(compared.hashes, self._config.ngram))
        # Clipped, because beyond the largest hash of the index there is no entry to compare with.
        nearest = np.minimum(self._ngrams.searchsorted(ngrams), len(self._ngrams) - 1)
        hits = self._ngrams[nearest] == ngrams
        share = np.count_nonzero(hits) / max(1, len(hits))
        if share > self._config.max_overlap:
            owner = np.bincount(self._owners[nearest[hits]]).argmax()  # the set with most of them
            return Match(
                reason=f"shares {share:.0%} of its {self._config.ngram}-grams",
                where=self._names[owner],
            )
        return self._find_query(compared) if is_query else None

    def _find_query(self, text: ComparedText) -> Match | None:
        for number in self._candidates(text):
            owner, query = self._queries[number]
            ratio = ratio_above(text, self._compared_query(number), self._config.max_ratio)
            if ratio is not None:
                return Match(
                    reason=f"matching ratio {ratio:.2f} with an evaluation query",
                    where=f"{self._names[owner]}: {query[:120]}",
                )
        return None

    def _candidates(self, text: ComparedText) -> list[int]:
        """Return the numbers of the queries with most runs in common, most first."""
        runs = np.sort(hash_runs(text.hashes, _CANDIDATE_WORDS))
        starts = self._runs.searchsorted(runs)
        counts = self._runs.searchsorted(runs, side="right") - starts
        counts[1:][runs[1:] == runs[:-1]] = 0  # a run that the text repeats counts once
        ends = counts.cumsum()
        if not len(ends) or not ends[-1]:
            return []
        # Positions starts[r] .. starts[r] + counts[r] - 1 of each run r, one after another.
        entries = np.repeat(starts + counts - ends, counts) + np.arange(ends[-1])
        shared = np.bincount(self._run_queries[entries])
        limit = min(_CANDIDATES, len(shared))
        # Only queries that reach the last candidate's count are sorted.
        least = max(1, np.partition(shared, -limit)[-limit])
        numbers = np.flatnonzero(shared >= least)
        order = np.argsort(-shared[numbers], kind="stable")  # of equal counts, the first query
        nearest: list[int] = numbers[order[:limit]].tolist()
        return nearest


# Splits a text into the runs of characters at which a match may start.
Split = Callable[[str], list[str]]


def _whole(text: str) -> list[str]:
    return [text]


class ComparedText:
    """A text as characters and as words, to be compared with other texts."""

    def __init__(self, text: str) -> None:
        self.characters = text
        self.hashes = hash_words(text)

    @functools.cached_property
    def words(self) -> list[str]:
        """Words in lower case, without the characters between them."""
        return _WORD.findall(self.characters.lower())

    @functools.cached_property
    def letters(self) -> bytes:
        """One byte per word: the same for equal words, and mostly not for others."""
        return self.hashes.astype(np.uint8).tobytes()

    @functools.cached_property
    def frequent(self) -> str:
        """Characters at which difflib starts no match (its `autojunk`); none in a short text."""
        length = len(self.characters)
        if length < 200:
            return ""
        counts = collections.Counter(self.characters)
        return "".join(letter for letter, count in counts.items() if count > length // 100 + 1)

    @functools.cached_property
    def split(self) -> Split:
        """Split any text at the characters that are frequent in this one."""
        pattern = f"[^{re.escape(self.frequent)}]+"
        return re.compile(pattern).findall if self.frequent else _whole

    @functools.cached_property
    def pairs(self) -> bytes:
        """One byte per two adjacent characters: the same for equal pairs, mostly not for others."""
        # Characters beyond Latin-1 become "?", and sums overflow: unequal pairs that look equal
        # only loosen the bound.
        codes = np.frombuffer(self.characters.encode("latin-1", "replace"), dtype=np.uint8)
        return (codes[:-1] * np.uint8(31) + codes[1:]).tobytes()

    @functools.cached_property
    def rare(self) -> str:
        """All occurrences of characters that are not frequent, in order."""
        return "".join(self.split(self.characters))


def ratio_above(left: ComparedText, right: ComparedText, limit: float) -> float | None:
    """Return the share of two texts in matching blocks if it is above a limit, else None.

    The share is the larger of difflib's ratio (Ratcliff and Metzener, 1988) over characters, which
    published decontamination uses, and over words: beyond 200 characters the former disregards
    every frequent letter, and so finds little.
    """
    found = None
    if _may_exceed(left.letters, right.letters, limit):
        # Strings are searched faster than lists, so each word becomes a letter of its own; words
        # that only `left` has become one that `right` lacks.
        letter_of = {word: chr(number) for number, word in enumerate(dict.fromkeys(right.words), 1)}
        one, other = (
            "".join([letter_of.get(word, "\0") for word in text.words]) for text in (left, right)
        )
        found = _match(one, other, limit, split=_whole)
    # Of two ratios above the limit the larger counts.
    limit = limit if found is None else found
    if _characters_may_exceed(left, right, limit):
        ratio = _match(left.characters, right.characters, limit, split=right.split)
        found = found if ratio is None else ratio
    return found


def _may_exceed(left: str | bytes, right: str | bytes, limit: float) -> bool:
    """Return False where the ratio of two texts cannot be above a limit.

    Matching blocks form a common subsequence. The longest common subsequence bounds their size, and
    is found a hundred times faster.
    """
    # A ratio is twice the matched characters over both lengths. Rounded down, because a bound may
    # be too low but not too high.
    least = int(limit * (len(left) + len(right)) / 2)
    if least > min(len(left), len(right)):
        return False
    return bool(LCSseq.similarity(left, right, score_cutoff=least) >= least)


def _characters_may_exceed(left: ComparedText, right: ComparedText, limit: float) -> bool:
    """Return False where the ratio over characters cannot be above a limit.

    Where some characters are frequent, there are few matching blocks: each contains another
    character, except for one at the start of both texts. A block of n characters has n - 1 adjacent
    pairs, and unrelated texts have fewer pairs in common than characters, so that pairs give the
    tighter bound.
    """
    one, other = left.characters, right.characters
    if not right.frequent:
        return _may_exceed(one, other, limit)
    least = int(limit * (len(one) + len(other)) / 2)
    if least > min(len(one), len(other)):
        return False
    # First with all rare characters of one side; counting both sides takes longer.
    blocks = 1 + len(right.rare)
    pairs = LCSseq.similarity(left.pairs, right.pairs, score_cutoff=max(0, least - blocks))
    if pairs + blocks < least:
        return False
    blocks = 1 + sum(min(right.rare.count(letter), one.count(letter)) for letter in set(right.rare))
    return pairs + blocks >= least


def _match(left: str, right: str, limit: float, *, split: Split) -> float | None:
    """Return difflib's ratio if it is above a limit, else None.

    Difflib takes the longest match, then searches left and right of it. Here the longest common
    subsequence of each pair of regions bounds the matches that it can add, and the search ends as
    soon as all bounds together cannot reach the limit.
    """
    needed = _needed(left, right, limit)
    # (minus its bound, span in `left`, span in `right`): the heap yields the largest bound first.
    regions = [(-min(len(left), len(right)), 0, len(left), 0, len(right))]
    # `possible`: what is matched, and the bounds of all open regions.
    matched, possible = 0, -regions[0][0]
    while regions and possible >= needed:
        bound, start, stop, right_start, right_stop = heapq.heappop(regions)
        i, j, size = _longest_match(left[start:stop], right[right_start:right_stop], split)
        matched += size
        possible += size + bound  # `bound` is negative: the region is closed
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


def _needed(left: str, right: str, limit: float) -> int:
    """Return the least number of matches whose ratio is above a limit."""
    total = len(left) + len(right)
    if not total:
        return 0 if limit < 1 else 1  # two empty texts are equal
    # Start below, then count up by difflib's own formula, so that rounding makes no difference.
    needed = max(0, int(limit * total / 2) - 1)
    while 2.0 * needed / total <= limit:
        needed += 1
    return needed


def _longest_match(left: str, right: str, split: Split) -> tuple[int, int, int]:
    """Return (start in left, start in right, length) as `SequenceMatcher.find_longest_match` does.

    The longest match within one of the runs is extended at both ends over any characters.
    """
    best, size = "", 0
    for run in dict.fromkeys(split(left)):  # a repetition has no longer match
        start, last = 0, len(run) - size
        while start < last:  # look for one that is longer than the best so far
            half, end = start + (size + 1) // 2, start + size + 1
            if run[half:end] not in right:
                start = half + 1  # no match contains all of this half
            elif (found := right.find(run[start:end])) < 0:
                start += 1
            else:
                size += 1 + Prefix.similarity(run[end:], right[found + size + 1 :])
                best, last = run[start : start + size], len(run) - size
    i, j = left.find(best), right.find(best)
    before = Postfix.similarity(left[:i], right[:j])
    after = Prefix.similarity(left[i + size :], right[j + size :])
    return i - before, j - before, before + size + after


# One hash per word or per run of words.
WordHashes = NDArray[np.uint64]
_WORD = re.compile(r"\w+")
_INVERSE = pow(GOLDEN_RATIO, -1, 2**64)


def hash_words(text: str) -> WordHashes:
    """(W,) hash of each word, without case, punctuation and spaces."""
    words = _WORD.findall(text.lower())
    return np.fromiter(map(_hash_of_word.__getitem__, words), dtype=np.uint64, count=len(words))


class _HashOfWord(dict[str, int]):
    """Cache of word hashes; a dict is twice as fast as `functools.lru_cache`."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 2**17:
            self.clear()
        return self.setdefault(word, stable_hash(word))


_hash_of_word = _HashOfWord()


def hash_ngrams(words: WordHashes, size: int) -> WordHashes:
    """(W - size + 1,) hash of each run of `size` words; a shorter text is one run.

    For near-duplicates: mixed word by word, because MinHash needs hashes without structure, and
    because its signatures must stay the same.
    """
    if not len(words):
        return np.empty(0, dtype=np.uint64)
    size = min(size, len(words))
    count = len(words) - size + 1
    ngrams = np.full(count, size, dtype=np.uint64)
    for offset in range(size):
        ngrams = mix(ngrams * np.uint64(GOLDEN_RATIO) + words[offset : offset + count])
    return ngrams


def hash_runs(words: WordHashes, size: int) -> WordHashes:
    """(W - size + 1,) other hashes of the same runs, in a time that does not depend on the size.

    For evaluation sets, where runs may be long. A run is a polynomial of its words, computed as the
    difference of two running sums (Karp and Rabin, 1987).
    """
    if not len(words):
        return np.empty(0, dtype=np.uint64)
    size = min(size, len(words))
    # A table of powers for each length in bits: a few of them serve all texts.
    bits = len(words).bit_length()
    sums = np.zeros(len(words) + 1, dtype=np.uint64)
    # All modulo 2^64, where the odd factor has an inverse. Divided by the power of its first word,
    # a run has the same hash wherever it is in a text.
    (words * _powers(GOLDEN_RATIO, bits)[: len(words)]).cumsum(out=sums[1:])
    return (sums[size:] - sums[:-size]) * _powers(_INVERSE, bits)[: len(words) - size + 1]


@functools.lru_cache(maxsize=64)
def _powers(factor: int, bits: int) -> WordHashes:
    """(2^bits,) powers of a factor modulo 2^64."""
    return np.full(2**bits, factor, dtype=np.uint64).cumprod()
