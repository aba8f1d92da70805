"""The stages between concepts and rows: the question of each about an item, and its outcome."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from random import Random
from typing import Any

from ReasonAug.generations import split_generation
from ReasonAug.synthesis import concepts, solutions
from ReasonAug.synthesis.answers import (
    Rewritten,
    Verdict,
    WrittenDefinition,
    WrittenNegative,
    WrittenProblem,
)
from ReasonAug.synthesis.calls import Calls, Item, Unanswered
from ReasonAug.synthesis.config import SynthesisConfig
from ReasonAug.synthesis.solutions import Execution, together

DEFINITIONS, PROBLEMS, CHECKED, SOLVED, REWRITTEN, CLEAN = (
    "definitions", "problems", "checked", "solved", "rewritten", "clean"
)  # fmt: skip
NAMES = (concepts.STAGE, DEFINITIONS, PROBLEMS, CHECKED, SOLVED, REWRITTEN, CLEAN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The inputs of a stage."""

    config: SynthesisConfig
    calls: Calls
    execution: Execution | None
    limit: int | None = None


Work = Callable[[Context, Item], Awaitable[Item]]
Sift = Callable[[Item], Item]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Args:
        feed: turns the items that reach it into those it works on.
        work: completes an item, with calls; raises Unanswered to drop it.
        prompts: the prompts that an item asks, for plans.
        make_sift: makes a function that sees all finished items in order, to drop some.
        blank: the fields that it adds, for an item whose calls fail.
    """

    name: str
    work: Work
    prompts: Callable[[SynthesisConfig, Item], list[str]]
    feed: Callable[[Context, Iterator[Item]], Iterator[Item]] = lambda context, items: items
    make_sift: Callable[[SynthesisConfig], Sift] = lambda config: lambda item: item
    blank: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# --- definitions -----------------------------------------------------------------------------


async def _define(context: Context, item: Item) -> Item:
    if item["definition"]:
        return item
    if (imported := context.calls.imported(DEFINITIONS, item["id"])) is not None:
        return {**item, "definition": imported}
    written = await context.calls.ask_about(
        DEFINITIONS, "definition", WrittenDefinition, item, "domain", "concept"
    )
    body = f"**Concept**\n{item['concept']}\n\n**Definition**\n{written.definition}"
    if item["kind"] == "coding" and written.code:
        code = solutions.source_of(written.code)
        body += f"\n\n**Implementation Code**\n```python\n{code}\n```"
    return {**item, "definition": body}


class _DistinctDefinitions:
    """Drops a concept whose definition is nearly one that was seen before in its domain."""

    def __init__(self, config: SynthesisConfig) -> None:
        self._similarity = config.concepts.max_similarity
        self._signatures: list[Any] = []
        self._bands: dict[tuple[str, int, int], int] = {}

    def __call__(self, item: Item) -> Item:
        if item["dropped"] is not None or item.get("unknown"):
            return item
        # Slow to import, and a finished run needs it not at all.
        from pipeline.data.prepare.tokenise import band_keys, minhash

        # Without name and headings, which differ even if the texts are the same.
        text = item["definition"].replace(item["concept"], "")
        signature = minhash(text)
        keys = band_keys(signature[None, :])[:, 0].tolist()
        places = [(item["domain"], band, key) for band, key in enumerate(keys)]
        for number in {self._bands[place] for place in places if place in self._bands}:
            if float((self._signatures[number] == signature).mean()) >= self._similarity:
                return {**item, "dropped": "repeated"}
        for place in places:
            self._bands.setdefault(place, len(self._signatures))
        self._signatures.append(signature)
        return item


# --- problems --------------------------------------------------------------------------------


def _problem_items(context: Context, items: Iterator[Item]) -> Iterator[Item]:
    """Yield an item for each problem to write, with its options."""
    config = context.config
    if context.limit is None:
        numbered = ((item, config.problems.per_concept) for item in items)
    else:
        chosen = list(items)
        share, rest = divmod(context.limit, max(1, len(chosen)))
        numbered = ((item, share + (k < rest)) for k, item in enumerate(chosen))
    for item, count in numbered:
        for n in range(1, count + 1):
            yield {
                "id": f"{item['id']}/{n}",
                "domain": item["domain"],
                "kind": item["kind"],
                "concept": item["concept"],
                "n": n,
                "options": draw_options(config, f"{item['id']}/{n}"),
                "definition": item["definition"],
                "problem": "",
                "solution": "",
                "answer": "",
                "dropped": None,
                **({"unknown": True} if item.get("unknown") else {}),
            }


def draw_options(config: SynthesisConfig, item: str) -> dict[str, str]:
    """Return the options of a problem; they depend on the seed and its id alone."""
    rng = Random(f"{config.seed}/options/{item}")
    drawn = config.problems
    return {
        "context": rng.choice(drawn.contexts),
        "difficulty": rng.choice(drawn.difficulties),
        "length": rng.choice(drawn.lengths),
        "persona": rng.choice(drawn.personas),
    }


async def _write_problem(context: Context, item: Item) -> Item:
    if (imported := context.calls.imported(PROBLEMS, item["id"])) is not None:
        parts = split_generation(imported)
        if parts is None:
            raise Unanswered("unreadable")
        return {**item, "problem": parts[0], "solution": parts[1]}
    more = {"number": str(item["n"]), **item["options"]}
    written = await context.calls.ask_about(
        PROBLEMS, "problem", WrittenProblem, item, "domain", "concept", "definition", **more
    )
    return {**item, **_parts(written, item)}


def _parts(written: WrittenProblem, item: Item) -> dict[str, str]:
    solution = written.solution
    if item["kind"] == "coding":
        solution = solutions.source_of(solution)
    return {"problem": written.problem, "solution": solution, "answer": written.answer}


class _DistinctProblems:
    """Drops a problem whose text was written before: it would be its own positive."""

    def __init__(self, config: SynthesisConfig) -> None:
        self._seen: set[int] = set()

    def __call__(self, item: Item) -> Item:
        if item["dropped"] is not None or item.get("unknown"):
            return item
        identity = hash_text(item["problem"])
        if identity in self._seen:
            return {**item, "dropped": "repeated"}
        self._seen.add(identity)
        return item


def hash_text(text: str) -> int:
    """Return a hash of a text's words that is the same in every process."""
    return int.from_bytes(concepts.digest(" ".join(text.casefold().split()))[:8], "big")


