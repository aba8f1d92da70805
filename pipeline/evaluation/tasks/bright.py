"""BRIGHT's texts by column, for listing: mteb goes through its 1.3 million documents row by row.

Scoring loads them as mteb does. A test compares the two on every subset, and a text that scoring
asks for and the listing lacks is refused by name.
"""

from __future__ import annotations

from typing import Any

import datasets

from pipeline.errors import blame
from pipeline.evaluation.tasks.benchmarks import BENCHMARKS

# Subsets whose name is not that of the task in lower case.
_SPELLED = {
    "EarthScience": "earth_science",
    "SustainableLiving": "sustainable_living",
    "TheoremQATheorems": "theoremqa_theorems",
    "TheoremQAQuestions": "theoremqa_questions",
}
_TASKS = {*BENCHMARKS["BRIGHT"], *BENCHMARKS["BRIGHT-long"]}


def is_bright(task: str) -> bool:
    """Whether `load_columns` reads the task."""
    return task in _TASKS


def load_columns(task: Any) -> dict[str, Any]:
    """Corpus, queries and judgements of a localised BRIGHT task, as mteb holds a split."""
    topic = task.metadata.name.removeprefix("Bright").removesuffix("Retrieval")
    long = topic.endswith("Long")
    topic = topic.removesuffix("Long")
    subset = _SPELLED.get(topic, topic.lower())
    documents = _load(task, "long_documents" if long else "documents", subset)
    examples = _load(task, "examples", subset)
    gold = examples["gold_ids_long" if long else "gold_ids"]
    return {
        "corpus": documents.select_columns(["id", "content"]).rename_column("content", "text"),
        "queries": examples.select_columns(["id", "query"]).rename_column("query", "text"),
        "relevant_docs": {
            query: dict.fromkeys(ids, 1) for query, ids in zip(examples["id"], gold, strict=True)
        },
    }


def _load(task: Any, config: str, subset: str) -> datasets.Dataset:
    """One subset's files alone; by its name, `datasets` would convert all twelve."""
    source = task.metadata.dataset
    found = f"{task.metadata.name}: cannot load {config} of the data set {source['path']}"
    with blame(found, fix="fetch it again with `diffembed evaluate prefetch`"):
        builder = datasets.load_dataset_builder(source["path"], config, revision=source["revision"])
        files = {subset: builder.config.data_files[subset]}
        return datasets.load_dataset(builder.name, data_files=files, split=subset)
