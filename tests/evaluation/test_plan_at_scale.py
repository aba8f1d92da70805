"""The plan of data shaped like the real sets, against what mteb's own tasks hold."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipeline.evaluation.datasets import (
    document_texts,
    evaluated_splits,
    get_task,
    load_and_check,
    localise,
    private_cache,
    query_texts,
)
from pipeline.evaluation.embedding_plan import write_plan
from pipeline.evaluation.tasks import list_elements

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

TASKS = (
    "Core17InstructionRetrieval",
    "LEMBPasskeyRetrieval",
    "BrightAopsRetrieval",
    "BrightTheoremQAQuestionsRetrieval",
    "BrightPonyLongRetrieval",
    "BrightRetrieval",
)


def test_a_plan_holds_every_text_of_mtebs_tasks_once_and_its_costs_add_up(config, tmp_path):
    from full_size_hub import write_hub

    config = dataclasses.replace(
        config,
        models=config.models[:1],
        tasks=TASKS,
        snapshots=write_hub(tmp_path / "hub", scale=0.0003),
        instructions=dict.fromkeys(TASKS, ""),
    )
    texts: Counter[tuple[str, str]] = Counter()
    for element in list_elements(config):
        with private_cache(tmp_path / "cache"):
            task = localise(get_task(element.task), config.snapshots)
            load_and_check(task)
            for _, _, data in evaluated_splits(task):
                texts.update(("document", text) for text in document_texts(data["corpus"]))
                texts.update(("query", text) for text in query_texts(data["queries"]))

    plan = write_plan(config)
    blocks = [plan.read_block(block) for block in range(len(plan.block_costs))]
    planned = [(key.role, key.text) for block in blocks for key in block]
    assert Counter(planned) == Counter(dict.fromkeys(texts, 1))
    assert (plan.num_texts, plan.num_occurrences) == (len(texts), texts.total())
    assert plan.num_occurrences > 1.5 * plan.num_texts

    def cost(text: str) -> float:
        tokens = min(len(text.encode()) / 3.5 + 1, config.max_length)
        return tokens * (1 + tokens / 35_000)

    assert plan.block_costs == pytest.approx([sum(cost(k.text) for k in b) for b in blocks])
    total = sum(count * cost(text) for (_, text), count in texts.items())
    assert plan.occurrence_cost == pytest.approx(total)
