"""Which mteb tasks a name in the config stands for, without mteb: a login node counts them fast."""

from __future__ import annotations

from collections.abc import Iterable

_BRIGHT_TOPICS = (
    "Biology",
    "EarthScience",
    "Economics",
    "Psychology",
    "Robotics",
    "Stackoverflow",
    "SustainableLiving",
    "Pony",
)

# Same names and members as mteb's benchmarks; a test holds them together. The two BRIGHT entries
# split mteb's `BRIGHT(v1.1)`, whose standard and long halves have different metrics.
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "FollowIR": (
        "Robust04InstructionRetrieval",
        "News21InstructionRetrieval",
        "Core17InstructionRetrieval",
    ),
    "LongEmbed": (
        "LEMBNarrativeQARetrieval",
        "LEMBNeedleRetrieval",
        "LEMBPasskeyRetrieval",
        "LEMBQMSumRetrieval",
        "LEMBSummScreenFDRetrieval",
        "LEMBWikimQARetrieval",
    ),
    "BRIGHT": (
        *(f"Bright{topic}Retrieval" for topic in _BRIGHT_TOPICS),
        "BrightLeetcodeRetrieval",
        "BrightAopsRetrieval",
        "BrightTheoremQATheoremsRetrieval",
        "BrightTheoremQAQuestionsRetrieval",
    ),
    "BRIGHT-long": tuple(f"Bright{topic}LongRetrieval" for topic in _BRIGHT_TOPICS),
    # Only for comparison with old tables: its excluded documents are not excluded.
    "BRIGHT-v1": ("BrightRetrieval",),
    "BRIGHT-v1-long": ("BrightLongRetrieval",),
}


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Task names in order, benchmarks replaced by their tasks, each task once."""
    tasks: dict[str, None] = {}
    for name in names:
        tasks.update(dict.fromkeys(BENCHMARKS.get(name, (name,))))
    return tuple(tasks)


def benchmark_of(task: str) -> str:
    """The benchmark a task belongs to; `other` for tasks of none of them."""
    for benchmark, tasks in BENCHMARKS.items():
        if task in tasks:
            return benchmark
    return "other"