# --- checks ----------------------------------------------------------------------------------


async def _check(context: Context, item: Item) -> Item:
    """Ask whether the problem needs its concept; if not, have it rewritten once."""
    if not context.config.checks.problem or _is_imported(context, item):
        return {**item, "on_topic": None, "rewritten": False}
    found = await _ask_check(context, item)
    if found.verdict:
        return {**item, "on_topic": True, "rewritten": False}
    fields = ("domain", "concept", "definition", "problem")
    written = await context.calls.ask_about(
        CHECKED, "rewrite", WrittenProblem, item, *fields, reason=found.reason
    )
    item = {**item, **_parts(written, item), "rewritten": True}
    again = await _ask_check(context, item)
    dropped = None if again.verdict else "off_topic"
    return {**item, "on_topic": again.verdict, "dropped": dropped}


def _is_imported(context: Context, item: Item) -> bool:
    """Return True for a problem whose verdict was imported: its text must stay as it is."""
    return context.calls.imported(SOLVED, item["id"]) is not None


async def _ask_check(context: Context, item: Item) -> Verdict:
    return await context.calls.ask_about(
        CHECKED, "check", Verdict, item, "concept", "definition", "problem"
    )


async def _solve(context: Context, item: Item) -> Item:
    """Verify the solution, and drop the item if it is wrong or, unless allowed, unverified."""
    checks = context.config.checks
    if (imported := context.calls.imported(SOLVED, item["id"])) is not None:
        said: dict[str, Any] = json.loads(imported)
        verification = solutions.Verification(
            method="imported", accepted=said["accepted"], reason=said.get("reason", "")
        )
        item = {**item, "solution": said.get("solution") or item["solution"]}
    elif not checks.solution:
        verification = solutions.Verification(method="none", accepted=None, reason="not asked for")
    else:
        verification = await solutions.verify(item, context.calls, checks, context.execution)
    dropped = None
    if verification.accepted is None and checks.solution and not checks.keep_unverified:
        dropped = "unverified"
    elif verification.accepted is False:
        dropped = "wrong_solution"
    return {**item, "verification": dataclasses.asdict(verification), "dropped": dropped}


