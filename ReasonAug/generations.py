"""Read problems and solutions that a language model wrote and confirmed in a second pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from ReasonAug.files import read_jsonl, require_texts
from ReasonAug.triplets import CODING

# `**Problem**`, `**Problem:**`, `**Problem**:`, `## Problem`, `Problem:`, alone or before text.
_HEADING = re.compile(
    r"^[ \t]*(?:#{1,6}[ \t]*)?(?P<bold>\*\*|__)?[ \t]*(?P<name>problem|solution|definition)"
    r"[ \t]*:?(?(bold)[ \t]*(?P=bold))[ \t]*:?[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
_MARKS = "#*_:"  # without any, "Problem" is the first word of a sentence
_FENCE = re.compile(r"```python[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)
_VERDICT = re.compile(r"[\W_]*(yes|no)\b", re.IGNORECASE)

# The reasons to reject a generation.
UNPARSABLE = "unparsable"
REJECTED = "rejected"
NO_VERDICT = "no_verdict"
NO_CODE = "no_code"
ACCEPTED = "accepted"


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedProblem:
    """An accepted problem with its solution (of a coding domain: the checked program)."""

    concept: str
    domain: str
    statement: str
    solution: str

    def document(self) -> str:
        """Return problem and solution as one document, with one spelling of the headings."""
        return f"**Problem**\n{self.statement}\n\n**Solution**\n{self.solution}"


def split_generation(text: str) -> tuple[str, str] | None:
    """Return problem and solution of a generation; None if a heading or a body is missing."""
    headings = list(_headings(text))
    problem = next((h for h in headings if h["name"].lower() == "problem"), None)
    if problem is None:
        return None
    after = (h for h in headings if h.start() > problem.start())
    solution = next((h for h in after if h["name"].lower() == "solution"), None)
    if solution is None:
        return None
    parts = text[problem.end() : solution.start()].strip(), text[solution.end() :].strip()
    return parts if all(parts) else None


def definition_body(text: str) -> str:
    """Return the text below the heading `Definition`; the whole text without that heading."""
    heading = next((h for h in _headings(text) if h["name"].lower() == "definition"), None)
    return text[heading.end() if heading else 0 :].strip()


def _headings(text: str) -> Iterator[re.Match[str]]:
    return (h for h in _HEADING.finditer(text) if any(mark in h.group() for mark in _MARKS))


def verdict(check: str | None) -> bool | None:
    """Return the first word of the check, yes or no; None for any other word."""
    found = _VERDICT.match(check or "")
    return found[1].lower() == "yes" if found else None


def program(check: str) -> str | None:
    """Return the first Python program of a check, or None."""
    found = _FENCE.search(check)
    return found[1].strip("\n") or None if found else None


def judge(row: Mapping[str, Any]) -> GeneratedProblem | str:
    """Return the accepted problem of a row of generations, or the reason of its rejection."""
    parts = split_generation(row["generation"])
    if parts is None:
        return UNPARSABLE
    accepted = verdict(row.get("check"))
    if not accepted:
        return NO_VERDICT if accepted is None else REJECTED
    statement, solution = parts
    if row["domain"] in CODING:
        code = program(row["check"])
        if code is None:
            return NO_CODE
        solution = f"```python\n{code}\n```"
    return GeneratedProblem(
        concept=row["concept"], domain=row["domain"], statement=statement, solution=solution
    )


def read_generations(path: Path) -> tuple[list[GeneratedProblem], Counter[str]]:
    """Return accepted problems in the order of the file, and counts of rejections by reason.

    Raises:
        UserError: The file is missing or empty, or a row lacks a field.
    """
    fix = "name a file of generations"
    rows = read_jsonl(path, fix=fix)
    if not rows:
        raise UserError(f"{path}: no generation in it", fix=fix)
    require_texts(path, rows, ("domain", "concept", "generation"), optional="check")
    judged = [judge(row) for row in rows]
    fates = Counter(fate if isinstance(fate, str) else ACCEPTED for fate in judged)
    # A statement that was written twice would be its own positive.
    problems = {item.statement: item for item in judged if isinstance(item, GeneratedProblem)}
    return list(problems.values()), fates


def read_definitions(path: Path) -> dict[tuple[str, str], str]:
    """Return the definition of each (domain, concept), without its headings.

    Raises:
        UserError: The file is missing or a row lacks a field.
    """
    rows = read_jsonl(path, fix="name a file of definitions")
    require_texts(path, rows, ("domain", "concept", "definition"))
    return {(row["domain"], row["concept"]): definition_body(row["definition"]) for row in rows}


def by_domain(
    problems: Iterable[GeneratedProblem],
) -> dict[str, dict[str, list[GeneratedProblem]]]:
    """Group problems by domain and concept, in order of appearance."""
    groups: dict[str, dict[str, list[GeneratedProblem]]] = {}
    for problem in problems:
        groups.setdefault(problem.domain, {}).setdefault(problem.concept, []).append(problem)
    return groups
