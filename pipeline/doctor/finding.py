"""One line of `doctor`: what was checked, what was found, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from pipeline.errors import DiffembedError, UserError, explain_os_error

# `warn`: works, but slower or not everywhere.
Level = Literal["ok", "warn", "fail"]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One result of one check.

    Args:
        check: its name.
        found: what is there.
        fix: what to change; empty for `ok`.
    """

    check: str
    level: Level
    found: str
    fix: str = ""


Check = Callable[[], Iterable[Finding]]


def ok(check: str, found: str) -> Finding:
    """Return the finding of a check that has nothing against this machine."""
    return Finding(check, "ok", found)


def warn(check: str, found: str, fix: str) -> Finding:
    """Return the finding of something that works, but slower or not everywhere."""
    return Finding(check, "warn", found, fix)


def fail(check: str, found: str, fix: str = "") -> Finding:
    """Return the finding of something that does not work."""
    return Finding(check, "fail", found, fix)


def guarded(name: str, check: Check) -> Iterator[Finding]:
    """Yield a check's findings; an error inside it becomes a finding, whatever its type."""
    try:
        yield from check()
    except UserError as error:
        found = error.found.removeprefix(f"{name}: ")  # most errors begin with the key
        yield fail(name, found, fix_of(error))
    except Exception as error:
        explained = error if isinstance(error, DiffembedError) else explain_os_error(error)
        if explained is not None:
            found, _, fix = str(explained).partition(" | fix: ")
            yield fail(name, found, fix)
            return
        text = " ".join(str(error).split()) or "no message"
        yield fail(
            name,
            f"the check itself failed: {type(error).__name__}: {text}",
            "report this line; the other checks are not affected",
        )


def fix_of(error: UserError) -> str:
    """Return the advice of an error of a config or a file."""
    return error.fix or (f"allowed: {error.allowed}" if error.allowed else "")
