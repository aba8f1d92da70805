"""Published scores, with their sources and settings.

Percent. Paper: arXiv 2505.15045, tables of version 1. Its BRIGHT scores push excluded documents to
score 0 inside the first 200 instead of removing them, its FollowIR scores rank 200 documents, and
its texts are cut at 4096 tokens (FollowIR: 196). Board: the public MTEB result files of 2026-08-20;
its LongEmbed row of e5-mistral looks like a cut at 512 tokens. Authors: LongEmbed's own files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.tables import Table
from pipeline.evaluation.tasks import BENCHMARKS

_UP_TO_4K = ("test_256", "test_512", "test_1024", "test_2048", "test_4096")
_BEYOND_4K = ("test_8192", "test_16384", "test_32768")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A number that others have published: a task's score, or a part of it.

    Attributes:
        task: an mteb task.
        splits: mean over these splits alone; all where empty.
        metric: a metric other than the task's main one.
    """

    task: str
    splits: tuple[str, ...] = ()
    metric: str = ""

    def label(self, name: str) -> str:
        """The head of the column; `name` is the task's in the report, with its length."""
        part = self.metric
        if self.splits:
            part = "<= 4k" if self.splits == _UP_TO_4K else "> 4k"
        return f"{name} {part}".strip()

    def ours(self, entry: Mapping[str, Any], model: str) -> float:
        """The same number of a model of the report, in percent."""
        if self.metric:
            return 100 * float(entry["other_scores"][model][self.metric])
        if self.splits:
            scores = [float(entry["by_split"][model][split]) for split in self.splits]
            return 100 * sum(scores) / len(scores)
        return 100 * float(entry[model])


_FOLLOW_IR = (
    Column(task="Robust04InstructionRetrieval", metric="map_at_1000"),
    Column(task="Robust04InstructionRetrieval"),
    Column(task="News21InstructionRetrieval", metric="ndcg_at_5"),
    Column(task="News21InstructionRetrieval"),
    Column(task="Core17InstructionRetrieval", metric="map_at_1000"),
    Column(task="Core17InstructionRetrieval"),
)
_LONG = (
    Column(task="LEMBPasskeyRetrieval", splits=_UP_TO_4K),
    Column(task="LEMBPasskeyRetrieval", splits=_BEYOND_4K),
    Column(task="LEMBNeedleRetrieval", splits=_UP_TO_4K),
    Column(task="LEMBNeedleRetrieval", splits=_BEYOND_4K),
    Column(task="LEMBNarrativeQARetrieval"),
    Column(task="LEMBQMSumRetrieval"),
    Column(task="LEMBSummScreenFDRetrieval"),
    Column(task="LEMBWikimQARetrieval"),
)
_BRIGHT = (
    Column(task="BrightTheoremQATheoremsRetrieval"),
    Column(task="BrightTheoremQAQuestionsRetrieval"),
    Column(task="BrightAopsRetrieval"),
    Column(task="BrightLeetcodeRetrieval"),
)


def _row(
    follow_ir: Sequence[float] = (), long_embed: Sequence[float] = (), bright: Sequence[float] = ()
) -> dict[Column, float]:
    groups = ((_FOLLOW_IR, follow_ir), (_LONG, long_embed), (_BRIGHT, bright))
    return {
        column: score
        for columns, scores in groups
        if scores
        for column, score in zip(columns, scores, strict=True)
    }


def _p_mrr(*scores: float) -> dict[Column, float]:
    return dict(zip((column for column in _FOLLOW_IR if not column.metric), scores, strict=True))


