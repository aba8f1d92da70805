"""Read `slurm/cluster.env` with bash, the language it is written in."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import UserError
from pipeline.submission.flags import Flag, parse_flags

FLAG_ARRAYS = ("SITE_FLAGS", "PREPARE_FLAGS", "TRAIN_FLAGS", "EVALUATE_FLAGS", "CPU_FLAGS")
_SECONDS = 60
# Each value ends with a zero byte, each array with an empty value.
_SCRIPT = """\
set -eu
source "$1" >/dev/null
printf '%s\\0' "${ARRAY_LIMIT:-}"
shift
for name; do
  declare -p "$name" >/dev/null
  declare -n flags=$name
  for flag in "${flags[@]}"; do printf '%s\\0' "$flag"; done
  printf '\\0'
done
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A cluster's flags of `sbatch`.

    Args:
        path: the file they were read from.
        flags: by the name of their array.
        array_limit: how many elements of an array may run at a time; None: as Slurm decides.
    """

    path: Path
    flags: Mapping[str, tuple[Flag, ...]]
    array_limit: int | None

    def flags_of(self, array: str) -> tuple[Flag, ...]:
        """Flags of one kind of job; they follow, and win over, the flags of every job."""
        return self.flags["SITE_FLAGS"] + self.flags[array]


def read_site() -> Site:
    """The site of this checkout: `DIFFEMBED_CLUSTER_ENV`, or `slurm/cluster.env`.

    Raises:
        UserError: no such file, or bash does not accept it or misses one of its arrays.
    """
    path = Path(os.environ.get("DIFFEMBED_CLUSTER_ENV", "slurm/cluster.env"))
    if not path.is_file():
        raise UserError(
            f"{path}: no such file",
            fix="go to the folder that holds slurm/, or let DIFFEMBED_CLUSTER_ENV name the file",
        )
    limit, *values = _run_site_file(path).split("\0")[:-1]
    if limit and not limit.isdecimal():
        raise UserError(f"{path}: ARRAY_LIMIT={limit}", allowed="a number, or nothing")
    flags = {name: parse_flags(words, f"{path}: {name}") for name, words in _group(values).items()}
    return Site(path=path, flags=flags, array_limit=int(limit) if limit else None)


def _run_site_file(path: Path) -> str:
    """What `_SCRIPT` prints for a site file; batch scripts read it under `set -eu` too."""
    allowed = f"bash with the arrays {', '.join(FLAG_ARRAYS)}"
    try:
        if b"\r\n" in path.read_bytes():
            raise UserError(
                f"{path}: lines end as on Windows (CR LF)",
                allowed=allowed,
                fix=f"run `sed -i 's/\\r$//' {path}`",
            )
        done = subprocess.run(
            ["bash", "-c", _SCRIPT, "bash", path.absolute(), *FLAG_ARRAYS],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{path}: bash has not read it after {_SECONDS} s",
            allowed=allowed,
            fix="take out what waits or asks",
        ) from error
    if done.returncode:
        silent = f"a command in it ends with exit code {done.returncode} and says nothing"
        raise UserError(
            f"{path}: {done.stderr.strip() or silent}",
            allowed=allowed,
            fix="let every command in it succeed under `set -eu`, as batch scripts read it; "
            f"`bash -eux {path}` shows where it ends",
        )
    return done.stdout


def _group(values: list[str]) -> dict[str, tuple[str, ...]]:
    """The arrays by name; an empty value ends each."""
    found: list[list[str]] = [[]]
    for value in values:
        if value:
            found[-1].append(value)
        else:
            found.append([])
    return {name: tuple(flags) for name, flags in zip(FLAG_ARRAYS, found, strict=False)}
