"""Check solutions: run programs against tests, solve again without sight, or have them judged.

    coding    tests (second call) ─┐
              solution ────────────┼─> sandbox ─> passes all, and most other solutions do, too
              other solutions ─────┘
    numeric   other solutions, written without sight of the first ─> most have the same result
    text      a judge, asked as often ─> most say yes

The outcome of a program is recorded in the ledger like an answer: the same ledger gives the same
rows on another machine, and nothing runs twice.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import hashlib
import json
import re
from collections.abc import Awaitable, Sequence
from typing import Protocol, TypeVar

from ReasonAug.synthesis.answers import SecondSolution, Verdict, WrittenTests
from ReasonAug.synthesis.calls import Calls, Item, Unanswered
from ReasonAug.synthesis.compare import same_result
from ReasonAug.synthesis.config import ChecksConfig
from ReasonAug.synthesis.ledger import PROGRAM, SANDBOX, Record

T = TypeVar("T")

STAGE = "solved"
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)


class Execution(Protocol):
    """Runs a program and its tests, and remembers the outcome."""

    async def passed(self, item: str, program: str, tests: Sequence[str]) -> list[bool] | None:
        """Return which tests a program passes; None if it did not get as far as to say so."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The check of a solution, and its result.

    Args:
        accepted: None if it could not be checked.
        tests: tests that were run.
        passed: tests that the solution passed.
        agreed: other solutions, or verdicts, that agree with it.
        solutions: other solutions, or verdicts, in all.
        answers: their results.
    """

    method: str
    accepted: bool | None
    executed: bool = False
    tests: int = 0
    passed: int = 0
    agreed: int = 0
    solutions: int = 0
    answers: list[str] = dataclasses.field(default_factory=list)
    reason: str = ""


async def together(*waiting: Awaitable[T]) -> list[T]:
    """Return all results; wait for all even if one fails, so that no answer is lost."""
    found = await asyncio.gather(*waiting, return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return [result for result in found if not isinstance(result, BaseException)]


def source_of(solution: str) -> str:
    """Return a program without Markdown around it."""
    found = _FENCE.findall(solution)
    return "\n\n".join(found).strip("\n") if found else solution.strip("\n")


def function_of(source: str, named: str) -> str | None:
    """Return the name of the function that a program defines: the named one, or its only one."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    named = named.strip("`() \n").partition("(")[0]
    if named in names:
        return named
    return names[-1] if names else None


def usable_tests(tests: Sequence[str], function: str) -> list[str]:
    """Return the tests that are one `assert` about the function; others could pass emptily."""
    usable = []
    for test in tests:
        source = source_of(test)
        try:
            body = ast.parse(source).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        names = {node.id for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.Name)}
        if len(body) == 1 and isinstance(body[0], ast.Assert) and function in names:
            usable.append(source)
    return list(dict.fromkeys(usable))


async def verify(
    item: Item, calls: Calls, checks: ChecksConfig, execution: Execution | None
) -> Verification:
    """Check the solution of a problem in the way of its domain.

    Raises:
        Unanswered: the calls for it failed.
    """
    if item["kind"] == "coding":
        return await _run(item, calls, checks, execution)
    if item["kind"] == "numeric" and item["answer"]:
        return await _solve_again(item, calls, checks)
    return await _judge(item, calls, checks)


async def _run(
    item: Item, calls: Calls, checks: ChecksConfig, execution: Execution | None
) -> Verification:
    source = source_of(item["solution"])
    function = function_of(source, item["answer"])
    if function is None:
        return Verification(method="executed", accepted=False, reason="no function in it")
    if execution is None:
        return Verification(method="none", accepted=None, reason="execution is off")
    more = {"count": str(checks.tests), "function": function}
    (written, *others) = await together(
        calls.ask_about(STAGE, "tests", WrittenTests, item, "problem", **more),
        *(
            _other(calls, item, "solve-coding", attempt, function=function)
            for attempt in range(1, checks.solutions + 1)
        ),
    )
    assert isinstance(written, WrittenTests)
    tests = usable_tests(written.tests, function)
    if not tests:
        return Verification(method="none", accepted=None, reason="no usable test")
    programs = [source_of(o.solution) if isinstance(o, SecondSolution) else "" for o in others]
    first, *outcomes = await together(
        *(execution.passed(item["id"], program, tests) for program in (source, *programs))
    )
    agreed = sum(outcome is not None and all(outcome) for outcome in outcomes)
    passes = first is not None and all(first)
    return Verification(
        method="executed",
        executed=True,
        accepted=passes and _is_majority(agreed, len(others)),
        tests=len(tests),
        passed=sum(first or ()),
        agreed=agreed if passes else 0,
        solutions=len(others),
        reason="" if first is not None else "it does not run to its end",
    )


async def _other(
    calls: Calls, item: Item, prompt: str, attempt: int, **more: str
) -> SecondSolution | None:
    """Return another solution; one that failed to come does not agree."""
    try:
        return await calls.ask_about(
            STAGE, prompt, SecondSolution, item, "problem", attempt=str(attempt), **more
        )
    except Unanswered:
        return None


async def _solve_again(item: Item, calls: Calls, checks: ChecksConfig) -> Verification:
    attempts = range(1, checks.solutions + 1)
    others = await together(*(_other(calls, item, "solve-numeric", n) for n in attempts))
    answers = [other.answer if other else "" for other in others]
    agreed = sum(same_result(item["answer"], a, tolerance=checks.tolerance) for a in answers)
    return Verification(
        method="solved",
        accepted=_is_majority(agreed, len(answers)) if any(answers) else None,
        agreed=agreed,
        solutions=len(answers),
        answers=answers,
    )


async def _judge(item: Item, calls: Calls, checks: ChecksConfig) -> Verification:
    attempts = range(1, checks.solutions + 1)
    fields = ("problem", "solution")
    verdicts = await together(
        *(calls.ask_about(STAGE, "judge", Verdict, item, *fields, attempt=str(n)) for n in attempts)
    )
    agreed = sum(found.verdict for found in verdicts)
    return Verification(
        method="judged",
        accepted=_is_majority(agreed, len(verdicts)),
        agreed=agreed,
        solutions=len(verdicts),
        reason=next((found.reason for found in verdicts if not found.verdict), ""),
    )


def _is_majority(agreed: int, total: int) -> bool:
    return 2 * agreed > total


_HARNESS = """\
import contextlib, io, json, sys
SOURCE = {source!r}
TESTS = {tests!r}
passed = []
with contextlib.redirect_stdout(io.StringIO()):
    try:
        scope = {{"__name__": "solution"}}
        exec(compile(SOURCE, "solution.py", "exec"), scope)
        for number, test in enumerate(TESTS):
            try:
                exec(compile(test, "test.py", "exec"), dict(scope))
                passed.append(True)
            except (KeyboardInterrupt, MemoryError):
                raise
            except BaseException:
                passed.append(False)
    except BaseException as error:
        print(type(error).__name__, file=sys.stderr)
        passed = [False] * len(TESTS)
print()
print({mark!r} + json.dumps(passed))
"""


def harness(source: str, tests: Sequence[str]) -> tuple[str, str]:
    """Return a program that runs tests and prints which passed, and the mark before its outcome."""
    digest = hashlib.sha256(json.dumps([source, *tests]).encode()).hexdigest()
    mark = f"outcome {digest}: "
    return _HARNESS.format(source=source, tests=list(tests), mark=mark), mark


def read_outcome(stdout: str, mark: str, count: int) -> list[bool] | None:
    """Return what a harness has said about each test; None if it did not end."""
    for line in reversed(stdout.split("\n")):
        if line.startswith(mark):
            try:
                found = json.loads(line[len(mark) :])
            except ValueError:
                return None
            return [bool(value) for value in found] if len(found) == count else None
    return None


def outcome_record(item: str, key: str, outcome: list[bool] | None, seconds: float) -> Record:
    """Return the ledger's record of a program's outcome."""
    return Record(
        key=key,
        item=item,
        status="ok",
        model=SANDBOX,
        prompt=f"{PROGRAM}@1",
        parameters={},
        answer=json.dumps(outcome),
        seconds=round(seconds, 3),
    )
