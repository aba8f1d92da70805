"""Check this machine, its packages and a config before a run; one line each: ok, warn or fail.

    machine      packages, memory, disks, compilers, mpirun, Slurm
    ranks        in separate processes: torch and GPU, attention kernels, all-reduce
    readiness    model, tokenizer, data, tasks and outputs of a config

A check yields findings. Each is guarded: an error inside it is its own `fail` line, and the others
still run. The command chooses the checks (`commands/checks.py`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from pipeline.errors import DiffembedError, UserError, explain_os_error

# `warn`: works, but slower or not everywhere.
Level = Literal["ok", "warn", "fail"]
_STYLES: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "red"}


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
        # Most errors begin with the key; some of a library's have several lines.
        found = " ".join(error.found.removeprefix(f"{name}: ").split())
        yield fail(name, found, error.fix or (error.allowed and f"allowed: {error.allowed}"))
    except Exception as error:
        # A MachineError has no fields: its text is what was found and the fix.
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


def run_checks(checks: dict[str, Check]) -> Iterator[Finding]:
    """Yield the findings of all checks as they are made."""
    for name, check in checks.items():
        yield from guarded(name, check)


def report(findings: Iterable[Finding], *, as_json: bool) -> int:
    """Print findings as they are made, and return the exit code: 1 if any check has failed."""
    kept = []
    for finding in findings:
        kept.append(finding)
        # At once: ranks that hang take minutes, and the lines before them may name the cause.
        if not as_json:
            _print(finding)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in kept], indent=1))
    else:
        counts = {level: sum(each.level == level for each in kept) for level in _STYLES}
        print(", ".join(f"{number} {level}" for level, number in counts.items()))
    return int(any(finding.level == "fail" for finding in kept))


def _print(finding: Finding) -> None:
    from rich.console import Console
    from rich.text import Text

    # Not wrapped: a line of a job's log is searched as a whole.
    console = Console(highlight=False, soft_wrap=True)
    fix = f" | fix: {finding.fix}" if finding.fix else ""
    level = (f"{finding.level:4}", _STYLES[finding.level])
    console.print(Text.assemble(level, f"  {finding.check}: {finding.found}{fix}"))
