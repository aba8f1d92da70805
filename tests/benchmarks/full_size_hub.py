"""The three benchmarks' data sets with as many texts and characters as the real ones, of noise.

Counts come from the statistics that mteb ships for each task; lengths are log-normal up to the
longest one, and as many texts repeat as in the real corpora. A query repeats words of its document.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml

from pipeline.evaluation.tasks import BENCHMARKS, expand

TASKS = expand(("FollowIR", "LongEmbed", "BRIGHT", "BRIGHT-long"))
# BRIGHT's spelling of its subsets, where mteb's task names do not spell it.
_SUBSETS = {
    "EarthScience": "earth_science",
    "SustainableLiving": "sustainable_living",
    "TheoremQATheorems": "theoremqa_theorems",
    "TheoremQAQuestions": "theoremqa_questions",
}
_LONG_CONFIGS = {
    "LEMBNarrativeQARetrieval": "narrativeqa",
    "LEMBNeedleRetrieval": "needle",
    "LEMBQMSumRetrieval": "qmsum",
    "LEMBSummScreenFDRetrieval": "summ_screen_fd",
    "LEMBWikimQARetrieval": "2wikimqa",
}
_WORDS = """
ice flows downhill under its own weight and carves wide valleys wild yeast and bacteria in the
starter raise bread slowly cables carry a deck and pass load to tall towers early moves fight for
centre foragers dance in hive to point others to flowers pull of moon raises sea twice each day
"""
Table = dict[str, Any]


def write_hub(root: Path, *, scale: float = 1.0) -> Path:
    """Write every task's data set below `root` in the hub's layout, as parquet.

    Args:
        scale: share of the real number of documents; their lengths stay.
    """
    for task in BENCHMARKS["FollowIR"]:
        _write_follow_ir(root, task, scale)
    _write_long_embed(root, scale)
    _write_bright(root, scale)
    return root


def _statistics(task: str) -> dict[str, Any]:
    found = mteb.get_task(task).metadata.descriptive_stats
    assert found is not None, task
    return dict(found)


@functools.cache
def _noise() -> str:
    # Words, so that a tokenizer makes as many tokens of a text as of a real one.
    words = np.array(_WORDS.split())
    generator = np.random.default_rng(0)
    return " ".join(generator.choice(words, size=2_000_000))


def _texts(statistics: dict[str, Any], scale: float, *, seed: int, least: int = 2) -> list[str]:
    """As many texts as the statistics say, of their total length, with their repetitions."""
    number = statistics["total_text_length"] / statistics["average_text_length"]
    count = max(least, round(number * scale))
    unique = max(1, round(count * statistics["unique_texts"] / number))
    generator = np.random.default_rng(seed)
    sizes = generator.lognormal(0, 0.8, size=count)
    sizes = np.minimum(sizes * statistics["average_text_length"] / sizes.mean(),
                       statistics["max_text_length"])  # fmt: skip
    noise = _noise()
    starts = generator.integers(len(noise) - int(sizes.max()) - 1, size=count)
    texts = [
        # The number keeps two slices from being the same text by chance.
        f"{row} {noise[start : start + max(1, size - len(str(row)) - 1)]}"
        for row, (start, size) in enumerate(
            zip(starts.tolist(), sizes.astype(int).tolist(), strict=True)
        )
    ]
    # The last ones: queries ask for the first, which must not tie with a repetition.
    return texts[:unique] + [texts[unique - 1 - i % unique] for i in range(count - unique)]


def mixed_texts(count: int) -> list[str]:
    """Texts as long as BRIGHT's documents about robots: short ones, and some of many pages."""
    statistics = _statistics("BrightRoboticsRetrieval")["standard"]["documents_text_statistics"]
    share = count * statistics["average_text_length"] / statistics["total_text_length"]
    return _texts(statistics, share, seed=0, least=count)