# --- rewrites and written negatives ----------------------------------------------------------


def drawn_rewrites(config: SynthesisConfig, item: str) -> dict[str, bool]:
    """Return which other forms a problem gets; they depend on the seed and its id alone."""
    shares: Mapping[str, float] = {
        "forum": config.rewrites.forum,
        "exam": config.rewrites.exam,
        "long": config.rewrites.long,
    }
    return {
        form: Random(f"{config.seed}/{form}/{item}").random() < share
        for form, share in shares.items()
    }


async def _rewrite(context: Context, item: Item) -> Item:
    """Write the query's other forms and a hard negative; a call that fails costs only its text."""
    drawn = drawn_rewrites(context.config, item["id"])
    calls = context.calls

    async def form(name: str) -> str:
        if not drawn[name]:
            return ""
        try:
            written = await calls.ask_about(REWRITTEN, name, Rewritten, item, "problem")
        except Unanswered:
            return ""
        return written.question

    async def negative() -> dict[str, str] | None:
        if not context.config.negatives.written:
            return None
        try:
            fields = ("domain", "concept", "definition", "problem")
            written = await calls.ask_about(REWRITTEN, "negative", WrittenNegative, item, *fields)
        except Unanswered:
            return None
        if concepts.concept_id("", written.concept) == concepts.concept_id("", item["concept"]):
            return None  # it would be a second positive
        return dataclasses.asdict(written)

    forum, exam, written = await together(form("forum"), form("exam"), negative())
    return {
        **item,
        "rewrites": {"forum": forum, "exam": exam, "long": drawn["long"]},
        "written_negative": written,
    }


# --- the list --------------------------------------------------------------------------------


def _solve_prompts(config: SynthesisConfig, item: Item) -> list[str]:
    checks = config.checks
    if not checks.solution:
        return []
    if item["kind"] == "coding":
        if checks.execution == "off":
            return []
        return ["tests", *["solve-coding"] * checks.solutions]
    return ["solve-numeric" if item["kind"] == "numeric" else "judge"] * checks.solutions


def _rewrite_prompts(config: SynthesisConfig, item: Item) -> list[str]:
    drawn = drawn_rewrites(config, item["id"])
    forms = [name for name in ("forum", "exam") if drawn[name]]
    return [*forms, *(["negative"] if config.negatives.written else [])]


STAGES = (
    Stage(
        name=DEFINITIONS,
        work=_define,
        prompts=lambda config, item: [] if item["definition"] else ["definition"],
        make_sift=_DistinctDefinitions,
    ),
    Stage(
        name=PROBLEMS,
        work=_write_problem,
        prompts=lambda config, item: ["problem"],
        feed=_problem_items,
        make_sift=_DistinctProblems,
    ),
    Stage(
        name=CHECKED,
        work=_check,
        # A rewrite is the exception; plans count the calls of a problem that passes.
        prompts=lambda config, item: ["check"] if config.checks.problem else [],
        blank={"on_topic": None, "rewritten": False},
    ),
    Stage(
        name=SOLVED,
        work=_solve,
        prompts=_solve_prompts,
        blank={
            "verification": dataclasses.asdict(
                solutions.Verification(method="none", accepted=None, reason="no answer")
            )
        },
    ),
    Stage(name=REWRITTEN, work=_rewrite, prompts=_rewrite_prompts),
)
