"""Measure generated data before it is used: yield, agreement, leakage, repetition, diversity.

    lines of stages ─┐                          ┌─> quality_report: page, JSON, plots
    rows             ├─> measure ─> Figures ────┤
    reference texts ─┘                          └─> require_quality: thresholds, or no rows

Memory grows with the number of kept problems: 0.6 kB each. Of the rows, which are many, the first
20,000 are measured.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.prepare.tokenise import band_keys, join_pairs, minhash
from pipeline.errors import UserError
from ReasonAug.generations import read_generations
from ReasonAug.problem import num_tokens
from ReasonAug.synthesis.config import StrictConfig

Item = Mapping[str, Any]

_PROBLEMS, _SOLVED = "problems", "solved"
SIDES = {"min": "at least", "max": "at most"}
# Problems that share this much of their word 5-grams are near-duplicates.
SIMILAR = 0.8
# Kinds of rows whose query is a concept's name, or may give it on purpose.
NAMED = ("i2ps", "ps2ps")
_NGRAMS = (1, 2, 3)
# Shares of distinct n-grams fall with the amount of text: all are of this many words.
WORDS = 20_000
BLEU_TEXTS = 200
_BLEU_ORDERS = (1, 2, 3, 4)
ROWS = 20_000
PERCENTILES = (5, 25, 50, 75, 95)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Measured values; a share of nothing is null.

    Args:
        stages: items of each stage by domain and by what became of them: `kept`, or a reason.
        solutions: counts by domain: solutions that were checked, second solutions or verdicts,
            solutions that agree, programs that were run, programs that passed.
        rows: by kind, rows and rows that leak.
        texts: repetition and diversity of problems, `own` and `reference`.
        lengths: percentiles of tokens, by kind of text.
        histograms: numbers of texts by tokens, by kind of text.
        totals: the values that `StrictConfig` is about.
    """

    stages: dict[str, dict[str, dict[str, int]]]
    solutions: dict[str, dict[str, int]]
    rows: dict[str, dict[str, int]]
    texts: dict[str, dict[str, float | int | None]]
    lengths: dict[str, dict[str, int]]
    histograms: dict[str, Counter[int]]
    totals: dict[str, float | None]


# --- measure ---------------------------------------------------------------------------------


def measure(
    stages: Mapping[str, Iterable[Item]],
    rows: Iterable[Item],
    *,
    reference: Path | None = None,
    seed: int = 0,
) -> Figures:
    """Measure a data set; reads every line once.

    Args:
        stages: lines of each stage in order, from `problems`; the last has the kept problems.
        rows: the training rows, shuffled.
        reference: generations to compare with.
        seed: of the samples.

    Raises:
        UserError: the reference cannot be read.
    """
    fates = {name: _ByDomain() for name in stages}
    solutions, lengths = _ByDomain(), _ByDomain()
    own, named = _Texts(seed), 0
    *_, last = stages
    for stage, items in stages.items():
        for item in items:
            fates[stage][item["domain"]][item["dropped"] or "kept"] += 1
            if stage == _SOLVED and item.get("verification"):
                solutions[item["domain"]].update(_verified(item["verification"]))
            if stage == last and item["dropped"] is None:
                own.add(item["problem"])
                named += names_concept(item["problem"], item["concept"])
                for part in ("problem", "solution", "definition"):
                    lengths[part][num_tokens(item[part])] += 1
    kinds = _count_rows(itertools.islice(rows, ROWS), lengths)
    texts = {"own": own}
    if reference is not None:
        texts["reference"] = _read_reference(reference, seed, lengths)
    words = min([WORDS, *(each.num_words for each in texts.values())])
    measured = {name: each.measure(words) for name, each in texts.items()}
    written = sum(fates[_PROBLEMS].total().values()) if _PROBLEMS in fates else 0
    totals = _totals(solutions.total(), kinds, measured["own"])
    totals |= {"yield": share(len(own), written), "named": share(named, len(own))}
    return Figures(
        stages={stage: found.tree() for stage, found in fates.items()},
        solutions=solutions.tree(),
        rows=kinds.tree(),
        texts=measured,
        lengths={kind: _percentiles(found) for kind, found in lengths.items()},
        histograms=dict(lengths),
        totals=totals,
    )


class _ByDomain(defaultdict[str, Counter[Any]]):
    """Counters by domain, or by another name."""

    def __init__(self) -> None:
        super().__init__(Counter)

    def total(self) -> Counter[Any]:
        """Return the sums over all domains."""
        return sum(self.values(), Counter())

    def tree(self) -> dict[str, dict[str, int]]:
        """Return plain dictionaries in a fixed order."""
        return {name: dict(sorted(found.items())) for name, found in self.items()}


