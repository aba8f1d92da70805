"""Published scores to stand beside ours, with where they come from and why they are not the same.

Percent. Paper: arXiv 2505.15045, tables of version 1. Its BRIGHT scores push excluded documents to
score 0 inside the first 200 instead of removing them, its FollowIR scores rank 200 documents, and
its texts are cut at 4096 tokens (FollowIR: 196). Board: the public MTEB result files of 2026-08-20.
"""

from __future__ import annotations

from collections.abc import Mapping

_FOLLOW_IR = (
    "Robust04InstructionRetrieval",
    "News21InstructionRetrieval",
    "Core17InstructionRetrieval",
)
_LONG = (
    "LEMBNarrativeQARetrieval",
    "LEMBQMSumRetrieval",
    "LEMBSummScreenFDRetrieval",
    "LEMBWikimQARetrieval",
)
_BRIGHT = (
    "BrightTheoremQATheoremsRetrieval",
    "BrightTheoremQAQuestionsRetrieval",
    "BrightAopsRetrieval",
    "BrightLeetcodeRetrieval",
)


def _row(
    follow_ir: tuple[float, ...] = (),
    long_embed: tuple[float, ...] = (),
    bright: tuple[float, ...] = (),
) -> dict[str, float]:
    groups = ((_FOLLOW_IR, follow_ir), (_LONG, long_embed), (_BRIGHT, bright))
    return {
        task: score
        for tasks, scores in groups
        if scores
        for task, score in zip(tasks, scores, strict=True)
    }


# Model -> task -> score in percent.
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "DiffEmbed (paper)": _row((5.7, 3.6, 6.0), (42.1, 43.8, 98.0, 77.2), (38.9, 48.3, 15.4, 30.0)),
    "Qwen2.5 (paper)": _row((1.4, 1.7, 4.4), (31.7, 35.6, 88.0, 68.3), (34.7, 40.2, 15.5, 32.0)),
    "Mistral (paper)": _row((7.0, 1.1, 7.2), (35.0, 36.8, 85.4, 62.9), (32.4, 33.7, 9.4, 20.7)),
    "Llama3+LLM2Vec (paper)": _row(
        (1.9, 1.2, 4.7), (36.5, 34.4, 84.5, 51.1), (28.3, 33.8, 12.6, 23.6)
    ),
    "E5-Mistral (paper)": _row(long_embed=(44.6, 43.6, 96.8, 82.0), bright=(26.8, 26.1, 7.1, 28.7)),
    "ReasonIR-8B (paper)": _row(bright=(27.2, 31.9, 14.7, 35.0)),
    "Promptriever (paper)": _row((11.7, 6.4, 15.4)),
    "Qwen3-Embedding-4B (board)": _row((12.4, 8.7, 13.5)),
    "Qwen3-Embedding-8B (board)": _row((8.6, 9.0, 12.6)),
}


def references_for(tasks: list[str]) -> dict[str, dict[str, float]]:
    """Published rows that hold at least one of the tasks: model -> task -> percent."""
    rows = {
        model: {task: scores[task] for task in tasks if task in scores}
        for model, scores in PUBLISHED.items()
    }
    return {model: scores for model, scores in rows.items() if scores}
