"""Flags of `sbatch` as a user or a site writes them, and what they change about a job."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence

from pipeline.errors import UserError

# Flags that a submission itself depends on.
_SHORT = {
    **{"-J": "--job-name", "-o": "--output", "-e": "--error", "-d": "--dependency"},
    **{"-a": "--array", "-D": "--chdir", "-W": "--wait", "-M": "--clusters"},
}
_LONG = (*_SHORT.values(), "--wrap", "--test-only")
# sbatch takes a long name that is cut short as well.
_SHORTEST = len("--job")
_REFUSED = {
    "--array": "leave it out: the array is what is left to score; ARRAY_LIMIT in "
    "slurm/cluster.env limits how many run at a time",
    "--chdir": "go to that folder, which must hold slurm/, and submit there",
    "--wait": "leave it out, and wait for the job with `squeue` or --after",
    "--clusters": "export SLURM_CLUSTERS=NAME, which squeue and scontrol read as well",
    "--wrap": "leave it out: the command is the job's own",
    "--test-only": "use --dry-run",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One flag with its value.

    Args:
        name: long, where the code here knows it; else as it was written.
        value: empty for a flag without one.
        words: as they were written.
    """

    name: str
    value: str
    words: tuple[str, ...]


def split_flags(text: str, origin: str) -> tuple[str, ...]:
    """Split a string of flags as a shell does.

    Raises:
        UserError: it cannot be split; `origin` names it.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(
            f"{origin} {text!r}: {error}", fix="close the quotes: --sbatch \"--comment='a b'\""
        ) from error


def parse_flags(words: Sequence[str], origin: str) -> tuple[Flag, ...]:
    """Put each flag's words together.

    Raises:
        UserError: a word is no flag, or a flag would break what a submission depends on; `origin`
            names where it stands.
    """
    flags: list[Flag] = []
    for word in words:
        if "\n" in word:
            raise UserError(f"{origin}: {word!r}", allowed="flags without line breaks")
        if word.startswith("-") and len(word) > 1:
            flags.append(_read(word))
        elif flags and not flags[-1].value:
            flags[-1] = dataclasses.replace(flags[-1], value=word, words=(*flags[-1].words, word))
        else:
            raise UserError(f"{origin}: {word!r}", allowed="flags of sbatch, such as --nodes=4")
    for flag in flags:
        if flag.name in _REFUSED:
            raise UserError(f"{origin}: {shlex.join(flag.words)}", fix=_REFUSED[flag.name])
    return tuple(flags)


def last_value(flags: Sequence[Flag], name: str, default: str) -> str:
    """The value that Slurm takes of several equal flags."""
    return next((flag.value for flag in reversed(flags) if flag.name == name), default)


def expand_log(pattern: str, *, job: str, name: str) -> str:
    """The path of a log in Slurm's notation as one that a shell finds."""
    values = {"%": "%", "x": name, "j": job, "J": job, "A": job}
    # Of others, such as an element of an array or a node, the value comes later.
    return re.sub(r"%\d*([a-zA-Z%])", lambda found: values.get(found[1], "*"), pattern)


def _read(word: str) -> Flag:
    if not word.startswith("--"):
        return Flag(name=_SHORT.get(word[:2], word[:2]), value=word[2:], words=(word,))
    name, _, value = word.partition("=")
    if len(name) >= _SHORTEST:
        name = next((long for long in _LONG if long.startswith(name)), name)
    return Flag(name=name, value=value, words=(word,))
