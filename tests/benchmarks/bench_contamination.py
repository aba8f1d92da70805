"""Decontamination against plain difflib: python tests/benchmarks/bench_contamination.py.

Generated problems are checked against queries in three cases: long texts against as many queries as
BRIGHT has, short ones that were made from the same templates as the queries, and the rows of
`python -m ReasonAug templates` against 400 problems that were held out. It counts CPU seconds of
one process, both ways interleaved on the same texts, and exits with 1 if two verdicts differ.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import DecontaminateConfig, EvaluationSetConfig
from pipeline.data.prepare import contamination
from pipeline.data.prepare.contamination import ComparedText, ContaminationIndex, Match, build_index
from ReasonAug.templates import write_templates

# ReasonIR's rows (arXiv 2504.20595): each has a query, a positive and a hard negative.
_ROWS, _QUERIES, _DOCUMENTS = 320_000, 1384, 2
_TEMPLATE_ROWS, _TEMPLATE_QUERIES = 6816, 400
_ROUNDS, _OF_ROUND, _ALONE = 6, 25, 300


def plain_ratio(left: ComparedText, right: ComparedText, limit: float) -> float | None:
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
    """Print a table of the three cases."""
    print("| case | characters | found | plain | bounded | ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, problems = generate(folder / "long", max_tokens=1500)
        # Queries of some concepts against texts of the others: much in common, and little found.
        asked = set(sorted({row["instance"] for row in rows})[::2])
        others = [row for row in rows if row["instance"] not in asked]
        index = make_index(
            folder / "1", [row["user_query"] for row in rows if row["instance"] in asked][:_QUERIES]
        )
        query = report("long problems", index, [row["user_query"] for row in others])
        documents = [row["positive_document"] for row in others[:_ALONE]]
        _, document = timed(lambda text: index.find(text, is_query=False), documents)

        _, short = generate(folder / "short", max_tokens=300)
        held_out = [p["statement"] for p in short if p["split"] == "unseen_problems"]
        trained = [p["statement"] for p in short if p["split"] == "train"]
        report("short problems", make_index(folder / "2", held_out[:_TEMPLATE_QUERIES]), trained)

        held_out = [p["statement"] for p in problems if p["split"] != "train"]
        index = make_index(folder / "3", held_out[:_TEMPLATE_QUERIES])
        trained = [row["user_query"] for row in rows[:_TEMPLATE_ROWS]]
        report("template rows", index, trained, whole=True)
    minutes = _ROWS * (query + _DOCUMENTS * document) / 60 / 2
    print(f"\nA document: {1e3 * document:.2f} ms. {_ROWS:,} rows of a query and {_DOCUMENTS}")
    print(f"documents against {_QUERIES:,} queries on two cores, projected: {minutes:.1f} min")


def generate(folder: Path, *, max_tokens: int) -> tuple[list[Any], list[Any]]:
    """Make training rows and problems by the offline generator, shuffled."""
    with contextlib.redirect_stdout(None):
        write_templates(folder, seed=0, problems_per_concept=64, max_tokens=max_tokens)
    parts = []
    for name in ("train", "problems"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        parts.append([json.loads(line) for line in lines])
        random.Random(0).shuffle(parts[-1])
    return parts[0], parts[1]


def make_index(folder: Path, queries: list[str]) -> ContaminationIndex:
    """Index queries as `prepare` does."""
    folder.mkdir()
    path = folder / "queries.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in queries))
    rule = DecontaminateConfig(sets=(EvaluationSetConfig(name="queries", path=str(path)),))
    build_index(rule, folder / "index")
    return ContaminationIndex(rule, folder / "index")


def report(case: str, index: ContaminationIndex, texts: list[str], *, whole: bool = False) -> float:
    """Print a row: CPU time of one text, or of the whole list, where we search each text once.

    Returns:
        CPU seconds of one text.
    """

    def check(text: str) -> Match | None:
        return index.find(text, is_query=True)

    # `prepare` searches for a repeated text once.
    alone = list(dict.fromkeys(texts)) if whole else texts[:_ALONE]
    found, each = timed(check, alone)
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
    mean, share = sum(map(len, alone)) / len(alone), sum(map(bool, found)) / len(alone)
    if whole:
        case = f"{len(texts):,} {case}, {len(alone):,} distinct (plain projected)"
        before, after = plain * len(texts), each * len(alone)
        times = f"{before:.0f} s | {after:.1f} s | {before / after:.0f}"
    else:
        times = f"{1e3 * plain:.1f} ms | {1e3 * ours:.2f} ms | {plain / ours:.0f}"
    print(f"| {case} | {mean:.0f} | {share:.0%} | {times} |", flush=True)
    return each


if __name__ == "__main__":
    main()
