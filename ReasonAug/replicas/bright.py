"""Make BRIGHT replicas: find worked problems of the same concept with different wording.

Queries of `theoremqa_questions` are unseen problems of training concepts, queries of `aops` are
problems of held-out concepts. Documents with the wording of the query are excluded, as in BRIGHT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ReasonAug.replicas.hub import Configs
from ReasonAug.splits import UNSEEN_CONCEPTS, UNSEEN_PROBLEMS, Entry, by_concept

SEEN_SUBSET = "theoremqa_questions"
UNSEEN_SUBSET = "aops"
ABOUT = (
    "Schema of BRIGHT v1.1; the texts are generated here, none is from BRIGHT. Split "
    "theoremqa_questions (task BrightTheoremQAQuestionsRetrieval): unseen problems of the concepts "
    "that are trained on, half of them in a wording that is not. Split aops (task "
    "BrightAopsRetrieval): problems of concepts that are not trained on. Gold documents rely on "
    "the same concept and are worded differently; documents worded like the query are excluded."
)
_SEEN_QUERIES = 4  # per concept, half of them with a wording outside the training
_UNSEEN_QUERIES = 6  # per concept and wording
_UNSEEN_DOCUMENTS = 3  # per concept and wording
_DISTRACTORS = 6  # per seen concept, among the documents of the unseen concepts


def bright_configs(entries: Sequence[Entry]) -> Configs:
    """Return the configs `documents` and `examples` with both subsets as splits."""
    seen_queries: list[Entry] = []
    seen_documents: list[Entry] = []
    distractors: list[Entry] = []
    for group in by_concept(entries, UNSEEN_PROBLEMS).values():
        # Entries alternate between known wordings and the new one, so queries have both.
        asked = group[: min(_SEEN_QUERIES, len(group) // 3)]
        rest = group[len(asked) :]
        seen_queries += asked
        seen_documents += rest
        distractors += rest[:_DISTRACTORS]
    unseen_queries: list[Entry] = []
    unseen_documents: list[Entry] = []
    for group in by_concept(entries, UNSEEN_CONCEPTS).values():
        for form in sorted({entry.problem.form for entry in group}):
            same = [entry for entry in group if entry.problem.form == form]
            unseen_queries += same[: min(_UNSEEN_QUERIES, len(same) // 2)]
            unseen_documents += same[-min(_UNSEEN_DOCUMENTS, len(same) // 2) :]
    corpora = {SEEN_SUBSET: seen_documents, UNSEEN_SUBSET: unseen_documents + distractors}
    queries = {SEEN_SUBSET: seen_queries, UNSEEN_SUBSET: unseen_queries}
    return {
        "documents": {
            subset: [{"id": e.id, "content": e.problem.document()} for e in corpus]
            for subset, corpus in corpora.items()
        },
        "examples": {
            subset: [_example(query, corpora[subset]) for query in asked]
            for subset, asked in queries.items()
        },
    }


def _example(query: Entry, corpus: Sequence[Entry]) -> dict[str, Any]:
    same = [entry for entry in corpus if entry.problem.concept == query.problem.concept]
    gold = [entry.id for entry in same if entry.problem.form != query.problem.form]
    excluded = [entry.id for entry in same if entry.problem.form == query.problem.form]
    return {
        "id": query.id,
        "query": query.problem.statement,
        "reasoning": query.problem.concept,
        "gold_ids": gold,
        "gold_ids_long": ["N/A"],
        "excluded_ids": excluded or ["N/A"],
        "gold_answer": query.problem.solution,
    }
