"""Make a FollowIR replica: the same query with a wide and with a narrow instruction.

The wide one accepts a concept's problems in every setting, the narrow one only those set at a few
places. Documents that only the wide one accepts should sink; p-MRR measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from ReasonAug.replicas.hub import Configs
from ReasonAug.scenes import PLACES
from ReasonAug.splits import UNSEEN_CONCEPTS, UNSEEN_PROBLEMS, Entry, by_concept

ABOUT = (
    "Schema of the FollowIR sets. A query names a concept; the original instruction accepts its "
    "problems in any setting, the changed one only at the places that it lists."
)
_SEEN_CONCEPTS = 10
_DOCUMENTS = 16  # per concept
_OTHERS = 24  # candidates of other concepts of the same domain, per query
_FIRST_ID = 301  # TREC topics are numbered from 301


def followir_configs(entries: Sequence[Entry], rng: Random) -> Configs:
    """Return the six configs of a FollowIR data set."""
    groups = _usable(entries, rng)
    documents = [entry for group in groups.values() for entry in group]
    tables: dict[str, list[dict[str, Any]]] = {
        "queries": [],
        "instruction": [],
        "top_ranked": [],
        "default": [],
        "qrel_diff": [],
    }
    number = _FIRST_ID
    for concept, group in groups.items():
        others = [
            entry
            for entry in documents
            if entry.problem.domain == group[0].problem.domain and entry.problem.concept != concept
        ]
        for world in _worlds(group):
            candidates = group + rng.sample(others, min(_OTHERS, len(others)))
            _add_query(tables, str(number), concept, world, group, candidates)
            number += 1
    corpus = [{"_id": e.id, "title": "", "text": e.problem.document()} for e in documents]
    return {
        "corpus": {"corpus": corpus},
        "default": {"test": tables["default"]},
        **{
            name: {name: tables[name]}
            for name in ("queries", "instruction", "top_ranked", "qrel_diff")
        },
    }


def _usable(entries: Sequence[Entry], rng: Random) -> dict[str, list[Entry]]:
    """Return documents per concept whose text names their place; all unseen concepts, some seen."""
    seen, unseen = by_concept(entries, UNSEEN_PROBLEMS), by_concept(entries, UNSEEN_CONCEPTS)
    chosen = rng.sample(sorted(seen), min(_SEEN_CONCEPTS, len(seen)))
    groups = {}
    for concept, group in [*unseen.items(), *((name, seen[name]) for name in chosen)]:
        placed = [e for e in group if e.problem.place in e.problem.statement.lower()]
        groups[concept] = placed[:_DOCUMENTS]
    return {concept: group for concept, group in groups.items() if _worlds(group)}


def _worlds(group: Sequence[Entry]) -> list[str]:
    """Return up to two worlds with some of the documents, but not most of them."""
    counts = {world: sum(e.problem.world == world for e in group) for world in PLACES}
    fitting = [world for world, count in counts.items() if 2 <= count <= len(group) // 2]
    return fitting[:2]


def _add_query(
    tables: dict[str, list[dict[str, Any]]],
    number: str,
    concept: str,
    world: str,
    group: Sequence[Entry],
    candidates: Sequence[Entry],
) -> None:
    """Add one query with both instructions to all tables."""
    places = ", ".join(place for place, _ in PLACES[world])
    kept = {entry.id for entry in group if entry.problem.world == world}
    relevant = {"og": {entry.id for entry in group}, "changed": kept}
    instruction = {
        "og": "A relevant document works out a problem that relies on this concept. "
        "The story around the problem does not matter; it may be set at any place.",
        "changed": "A relevant document works out a problem that relies on this concept, and it "
        f"is set at one of these places: {places}. Problems set elsewhere are not relevant.",
    }
    for kind in ("og", "changed"):
        query = f"{number}-{kind}"
        tables["queries"].append({"_id": query, "text": f"Worked problems on: {concept}"})
        tables["instruction"].append({"query-id": query, "instruction": instruction[kind]})
        tables["top_ranked"].append({"query-id": query, "corpus-ids": [e.id for e in candidates]})
        tables["default"] += [
            {"query-id": query, "corpus-id": e.id, "score": int(e.id in relevant[kind])}
            for e in candidates
        ]
    dropped = [entry.id for entry in group if entry.id not in kept]
    tables["qrel_diff"].append({"query-id": number, "corpus-ids": dropped})