def _verified(verification: Item) -> dict[str, int]:
    """Return what the check of one solution adds to the counts."""
    executed = bool(verification["executed"])
    passed = executed and 0 < verification["tests"] == verification["passed"]
    return {
        "checked": 1,
        "second": verification["solutions"],
        "agreed": verification["agreed"],
        "executed": int(executed),
        "passed": int(passed),
    }


def _count_rows(rows: Iterable[Item], lengths: _ByDomain) -> _ByDomain:
    """Count rows by kind, and the ones whose query and positive both name their concept."""
    kinds = _ByDomain()
    for row in rows:
        concept, query = row["instance"], row["user_query"]
        positive = row["positive_document"]
        both = names_concept(query, concept) and names_concept(positive, concept)
        kinds[row["task_type"]].update({"rows": 1, "leaking": int(both)})
        lengths["query"][num_tokens(query)] += 1
        lengths["positive"][num_tokens(positive)] += 1
        lengths["negative"][num_tokens(row["hard_negative_document"])] += 1
    return kinds


def _totals(
    solutions: Counter[str], kinds: _ByDomain, own: Mapping[str, float | int | None]
) -> dict[str, float | None]:
    unnamed = sum((found for kind, found in kinds.items() if kind not in NAMED), Counter())
    return {
        "agreement": share(solutions["agreed"], solutions["second"]),
        "passed": share(solutions["passed"], solutions["executed"]),
        "leakage": share(unnamed["leaking"], unnamed["rows"]),
        **{name: own[name] for name in ("near_duplicates", "distinct_2", "self_bleu")},
    }


def share(part: int, whole: int) -> float | None:
    """Return a share; None of nothing."""
    return part / whole if whole else None


def names_concept(text: str, concept: str) -> bool:
    """Return True if a text contains the name of a concept, in any case, also in the plural.

    A name such as `Depth-First Search (DFS)` is two names.
    """
    return bool(_pattern(concept).search(text))


@functools.lru_cache(maxsize=100_000)
def _pattern(concept: str) -> re.Pattern[str]:
    names = [re.findall(r"\w+", name) for name in re.split(r"[()]", concept)]
    # A single letter is not a name.
    words = [r"\W+".join(map(re.escape, name)) for name in names if len("".join(name)) > 1]
    return re.compile(rf"\b(?:{'|'.join(words) or '(?!)'})(?:s|es)?\b", re.IGNORECASE)


def _percentiles(histogram: Counter[int]) -> dict[str, int]:
    values = np.repeat(
        *(np.array(column) for column in zip(*sorted(histogram.items()), strict=True))
    )
    found = np.percentile(values, PERCENTILES, method="nearest")
    return {f"p{percent}": int(value) for percent, value in zip(PERCENTILES, found, strict=True)}


def _read_reference(path: Path, seed: int, lengths: _ByDomain) -> _Texts:
    texts = _Texts(seed)
    for problem in read_generations(path)[0]:
        texts.add(problem.statement)
        lengths["reference problem"][num_tokens(problem.statement)] += 1
        lengths["reference solution"][num_tokens(problem.solution)] += 1
    return texts


