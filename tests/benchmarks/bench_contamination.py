"""Decontamination against plain difflib: python tests/benchmarks/bench_contamination.py.

Long generated problems are checked against as many queries as BRIGHT has, in CPU seconds of one
process, both ways interleaved. The verdicts must be equal; otherwise it exits with 1.
"""

from __future__ import annotations

import difflib
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.config import DecontaminateConfig, EvaluationSetConfig
from pipeline.data import contamination
from pipeline.data.contamination import ContaminationIndex, Match, build_index
from pipeline.data.similarity import Wording
from ReasonAug.templates import write_templates

_QUERIES = 1384
# ReasonIR's rows (arXiv 2504.20595): each has a query, a positive and a hard negative.
_ROWS, _DOCUMENTS = 320_000, 2
_ROUNDS, _OF_ROUND, _ALONE = 4, 8, 300


def plain_ratio(left: Wording, right: Wording, limit: float) -> float | None:
    """The definition: difflib's ratio over characters and over words, always in full."""
    one, other = (re.findall(r"\w+", text.characters.lower()) for text in (left, right))
    ratio = max(
        difflib.SequenceMatcher(None, left.characters, right.characters).ratio(),
        difflib.SequenceMatcher(None, one, other, autojunk=False).ratio(),
    )
    return ratio if ratio > limit else None


def timed(work: Callable[[str], Match | None], texts: list[str]) -> tuple[list[object], float]:
    """Verdicts, and CPU seconds of one text."""
    start = time.process_time()
    found: list[object] = [work(text) for text in texts]
    return found, (time.process_time() - start) / len(texts)


def main() -> None:
    """Print a table; the projection is the measured share times the rows."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_templates(folder, seed=0, problems_per_concept=32, max_tokens=1500)
        lines = (folder / "train.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        rng.shuffle(rows)
        # Queries of some concepts against texts of the others: much in common, and little found.
        asked = set(sorted({row["instance"] for row in rows})[::2])
        queries = [row["user_query"] for row in rows if row["instance"] in asked][:_QUERIES]
        path = folder / "queries.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in queries))
        rule = DecontaminateConfig(sets=(EvaluationSetConfig(name="queries", path=str(path)),))
        build_index(rule, folder / "index")
        index = ContaminationIndex(rule, folder / "index")
        rest = [row for row in rows if row["instance"] not in asked]
        report(index, [r["user_query"] for r in rest], [r["positive_document"] for r in rest])


def report(index: ContaminationIndex, texts: list[str], documents: list[str]) -> None:
    """Time both ways on the same texts, then ours alone on more of them."""

    def check(text: str) -> Match | None:
        return index.find(text, is_query=True)

    bounded, ours, plain = contamination.ratio_above, 0.0, 0.0
    for number in range(_ROUNDS):
        part = texts[number * _OF_ROUND :][:_OF_ROUND]
        fast, seconds = timed(check, part)
        ours += seconds / _ROUNDS
        contamination.ratio_above = plain_ratio
        slow, seconds = timed(check, part)
        contamination.ratio_above = bounded
        plain += seconds / _ROUNDS
        if fast != slow:
            sys.exit("the verdicts differ")
    found, query = timed(check, texts[:_ALONE])
    _, document = timed(lambda text: index.find(text, is_query=False), documents[:_ALONE])
    mean = sum(map(len, texts[:_ALONE])) / _ALONE
    hours = _ROWS * (query + _DOCUMENTS * document) / 3600
    print(f"| queries of {mean:.0f} characters, {sum(map(bool, found))} of {_ALONE} found | CPU |")
    print("|---|---|")
    print(f"| a query, plain difflib | {1e3 * plain:.1f} ms |")
    print(f"| a query, bounded | {1e3 * ours:.2f} ms |")
    print(f"| ratio | {plain / ours:.0f} |")
    print(f"| a document | {1e3 * document:.2f} ms |")
    print(f"| {_ROWS:,} rows against {_QUERIES:,} queries, two cores | {60 * hours / 2:.1f} min |")


if __name__ == "__main__":
    main()
