"""Define the answers to each prompt, and read them from what a model wrote.

Servers with structured output keep to the schema. Others wrap JSON in a fence or in sentences,
leave commas behind, write backslashes of LaTeX singly, or answer under headings; all of that is
read. What still cannot be read is reported with the reason, for one repair call.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, TypeVar

from ReasonAug.generations import split_generation, verdict

T = TypeVar("T")


class UnreadableError(Exception):
    """An answer lacks something; the message names it for the model that repairs it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Proposed:
    """Names of concepts."""

    concepts: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WrittenDefinition:
    """A definition; in a coding domain with an implementation."""

    definition: str
    code: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WrittenProblem:
    """A problem, its worked solution and the final result."""

    problem: str
    solution: str
    answer: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A yes or no with its reason."""

    verdict: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WrittenTests:
    """Assert statements."""

    tests: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SecondSolution:
    """An independent solution and its final result."""

    solution: str
    answer: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WrittenNegative:
    """A worked problem of another concept."""

    concept: str
    problem: str
    solution: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rewritten:
    """A query in another form."""

    question: str


_TYPES: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "bool": {"type": "boolean"},
    "list[str]": {"type": "array", "items": {"type": "string"}},
}


def json_schema(kind: type) -> dict[str, Any]:
    """Return the strict JSON schema of a kind of answer."""
    properties = {field.name: _TYPES[str(field.type)] for field in dataclasses.fields(kind)}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def read_answer(kind: type[T], text: str, *, is_cut: bool = False) -> T:
    """Return an answer as its kind.

    Args:
        kind: the kind of answer.
        text: what the model wrote.
        is_cut: the text ends at the token limit, so only a whole JSON object is an answer.

    Raises:
        UnreadableError: it has no such content.
    """
    text = _without_thoughts(text)
    tree = _find_object(text)
    if tree is None and not is_cut:
        tree = _read_plain(kind, text)
    if tree is None:
        raise UnreadableError("no JSON object in it, or one that is cut short")
    found = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        optional = field.default is not dataclasses.MISSING
        value = _read_value(str(field.type), tree.get(field.name))
        if value is None or (value in ("", []) and not optional):
            if not optional:
                raise UnreadableError(f"the key {field.name!r} is missing or empty")
            continue
        found[field.name] = value
    return kind(**found)


_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
_END_OF_THOUGHTS = re.compile(r".*</think(?:ing)?>", re.DOTALL)
_START_OF_THOUGHTS = re.compile(r"<think(?:ing)?>.*", re.DOTALL)
_COMMA = re.compile(r",(\s*[}\]])")


def _without_thoughts(text: str) -> str:
    """Return an answer without the thoughts before it, which may hold drafts of it."""
    text = _THOUGHTS.sub("", text)
    # Some chat templates write the first tag themselves, so only the second is in the answer; a
    # model that is cut off while it thinks writes only the first.
    return _START_OF_THOUGHTS.sub("", _END_OF_THOUGHTS.sub("", text))


_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|[a-zA-Z]+|.)", re.DOTALL)
# Commands of LaTeX that begin like a tab or a line break. The second group is taken for a command
# only behind these characters: code on a new line begins like them, too.
_LATEX = {"theta", "tau", "times", "tilde", "tanh", "tfrac", "triangle", "textstyle", "therefore"}
_LATEX_IN_LINE = {"to", "tan", "text", "textbf", "textit", "textrm", "nabla", "neq", "notin", "nu"}
_IN_LINE = " $({}[=+-*/^_|&"


def _double_backslashes(text: str) -> str:
    r"""Return JSON in which backslashes that a model wrote singly are doubled.

    To JSON, `\frac` is a form feed and `rac`, `\times` a tab and `imes`, and `\sqrt` a fault.
    """

    def double(found: re.Match[str]) -> str:
        name, place = found[1], found.start()
        if name == "'":
            return name
        is_escape = name[0] in '"\\/nrt' or re.fullmatch("u[0-9a-fA-F]{4}", name)
        is_latex = (
            name in _LATEX
            or (name in _LATEX_IN_LINE and place > 0 and text[place - 1] in _IN_LINE)
            or (name[0] == "r" and len(name) > 1)  # a carriage return, and a word right behind it
        )
        # `\b` and `\f` never are the backspace and the form feed that JSON reads.
        return found[0] if is_escape and not is_latex else f"\\{found[0]}"

    return _ESCAPE.sub(double, text)


def _find_object(text: str) -> dict[str, Any] | None:
    """Return the first JSON object in a text, alone, in a fence, or between sentences."""
    text = _double_backslashes(text)
    start = text.find("{")
    candidates = [text, *(match[1] for match in _FENCE.finditer(text))]
    if start >= 0:
        candidates.append(text[start : text.rfind("}") + 1])
    for candidate in candidates:
        for repaired in (candidate, _COMMA.sub(r"\1", candidate)):
            try:
                # Not strict: models write line breaks into strings.
                tree = json.loads(repaired.strip(), strict=False)
            except (ValueError, RecursionError):
                continue
            if isinstance(tree, dict):
                return tree
    if start >= 0:
        try:
            tree, _ = json.JSONDecoder(strict=False).raw_decode(text, start)
        except (ValueError, RecursionError):
            return None
        return tree if isinstance(tree, dict) else None
    return None


def _read_plain(kind: type, text: str) -> dict[str, Any] | None:
    """Return the content of an answer in words, where its kind has a usual form."""
    if kind is WrittenProblem and (parts := split_generation(text)):
        return {"problem": parts[0], "solution": parts[1]}
    if kind is Verdict and (said := verdict(text)) is not None:
        return {"verdict": said, "reason": text}
    return None


def _read_value(kind: str, value: Any) -> Any:
    """Return a value as its type; None if it is of another one."""
    if kind == "bool":
        if isinstance(value, str):
            return {"true": True, "false": False}.get(value.strip().lower(), verdict(value))
        return value if isinstance(value, bool) else None
    if kind == "list[str]":
        if not isinstance(value, list):
            return None
        return [item.strip() for item in value if isinstance(item, str) and item.strip()]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    # Text that no file can hold, as from a pair of escapes cut in half.
    return str(value).strip().encode("utf-8", errors="replace").decode()
