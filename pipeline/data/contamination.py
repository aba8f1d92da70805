"""Training texts that occur in an evaluation set, found before they can be trained on."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import DecontaminateConfig, EvaluationSetConfig
from pipeline.data.similarity import Wording, Words, hash_runs, hash_words, ratio_above
from pipeline.data.sources.bad_rows import BadRecords
from pipeline.data.sources.records import (
    list_files,
    plan_blocks,
    read_records,
    split_to_read,
)
from pipeline.errors import UserError
from pipeline.run_dir import atomic_path, write_text

# An evaluation query is compared character by character where it shares runs of so many words ...
_CANDIDATE_WORDS = 3
# ... and is among the so many that share most.
_CANDIDATES = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Why a training text was found in an evaluation set."""

    reason: str
    where: str  # name of the evaluation set, and the text found


def contamination_files(evaluation: EvaluationSetConfig) -> list[str]:
    """All files of one evaluation set."""
    key = f"decontaminate.{evaluation.name}.path"
    return list_files(evaluation.path, key, split=evaluation.split, default_split="test")


def build_index(config: DecontaminateConfig, folder: Path) -> None:
    """Hash the n-grams of all evaluation texts into `folder`; keep the queries' text."""
    ngrams: list[Words] = []
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
    keys, first = np.unique(np.concatenate(ngrams), return_index=True)
    _save(folder / "ngrams.npy", keys)
    _save(folder / "owners.npy", np.concatenate(owners)[first])
    short = [hash_runs(hash_words(text), _CANDIDATE_WORDS) for _, text in queries]
    of_query = np.repeat(np.arange(len(short)), [len(part) for part in short])
    runs = np.concatenate(short) if short else np.empty(0, dtype=np.uint64)
    order = np.argsort(runs, kind="stable")
    _save(folder / "runs.npy", runs[order])
    _save(folder / "run_queries.npy", of_query[order])
    write_text(folder / "index.json", json.dumps({"names": names, "queries": queries}))


def _texts(config: DecontaminateConfig, number: int, bad: BadRecords) -> Iterator[str]:
    """Texts of one evaluation set; records without one go to `bad`."""
    evaluation = config.sets[number]
    for file in contamination_files(evaluation):
        split = split_to_read(file, evaluation.split, default="test")
        for block in plan_blocks(file, split=split, block_bytes=2**62, max_rows=None):
            for record in read_records(block, split=split, on_bad=bad.add):
                for field in evaluation.fields:
                    text = record.value.get(field)
                    if isinstance(text, str):
                        yield text
                        continue
                    fault = record.fail(
                        f"field {field!r} is missing or no text",
                        allowed=f"fields found: {', '.join(map(str, record.value))}",
                        fix=f"set decontaminate.{evaluation.name}.fields",
                    )
                    bad.add(fault)
                    break


def _save(path: Path, array: NDArray[Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, array)


class ContaminationIndex:
    """The n-grams and queries of the evaluation sets, memory-mapped."""

    def __init__(self, config: DecontaminateConfig, folder: Path) -> None:
        self._config = config
        # As plain arrays: a slice of a memmap takes ten times as long.
        self._ngrams, self._owners, self._runs, self._run_queries = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
            for name in ("ngrams", "owners", "runs", "run_queries")
        )
        index = json.loads((folder / "index.json").read_text())
        self._names, self._queries = index["names"], index["queries"]
        self._wording_of = functools.cache(lambda number: Wording(self._queries[number][1]))

    def find(self, text: str, *, is_query: bool) -> Match | None:
        """The evaluation set a text is in, if any.

        Either more than `max_overlap` of its word n-grams are there (Brown et al., arXiv
        2005.14165, appendix C, use 13), or, for a query, its matching ratio with an evaluation
        query is above `max_ratio`.
        """
        wording = Wording(text)
        ngrams = hash_runs(wording.hashes, self._config.ngram)
        places = np.minimum(np.searchsorted(self._ngrams, ngrams), len(self._ngrams) - 1)
        hits = self._ngrams[places] == ngrams
        share = np.count_nonzero(hits) / max(1, len(hits))
        if share > self._config.max_overlap:
            owner = np.bincount(self._owners[places[hits]]).argmax()
            return Match(
                reason=f"shares {share:.0%} of its {self._config.ngram}-grams",
                where=self._names[owner],
            )
        return self._find_query(wording) if is_query else None

    def _find_query(self, wording: Wording) -> Match | None:
        runs = hash_runs(wording.hashes, _CANDIDATE_WORDS)
        starts = np.searchsorted(self._runs, runs, side="left")
        stops = np.searchsorted(self._runs, runs, side="right")
        # A run that the text repeats counts once.
        spans = set(zip(starts.tolist(), stops.tolist(), strict=True))
        candidates = [self._run_queries[start:stop] for start, stop in spans if stop > start]
        if not candidates:
            return None
        shared = np.bincount(np.concatenate(candidates))
        for number in np.argsort(-shared, kind="stable")[:_CANDIDATES].tolist():
            if not shared[number]:
                break
            owner, query = self._queries[number]
            ratio = ratio_above(wording, self._wording_of(number), self._config.max_ratio)
            if ratio is not None:
                return Match(
                    reason=f"matching ratio {ratio:.2f} with an evaluation query",
                    where=f"{self._names[owner]}: {query[:120]}",
                )
        return None