PUBLISHED: Mapping[str, Mapping[Column, float]] = {
    "DiffEmbed (paper)": _row(
        (18.9, 5.7, 27.7, 3.6, 16.2, 6.0),
        (100, 29.3, 86.8, 20.0, 42.1, 43.8, 98.0, 77.2),
        (38.9, 48.3, 15.4, 30.0),
    ),
    "Qwen2.5 (paper)": _row(
        (15.6, 1.4, 20.4, 1.7, 13.9, 4.4),
        (86.8, 24.6, 68.0, 19.3, 31.7, 35.6, 88.0, 68.3),
        (34.7, 40.2, 15.5, 32.0),
    ),
    "Qwen2.5+LLM2Vec (paper)": _row(
        (14.5, 1.6, 19.7, 0.1, 13.8, 2.8),
        (94.0, 28.7, 72.4, 20.0, 36.5, 37.3, 90.5, 68.1),
        (32.3, 37.2, 10.3, 31.0),
    ),
    "Mistral (paper)": _row(
        (21.4, 7.0, 27.4, 1.1, 16.0, 7.2),
        (87.6, 22.0, 72.4, 20.0, 35.0, 36.8, 85.4, 62.9),
        (32.4, 33.7, 9.4, 20.7),
    ),
    "Mistral+LLM2Vec (paper)": _row(
        (20.7, 5.7, 25.1, 1.1, 16.3, 7.5),
        (98.8, 30.0, 69.2, 21.3, 39.5, 40.0, 91.6, 78.0),
        (30.8, 30.4, 9.1, 22.9),
    ),
    "Mistral+SimCSE (paper)": _row(bright=(25.5, 32.0, 10.3, 23.2)),
    "Llama3 (paper)": _row(
        (12.7, 2.3, 17.6, -1.0, 11.7, 1.7),
        (54.0, 3.3, 51.2, 4.0, 31.9, 30.8, 67.6, 47.3),
        (31.0, 34.6, 5.8, 18.9),
    ),
    "Llama3+LLM2Vec (paper)": _row(
        (17.6, 1.9, 21.6, 1.2, 16.7, 4.7),
        (59.6, 4.0, 59.2, 6.7, 36.5, 34.4, 84.5, 51.1),
        (28.3, 33.8, 12.6, 23.6),
    ),
    "Llama3+SimCSE (paper)": _row(bright=(29.0, 36.0, 10.4, 24.1)),
    "E5-Mistral (paper)": _row(
        long_embed=(95.6, 30.0, 68.8, 14.0, 44.6, 43.6, 96.8, 82.0), bright=(26.8, 26.1, 7.1, 28.7)
    ),
    "ReasonIR-8B (paper)": _row(bright=(27.2, 31.9, 14.7, 35.0)),
    "Promptriever (paper)": _row((28.3, 11.7, 28.5, 6.4, 21.6, 15.4)),
    "Qwen3-Embedding-4B (board)": _p_mrr(12.4, 8.7, 13.5),
    "Qwen3-Embedding-8B (board)": _p_mrr(8.6, 9.0, 12.6),
}
# Only the means of these are at hand: model -> benchmark -> percent.
PUBLISHED_MEANS: Mapping[str, Mapping[str, float]] = {
    "Qwen3-Embedding-4B (board)": {"FollowIR": 11.56},
    "Qwen3-Embedding-8B (board)": {"FollowIR": 10.06},
    "GritLM-7B (board)": {"FollowIR": 3.45, "LongEmbed": 47.1, "BRIGHT-v1": 20.63},
    "e5-mistral-7b (board)": {"FollowIR": -0.62, "LongEmbed": 43.7, "BRIGHT-v1": 17.54},
    "e5-mistral-7b, 4k (authors)": {"LongEmbed": 64.4},
    "e5-mistral-7b, NTK to 32k (authors)": {"LongEmbed": 76.7},
    "LLM2Vec-Mistral, supervised (board)": {"FollowIR": -0.85, "LongEmbed": 34.5},
    "BGE-M3 (board)": {"FollowIR": -3.11, "LongEmbed": 59.5, "BRIGHT": 12.04},
    "all-MiniLM-L6-v2 (board)": {"FollowIR": -2.84, "LongEmbed": 29.8},
    "BM25s (board)": {"FollowIR": -2.95, "LongEmbed": 90.9, "BRIGHT": 9.17, "BRIGHT-v1": 7.89},
    "F2LLM-v2-8B (board)": {"LongEmbed": 76.6},
    "Reason-ModernColBERT (board)": {"BRIGHT": 22.7},
}


def columns_of(task: str) -> list[Column]:
    """Parts of a task's result that somebody has published."""
    known = dict.fromkeys(column for scores in PUBLISHED.values() for column in scores)
    return [column for column in known if column.task == task]


def published_scores(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What others have published of a task: head of the column -> model -> percent."""
    return {
        column.label(entry["name"]): {
            model: scores[column] for model, scores in PUBLISHED.items() if column in scores
        }
        for column in columns_of(entry["task"])
    }


def published_table(models: Sequence[str], tasks: Sequence[Mapping[str, Any]]) -> Table | None:
    """Our numbers and published ones in percent, one row per model; None where there is none.

    Args:
        models: our models.
        tasks: entries of report.json; those of replicas are left out.
    """
    tasks = [entry for entry in tasks if not entry["replica"]]
    columns = [(column, entry) for entry in tasks for column in columns_of(entry["task"])]
    means = _whole_benchmarks(tasks)
    if not columns and not means:
        return None
    header = ["model", *(column.label(entry["name"]) for column, entry in columns)]
    header += [f"{benchmark} mean" for benchmark in means]
    rows = []
    for model in models:
        scores = [column.ours(entry, model) for column, entry in columns]
        scores += [100 * sum(e[model] for e in own) / len(own) for own in means.values()]
        rows.append([model, *(f"{score:.1f}" for score in scores)])
    for name in dict.fromkeys((*PUBLISHED, *PUBLISHED_MEANS)):
        row = [PUBLISHED.get(name, {}).get(column) for column, _ in columns]
        row += [PUBLISHED_MEANS.get(name, {}).get(benchmark) for benchmark in means]
        if any(score is not None for score in row):
            rows.append([name, *("" if score is None else f"{score:.1f}" for score in row)])
    return header, rows


def _whole_benchmarks(
    tasks: Sequence[Mapping[str, Any]],
) -> dict[str, list[Mapping[str, Any]]]:
    """Benchmarks with published means of which every task was scored once."""
    found = {}
    for benchmark in dict.fromkeys(b for means in PUBLISHED_MEANS.values() for b in means):
        own = [entry for entry in tasks if entry["task"] in BENCHMARKS[benchmark]]
        if sorted(entry["task"] for entry in own) == sorted(BENCHMARKS[benchmark]):
            found[benchmark] = own
    return found