def _asking(queries: Sequence[str], documents: Sequence[str]) -> list[str]:
    """The queries with the words of the documents that answer them, as long as before."""
    asked = []
    for query in queries:
        number = query.split()[0]
        words = documents[int(number) % len(documents)] + " "
        asked.append(f"{number} " + (words * (len(query) // len(words) + 1))[: len(query)])
    return asked


def _write(root: Path, repository: str, configs: dict[str, dict[str, Table]]) -> None:
    """configs: config -> split -> columns."""
    declared = []
    for config, splits in configs.items():
        files = []
        for split, table in splits.items():
            path = root / repository / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pa.parquet.write_table(pa.table(table), path, row_group_size=10_000)
            files.append({"split": split, "path": f"{config}/{path.name}"})
        declared.append({"config_name": config, "data_files": files})
    readme = root / repository / "README.md"
    readme.write_text("---\n" + yaml.safe_dump({"configs": declared}) + "---\n")


def _write_follow_ir(root: Path, task: str, scale: float) -> None:
    statistics = _statistics(task)["test"]
    # Of each query 20 are judged, and 10 more change their relevance.
    documents = _texts(statistics["documents_text_statistics"], scale, seed=len(task), least=24)
    ids = [f"d{row}" for row in range(len(documents))]
    text_of = dict(zip(ids, documents, strict=True))
    pairs = round(statistics["num_queries"] / 2 * min(1.0, 4 * scale)) or 2
    queries = [f"{pair}-{kind}" for pair in range(pairs) for kind in ("og", "changed")]
    generator = np.random.default_rng(1)
    listed = [
        [ids[row] for row in generator.choice(len(ids), min(1000, len(ids)), replace=False)]
        for _ in range(pairs)
    ]
    candidates = [listed[number // 2] for number in range(len(queries))]
    judged = [
        (query, document, int(place < (20 if query.endswith("og") else 10)))
        for query, documents_of in zip(queries, candidates, strict=True)
        for place, document in enumerate(documents_of[:40])
    ]
    configs: dict[str, dict[str, Table]] = {
        "corpus": {"corpus": {"_id": ids, "title": [""] * len(ids), "text": documents}},
        "queries": {"queries": {"_id": queries, "text": [f"question {q[:-3]}" for q in queries]}},
        "instruction": {
            "instruction": {
                "query-id": queries,
                "instruction": [
                    f"{q} " + text_of[own[0 if q.endswith("og") else 10]][:300]
                    for q, own in zip(queries, candidates, strict=True)
                ],
            }
        },
        "default": {"test": _columns(("query-id", "corpus-id", "score"), judged)},
        "top_ranked": {"top_ranked": {"query-id": queries, "corpus-ids": candidates}},
        "qrel_diff": {
            "qrel_diff": {
                "query-id": [str(pair) for pair in range(pairs)],
                "corpus-ids": [documents_of[10:20] for documents_of in listed],
            }
        },
    }
    _write(root, f"mteb/{task}", configs)


def _columns(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> Table:
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def _long_split(task: str, split: str, scale: float, *, seed: int) -> tuple[list[str], list[str]]:
    statistics = _statistics(task)[split]
    documents = _texts(statistics["documents_text_statistics"], scale, seed=seed)
    queries = _texts(statistics["queries_text_statistics"], scale, seed=seed + 1)
    return documents, _asking(queries, documents)


def _write_long_embed(root: Path, scale: float) -> None:
    configs: dict[str, dict[str, Table]] = {}
    for number, (task, config) in enumerate(_LONG_CONFIGS.items()):
        rows: list[tuple[list[tuple[Any, ...]], ...]] = []
        for split in _statistics(task):
            documents, queries = _long_split(task, split, scale, seed=100 * number + len(split))
            length = int(split.rpartition("_")[2]) if config == "needle" else 0
            rows.append(
                (
                    [("", f"{split}d{i}", text, length) for i, text in enumerate(documents)],
                    [(f"{split}q{i}", "", text, length) for i, text in enumerate(queries)],
                    [
                        (f"{split}q{i}", f"{split}d{i % len(documents)}", "", length)
                        for i in range(len(queries))
                    ],
                )
            )
        names = ("qid", "doc_id", "text", "context_length")
        configs[config] = {
            name: _columns(names, [row for part in rows for row in part[place]])
            for place, name in enumerate(("corpus", "queries", "qrels"))
        }
    _write(root, "dwzhu/LongEmbed", configs)
    passkey: dict[str, dict[str, Table]] = {"corpus": {}, "queries": {}, "default": {}}
    for number, split in enumerate(_statistics("LEMBPasskeyRetrieval")):
        documents, queries = _long_split("LEMBPasskeyRetrieval", split, scale, seed=700 + number)
        ids = [f"{split}d{i}" for i in range(len(documents))]
        asked = [f"{split}q{i}" for i in range(len(queries))]
        passkey["corpus"][split] = {"_id": ids, "title": [""] * len(ids), "text": documents}
        passkey["queries"][split] = {"_id": asked, "text": queries}
        passkey["default"][split] = {
            "query-id": asked,
            "corpus-id": [ids[i % len(ids)] for i in range(len(asked))],
            "score": [1] * len(asked),
        }
    _write(root, "mteb/LEMBPasskeyRetrieval", passkey)


def _write_bright(root: Path, scale: float) -> None:
    configs: dict[str, dict[str, Table]] = {"documents": {}, "examples": {}, "long_documents": {}}
    for number, task in enumerate(BENCHMARKS["BRIGHT"]):
        topic = task.removeprefix("Bright").removesuffix("Retrieval")
        split = _SUBSETS.get(topic, topic.lower())
        # These two search the same problems.
        seed = 900 if topic in ("Aops", "TheoremQAQuestions") else 800 + number
        statistics = _statistics(task)["standard"]
        documents = _texts(statistics["documents_text_statistics"], scale, seed=seed)
        queries = _texts(statistics["queries_text_statistics"], scale, seed=600 + number)
        queries = _asking(queries, documents)
        ids = [f"{seed}/{row}" for row in range(len(documents))]
        configs["documents"][split] = {"id": ids, "content": documents}
        long = f"Bright{topic}LongRetrieval"
        texts = ["none"]
        if long in BENCHMARKS["BRIGHT-long"]:
            long_statistics = _statistics(long)["long"]["documents_text_statistics"]
            texts = _texts(long_statistics, scale, seed=500 + number)
        configs["long_documents"][split] = {
            "id": [f"long/{row}" for row in range(len(texts))],
            "content": texts,
        }
        excludes = topic in ("Leetcode", "Aops", "TheoremQAQuestions")
        configs["examples"][split] = {
            "id": [str(row) for row in range(len(queries))],
            "query": queries,
            "gold_ids": [ids[row % len(ids) : row % len(ids) + 1] for row in range(len(queries))],
            "gold_ids_long": [[f"long/{row % len(texts)}"] for row in range(len(queries))],
            "excluded_ids": [ids[-3:] if excludes else ["N/A"] for _ in queries],
        }
    _write(root, "mteb/BRIGHT", configs)
    # Version 1 holds the texts of version 1.1.
    (root / "xlangai").mkdir()
    (root / "xlangai/BRIGHT").symlink_to(root.resolve() / "mteb/BRIGHT")
