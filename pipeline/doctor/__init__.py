"""Check this machine, its packages and a config before a run; one line each: ok, warn or fail.

    packages    versions against the declared ranges and known_bad.yaml
    ranks       in separate processes: torch and GPU, attention kernels, all-reduce
    machine     mpirun, compilers, locks of builds, shared memory, open files, caches
    cluster     Slurm's limits and its answer to slurm/cluster.env
    readiness   model, tokenizer, data, tasks and outputs of a config

Each check is guarded: an error inside it is its own `fail` line, and the others still run.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.doctor import cluster, machine, packages, ranks, readiness
from pipeline.doctor.finding import Check, Finding, Level, guarded
from pipeline.errors import UserError
from pipeline.launch import count_gpus, discover_world

_STYLES: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(config: Path | None, overrides: tuple[str, ...], *, launcher: str, as_json: bool) -> int:
    """Run all checks, print them, and return the exit code: 1 if any has failed.

    Under a launcher that started several ranks, all of them sum together and rank 0 does the rest.

    Args:
        config: a config of any kind, to check for what it names.
        overrides: changes to it.
        launcher: words that start ranks; by default they are started on this machine.
        as_json: print JSON instead of lines.
    """
    world = discover_world()
    if not world.launched:
        words = _words(launcher)
        checks = all_checks(config, overrides, lambda: ranks.check_ranks(words))
        return _report(run_checks(checks), as_json=as_json)
    # As one of them: no ranks are started by ranks.
    found = list(ranks.examine(world))
    from pipeline import comm

    code = int(any(finding.level == "fail" for finding in found))
    if world.is_main:
        checks = all_checks(config, overrides, lambda: found)
        del checks["mpirun"]  # starts none either
        code = _report(run_checks(checks), as_json=as_json)
    joined = not any(finding.check == "ranks" and finding.level == "fail" for finding in found)
    comm.leave(code, gracefully=joined)
    return code


def _words(launcher: str) -> list[str]:
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"--launcher {launcher!r}: {error}", fix="close the quotes") from error
    if not words:
        return []
    program = machine.find_program(words[0])
    if program is None:
        raise UserError(f"--launcher: {words[0]}: not found", fix="give a program on PATH")
    return [program, *words[1:]]


def all_checks(
    config: Path | None, overrides: tuple[str, ...], check_ranks: Check
) -> dict[str, Check]:
    """Return every check by its name, in the order of the report."""
    has_gpu = count_gpus() > 0
    checks: dict[str, Check] = {
        "versions": lambda: packages.check_packages(has_gpu=has_gpu),
        "ranks": check_ranks,
        "mpirun": machine.check_mpi,
        "compilers": lambda: machine.check_compilers(has_gpu=has_gpu),
        "extension locks": machine.check_build_locks,
        "shared memory": machine.check_shared_memory,
        "open files": machine.check_open_files,
        "caches": machine.check_caches,
        "slurm": lambda: cluster.check_slurm(config),
    }
    if config is not None:
        checks["config"] = lambda: readiness.check_config(config, overrides)
    return checks


def run_checks(checks: dict[str, Check]) -> Iterator[Finding]:
    """Yield the findings of all checks as they are made."""
    for name, check in checks.items():
        yield from guarded(name, check)


def _report(findings: Iterable[Finding], *, as_json: bool) -> int:
    """Print findings, and return the exit code."""
    kept = []
    if as_json:
        kept = list(findings)
        print(json.dumps([dataclasses.asdict(finding) for finding in kept], indent=1))
    else:
        for finding in findings:
            kept.append(finding)
            _print(finding)
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
