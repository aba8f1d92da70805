"""Make a BRIGHT replica from generations: find other worked problems of a held-out concept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.errors import UserError
from ReasonAug.files import make_folder
from ReasonAug.generations import GeneratedProblem
from ReasonAug.replicas.bright import UNSEEN_SUBSET
from ReasonAug.replicas.hub import Configs, write_dataset
from ReasonAug.splits import slug

_ABOUT = (
    "Schema of BRIGHT v1.1; the texts are generations, none is from BRIGHT. Split "
    f"{UNSEEN_SUBSET}: problems of concepts that are not trained on, asked against the worked "
    "problems of all concepts. Gold documents are the others of the same concept; a query's own "
    "worked problem is excluded."
)


def write_generated_bright(
    hub: Path, problems: Sequence[GeneratedProblem], *, held_out: Collection[str]
) -> None:
    """Write data set `mteb/BRIGHT` below `hub`, for the task BrightAopsRetrieval.

    Args:
        problems: All that passed; each becomes a document.
        held_out: The concepts whose problems are queries.

    Raises:
        UserError: No problem can be a query, or `hub` cannot be written.
    """
    make_folder(hub)
    count = write_dataset(hub, "mteb/BRIGHT", generated_configs(problems, held_out), about=_ABOUT)
    print(f"mteb/BRIGHT: {count} rows")


def generated_configs(problems: Sequence[GeneratedProblem], held_out: Collection[str]) -> Configs:
    """Return the configs `documents` and `examples` with one split.

    Raises:
        UserError: No held-out concept has two problems, so no query has an answer.
    """
    documents: dict[str, GeneratedProblem] = {}
    same: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        group = same.setdefault((problem.domain, problem.concept), [])
        name = f"{slug(problem.domain)}-{slug(problem.concept)}-{len(group)}"
        documents[name] = problem
        group.append(name)
    examples = []
    for name, problem in documents.items():
        gold = [other for other in same[problem.domain, problem.concept] if other != name]
        if problem.concept not in held_out or not gold:
            continue
        examples.append(
            {
                "id": f"query-{name}",
                "query": problem.statement,
                "reasoning": problem.concept,
                "gold_ids": gold,
                "gold_ids_long": ["N/A"],
                "excluded_ids": [name],
                "gold_answer": problem.solution,
            }
        )
    if not examples:
        raise UserError(
            found=f"no two problems of any of the {len(held_out)} concepts held out",
            fix="hold out a larger share of the concepts, or generate more",
        )
    rows = [{"id": name, "content": problem.document()} for name, problem in documents.items()]
    return {"documents": {UNSEEN_SUBSET: rows}, "examples": {UNSEEN_SUBSET: examples}}
