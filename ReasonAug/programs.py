"""Draw coding problems: run a solution on its examples and against an independent brute force."""

from __future__ import annotations

import bisect
import builtins
import collections
import heapq
from collections.abc import Callable, Mapping
from random import Random
from types import ModuleType
from typing import Any

from ReasonAug.problem import Values

_MODULES: Mapping[str, ModuleType] = {
    "bisect": bisect,
    "collections": collections,
    "heapq": heapq,
}
_BUILTINS = (
    "abs", "all", "any", "bool", "dict", "enumerate", "float", "int", "len", "list", "map", "max",
    "min", "range", "reversed", "set", "sorted", "str", "sum", "tuple", "zip",
)  # fmt: skip
_NAMES = (
    "solve",
    "answer",
    "compute",
    "evaluate",
    "work_out",
    "find_result",
    "process",
    "run_case",
)
_ASKS = (
    "Write a function `{call}` that returns the result.",
    "Implement `{call}`.",
    "Your task is to complete `{call}`.",
    "Return the answer from `{call}`.",
)


def _import(name: str, *_: Any) -> ModuleType:
    if name not in _MODULES:
        raise ImportError(f"a solution may import {sorted(_MODULES)}, not {name!r}")
    return _MODULES[name]


def load_function(source: str, name: str) -> Callable[..., Any]:
    """Execute `source` with a short list of builtins and return its function `name`."""
    allowed: dict[str, Any] = {key: getattr(builtins, key) for key in _BUILTINS}
    scope: dict[str, Any] = {"__builtins__": {**allowed, "__import__": _import}}
    exec(compile(source, "<solution>", "exec"), scope)
    function: Callable[..., Any] = scope[name]
    return function


def coding_draw(
    source: str, *, reference: Callable[..., Any], arguments: Callable[[Random], tuple[Any, ...]]
) -> Callable[[Random], Values]:
    """Return the `draw` of a coding concept.

    Args:
        source: Python source of a function `solve`.
        reference: An independent, slower method with the same arguments.
        arguments: Draws the arguments of one call.
    """
    source = source.strip()
    head = source[source.index("def solve(") + len("def solve(") :]
    signature = head[: head.index(")")]
    function = load_function(source, "solve")

    def draw(rng: Random) -> Values:
        name = rng.choice(_NAMES)
        renamed = source.replace("solve(", f"{name}(")
        examples = [arguments(rng) for _ in range(rng.choice((1, 2, 2, 3)))]
        load = load_function(renamed, name)
        lines = []
        for example in examples:
            expected = reference(*_copies(example))
            found = load(*_copies(example))
            if found != expected:
                raise ArithmeticError(f"{name}{example} gives {found}, brute force {expected}")
            lines.append(f"{name}({', '.join(map(repr, example))}) -> {expected!r}")
        # further cases are checked although they are not printed
        for _ in range(4):
            hidden = arguments(rng)
            if function(*_copies(hidden)) != reference(*_copies(hidden)):
                raise ArithmeticError(f"solution fails on {hidden}")
        ask = rng.choice(_ASKS).format(call=f"{name}({signature})")
        heading = rng.choice(("Examples:", "For instance:", "Sample calls:"))
        return {
            "statement_tail": f"\n{ask}\n{heading}\n" + "\n".join(lines),
            "solution_tail": f"\n```python\n{renamed}\n```",
        }

    return draw


def _copies(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy lists, so that a function which changes its arguments cannot change the example."""
    return tuple(_copy(argument) for argument in arguments)


def _copy(value: Any) -> Any:
    return [_copy(item) for item in value] if isinstance(value, list) else value
