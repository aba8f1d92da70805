"""What a query asks of the model, per model and task. Documents get no instruction, on any task.

mteb falls back to one default instruction and applies it to documents as well; scores then drop
without any message, so this package asks only this file.
"""

from __future__ import annotations

from pipeline.config import EvaluateConfig, EvaluatedModel
from pipeline.evaluation.tasks.benchmarks import BENCHMARKS, benchmark_of

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


# The published sentences of arXiv 2505.15045 (appendix D.2), letter by letter: a table is compared
# with what it was made with. Its other tasks have none and get the default with a colon.
_PAPER_DEFAULT = "Retrieve text based on user query:"
_PAPER_POST = "Given a {}, retrieve relevant passages that help answer the {}:"
_PAPER_BRIGHT = {
    "Biology": _PAPER_POST.format("biology post", "post"),
    "Economics": _PAPER_POST.format("economics post", "post"),
    "Stackoverflow": _PAPER_POST.format("post", "post"),
    "Pony": _PAPER_POST.format("Pony question", "question"),
    "Leetcode": "Given a coding problem, retrieve the relevant problems that can be solved by the "
    "similar algorithms or data structures:",
    "Aops": "Given a problem, rretrieve the relevant problems that can be solved by the similar "
    "math theorems:",
    "TheoremQATheorems": "Given a problem, retrieve the relevant theorems that help solve the "
    "given problem:",
    "TheoremQAQuestions": "Given a problem, retrieve the relevant problems that can be solved by "
    "the similar theorems:",
}

PAPER_INSTRUCTIONS: dict[str, str] = {
    "BrightRetrieval": "Given a problem, retrieve solutions to other problems that use the same "
    "method as the correct solution to the given question:",
    **{f"Bright{topic}Retrieval": text for topic, text in _PAPER_BRIGHT.items()},
}

_SETS = {
    "diffembed": (INSTRUCTIONS, DEFAULT_INSTRUCTION),
    "paper": (PAPER_INSTRUCTIONS, _PAPER_DEFAULT),
}


def instruction_for(task: str, model: EvaluatedModel, config: EvaluateConfig) -> str:
    """The instruction of a task's queries for a model.

    The model's own text wins, then the config's, then the set the model asks for; a text may be
    empty. FollowIR's instructions belong to single queries and are part of their texts already;
    what stands here comes before them.
    """
    for given in (model.instructions, config.instructions):
        for name in (task, benchmark_of(task)):
            if name in given:
                return given[name]
    table, default = _SETS[model.instruction_set]
    return table.get(task, default)