class _Texts:
    """Signatures of texts, and a sample of them: those with the smallest hashes."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._signatures: list[NDArray[np.uint32]] = []
        # (minus hash, text): the first to leave has the largest hash.
        self._sample: list[tuple[int, str]] = []
        self._sample_words = 0
        self.num_words = 0

    def __len__(self) -> int:
        return len(self._signatures)

    def add(self, text: str) -> None:
        """Add a text."""
        self._signatures.append(minhash(text))
        digest = hashlib.sha256(f"{self._seed}/{text}".encode()).digest()
        words = len(_words(text))
        self.num_words += words
        heapq.heappush(self._sample, (-int.from_bytes(digest[:8], "big"), text))
        self._sample_words += words
        while self._sample_words - len(_words(self._sample[0][1])) >= WORDS:
            self._sample_words -= len(_words(heapq.heappop(self._sample)[1]))

    def measure(self, num_words: int) -> dict[str, float | int | None]:
        """Return repetition, and diversity in `num_words` words of the sample."""
        words = [_words(text) for _, text in sorted(self._sample, reverse=True)]
        return {
            "texts": len(self),
            "near_duplicates": share(_num_repeated(self._signatures), len(self)),
            **{f"distinct_{n}": _distinct(words, n, num_words) for n in _NGRAMS},
            "self_bleu": _self_bleu(words[:BLEU_TEXTS]),
        }


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _num_repeated(signatures: Sequence[NDArray[np.uint32]]) -> int:
    """Count the texts that are near-duplicates of an earlier one."""
    if not signatures:
        return 0
    all_of = np.stack(signatures)
    pairs = []
    for keys in band_keys(all_of):
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        # Each text is compared with the first one of its key, so pairs stay linear in number.
        heads = np.repeat(order[starts], np.diff(np.append(starts, len(ordered))))
        later, earlier = order[order != heads], heads[order != heads]
        similar = (all_of[later] == all_of[earlier]).mean(axis=1) >= SIMILAR
        pairs.append(np.stack([later[similar], earlier[similar]]))
    first = join_pairs(np.arange(len(all_of)), np.concatenate(pairs, axis=1))
    return int((first != np.arange(len(all_of))).sum())


def _distinct(texts: Iterable[Sequence[str]], n: int, num_words: int) -> float | None:
    """Return the share of distinct n-grams in the first `num_words` words of texts (Li, 2016)."""
    found: set[tuple[str, ...]] = set()
    total, left = 0, num_words
    for words in texts:
        part = words[:left]
        left -= len(part)
        grams = list(zip(*(part[k:] for k in range(n)), strict=False))
        found.update(grams)
        total += len(grams)
    return share(len(found), total)


def _self_bleu(texts: Sequence[Sequence[str]]) -> float | None:
    """Return the mean BLEU (0 to 100) of each text against all others (Zhu, 2018).

    By hand, because libraries count the n-grams of all references again for every text; a test
    compares with sacrebleu.
    """
    if len(texts) < 2:
        return None
    counts = [[_ngrams(words, n) for n in _BLEU_ORDERS] for words in texts]
    # The two highest counts of each n-gram in one text: the limit for a text that has the highest
    # itself is the second.
    highest: list[dict[tuple[str, ...], list[int]]] = [{} for _ in _BLEU_ORDERS]
    for text in counts:
        for top, found in zip(highest, text, strict=True):
            for gram, count in found.items():
                top[gram] = sorted((*top.get(gram, (0, 0)), count))[-2:]
    sizes = [len(words) for words in texts]
    scores = []
    for k, text in enumerate(counts):
        matched = [
            sum(min(n, top[g][0] if top[g][1] == n else top[g][1]) for g, n in found.items())
            for top, found in zip(highest, text, strict=True)
        ]
        others = sizes[:k] + sizes[k + 1 :]
        nearest = min(others, key=lambda size: (abs(size - sizes[k]), size))
        scores.append(_bleu(matched, [found.total() for found in text], sizes[k], nearest))
    return float(np.mean(scores))


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[k:] for k in range(n)), strict=False))


def _bleu(matched: Sequence[int], total: Sequence[int], size: int, reference: int) -> float:
    """Return BLEU with exponential smoothing, of the orders that the text is long enough for."""
    if not any(matched):
        return 0.0
    precisions, smoothing = [], 1.0
    for found, whole in zip(matched, total, strict=True):
        if whole:
            smoothing *= 1 if found else 2
            precisions.append(found / whole if found else 1 / (smoothing * whole))
    brevity = min(0.0, 1 - reference / size)
    return 100 * math.exp(brevity + sum(map(math.log, precisions)) / len(precisions))


# --- thresholds ------------------------------------------------------------------------------


def missed(figures: Figures, thresholds: StrictConfig) -> list[str]:
    """Return a line for each threshold that the data miss; a figure that is null misses it."""
    lines = []
    for field in dataclasses.fields(thresholds):
        wanted = getattr(thresholds, field.name)
        if wanted is None:
            continue
        side, _, name = field.name.partition("_")
        found = figures.totals[name]
        if found is None:
            lines.append(f"{name} not measured (allowed: {SIDES[side]} {wanted:g})")
        elif (found < wanted) if side == "min" else (found > wanted):
            lines.append(f"{name} {found:.4g} (allowed: {SIDES[side]} {wanted:g})")
    return lines


def require_quality(figures: Figures, thresholds: StrictConfig, report: Path) -> None:
    """Refuse data that miss a threshold.

    Raises:
        UserError: names every threshold that is missed.
    """
    lines = missed(figures, thresholds)
    if lines:
        raise UserError(
            f"strict: no rows written: {'; '.join(lines)}",
            fix=f"read {report}; improve the data, or change the keys below strict",
        )
