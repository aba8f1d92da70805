"""What a query asks of the model, per task. Documents get no instruction, on any task.

mteb falls back to one default instruction and applies it to documents as well; scores then drop
without any message, so this package asks only this file.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.evaluation.benchmarks import BENCHMARKS

DEFAULT_INSTRUCTION = "Retrieve text based on user query"

_POST = "Given a {} post, retrieve passages that help answer it"

_BRIGHT = {
    "Biology": _POST.format("Biology"),
    "EarthScience": _POST.format("Earth Science"),
    "Economics": _POST.format("Economics"),
    "Psychology": _POST.format("Psychology"),
    "Robotics": _POST.format("Robotics"),
    "Stackoverflow": _POST.format("Stack Overflow"),
    "SustainableLiving": _POST.format("Sustainable Living"),
    "Pony": "Given a question about the Pony language, retrieve documentation that helps answer it",
    "Leetcode": "Given a coding problem, retrieve problems that are solved by the same method",
    "Aops": "Given a math problem, retrieve problems that are solved by the same method",
    "TheoremQATheorems": "Given a math problem, retrieve theorems that help solve it",
    "TheoremQAQuestions": "Given a math problem, retrieve problems solved by the same theorem",
}

INSTRUCTIONS: dict[str, str] = {
    task: _BRIGHT[task.removeprefix("Bright").removesuffix("Retrieval").removesuffix("Long")]
    for benchmark in ("BRIGHT", "BRIGHT-long")
    for task in BENCHMARKS[benchmark]
}


def instruction_for(task: str, overrides: Mapping[str, str]) -> str:
    """The instruction of a task's queries; a config's own text wins, and may be empty.

    FollowIR's instructions belong to single queries and are part of their texts already; what
    stands here comes before them.
    """
    if task in overrides:
        return overrides[task]
    return INSTRUCTIONS.get(task, DEFAULT_INSTRUCTION)
