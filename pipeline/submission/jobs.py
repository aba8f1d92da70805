"""Describe jobs, and write their batch scripts; pure text, without Slurm.

A batch script is assembled from four parts. Slurm takes the last of several equal flags, so each
part overrides the parts above it:

    #SBATCH lines of slurm/NAME.sbatch       defaults
    SITE_FLAGS and KIND_FLAGS                slurm/cluster.env
    name, log, array, dependency             of this submission
    --sbatch "..."                           of the user
    set -- ARGUMENTS; body of NAME.sbatch
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import short_hash

# The file that a site edits, if it is not slurm/cluster.env.
SITE_VARIABLE = "DIFFEMBED_CLUSTER_ENV"
# Flags that are read here, by their short names.
_SHORT = {
    **{"-J": "--job-name", "-o": "--output", "-e": "--error", "-d": "--dependency"},
    **{"-a": "--array", "-D": "--chdir", "-W": "--wait", "-M": "--clusters"},
    **{"-N": "--nodes", "-G": "--gpus"},
}
_LONG = (*_SHORT.values(), "--signal", "--wrap", "--test-only")
# The signal before the time limit, to the batch script; others end a training for good.
_SIGNAL = re.compile(r"B:(SIG)?USR1(@\d+)?")
# sbatch accepts unique prefixes of long names.
_SHORTEST = len("--job")
_REFUSED = {
    "--array": "leave it out: the array holds all elements left to score; ARRAY_LIMIT in "
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
        name: its long form if known here, otherwise as written.
        value: empty for a flag without one.
        words: the flag as written.
    """

    name: str
    value: str
    words: tuple[str, ...]


def split_flags(text: str) -> tuple[str, ...]:
    """Split the value of `--sbatch` as a shell does.

    Raises:
        UserError: it cannot be split.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(
            f"--sbatch {text!r}: {error}", fix="close the quotes: --sbatch \"--comment='a b'\""
        ) from error


def parse_flags(words: Sequence[str], origin: str) -> tuple[Flag, ...]:
    """Group words into flags with their values.

    Raises:
        UserError: a word is not a flag, or a flag would break the submission; `origin` names the
            place of the flags.
    """
    flags: list[Flag] = []
    for word in words:
        # It would end the #SBATCH line.
        if "\n" in word:
            raise UserError(f"{origin}: {word!r}", allowed="flags without line breaks")
        if word.startswith("-") and len(word) > 1:
            flags.append(_parse_word(word))
        # The value of a flag may be a separate word: `--nodes 4`.
        elif flags and not flags[-1].value:
            flags[-1] = dataclasses.replace(flags[-1], value=word, words=(*flags[-1].words, word))
        else:
            raise UserError(f"{origin}: {word!r}", allowed="flags of sbatch, such as --nodes=4")
    for flag in flags:
        if flag.name in _REFUSED:
            raise UserError(f"{origin}: {shlex.join(flag.words)}", fix=_REFUSED[flag.name])
        if flag.name == "--signal" and not _SIGNAL.fullmatch(flag.value):
            raise UserError(
                f"{origin}: {shlex.join(flag.words)}",
                allowed="--signal=B:USR1@SECONDS, after which a training saves and is requeued",
            )
    return tuple(flags)


def last_value(flags: Sequence[Flag], name: str, default: str) -> str:
    """Return the value that Slurm uses of several equal flags: the last."""
    return next((flag.value for flag in reversed(flags) if flag.name == name), default)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestedGpus:
    """The GPUs that flags ask for.

    Attributes:
        nodes: the fewest that Slurm may give.
        per_node: GPUs of a node; 0 where no flag asks for any.
        kind: Slurm's name of the GPU; empty where the flags name none.
    """

    nodes: int
    per_node: int
    kind: str


def requested_gpus(flags: Sequence[Flag]) -> RequestedGpus:
    """Read `--nodes` and the flags for GPUs: `--gpus-per-node`, `--gres`, `--gpus`."""
    nodes = _first_number(last_value(flags, "--nodes", "")) or 1
    per_node = last_value(flags, "--gpus-per-node", "")
    # Without the sockets that Slurm may add: gpu:8(S:0-1)
    for resource in re.sub(r"\(.*?\)", "", last_value(flags, "--gres", "")).split(","):
        if not per_node and re.match(r"gpu(:|$)", resource):
            per_node = resource.removeprefix("gpu").removeprefix(":") or "1"
    # `--gpus` counts GPUs of the whole job, the other flags GPUs of a node.
    total = last_value(flags, "--gpus", "")
    # [KIND:]NUMBER, and for --gres also KIND alone
    kind, _, number = (per_node or total).rpartition(":")
    if number and not number[0].isdigit():
        kind, number = number, "1"
    count = _first_number(number)
    if not per_node and total:
        count = -(-count // nodes)  # rounded up: Slurm may give some nodes fewer
    return RequestedGpus(nodes=nodes, per_node=count, kind=kind)


def _first_number(text: str) -> int:
    """Return the number at the start of a text such as `2-4`; 0 without one."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0


def expand_log(pattern: str, *, job: str, name: str) -> str:
    """Expand the path of a log in Slurm's notation to a word for a shell, with * where unknown."""
    values = {"%": "%", "x": name, "j": job, "J": job, "A": job}
    # Digits are a width, as in %4a. Other letters, such as the element's or the node's, are not
    # known yet. Paths hold no zero byte.
    expanded = re.sub(r"%\d*([a-zA-Z%])", lambda found: values.get(found[1], "\0"), pattern)
    return "*".join(shlex.quote(part) if part else "" for part in expanded.split("\0"))


def _parse_word(word: str) -> Flag:
    if not word.startswith("--"):
        return Flag(name=_SHORT.get(word[:2], word[:2]), value=word[2:], words=(word,))
    name, _, value = word.partition("=")
    if len(name) >= _SHORTEST:
        name = next((long for long in _LONG if long.startswith(name)), name)
    return Flag(name=name, value=value, words=(word,))


_DIRECTIVE = "#SBATCH "
_DEPENDENCY = "--dependency"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A request to Slurm, before its flags and the ids of other jobs are known.

    Args:
        name: its task, such as `train`; also the job's name in Slurm, after `diffembed-`.
        script: the file in `slurm/` that it runs.
        flags: the array in `slurm/cluster.env` with the flags of this kind of job.
        folder: holds its batch script, its configs and its log.
        arguments: of the script.
        files: contents of the files in `folder` that the arguments name, as they are now: a job
            that waits in the queue for days must not see later edits.
        array: numbers of the array's elements; empty for a job without an array.
        after: names of the jobs of the same chain that must succeed first.
        reports_failure: run it even if they failed, to report what is missing.
        exclusive: `folder` may have only one job of this name at a time.
    """

    name: str
    script: str
    flags: str
    folder: Path
    arguments: tuple[str, ...]
    files: Mapping[Path, str] = dataclasses.field(default_factory=dict)
    array: tuple[int, ...] = ()
    after: tuple[str, ...] = ()
    reports_failure: bool = False
    exclusive: bool = False

    @property
    def key(self) -> str:
        """Equal for jobs with equal effects: name and arguments, whose file names hold hashes."""
        return f"{self.name}-{short_hash(self.name, *self.arguments)}"

    @property
    def text_path(self) -> Path:
        """The path of the batch script."""
        return self.folder / f"{self.key}.sbatch"

    @property
    def log(self) -> Path:
        """The path of the job's output, in Slurm's notation."""
        # A % in the folder's name must not be expanded by Slurm.
        folder = Path(str(self.folder).replace("%", "%%"))
        # Not %x: `watch` must find the log whatever a flag calls the job.
        return folder / f"{self.slurm_name}-{'%A_%a' if self.array else '%j'}.out"

    @property
    def slurm_name(self) -> str:
        """The job's name in Slurm, unless a flag changes it."""
        return f"diffembed-{self.name}"


def batch_text(
    job: Job,
    body: str,
    *,
    site_flags: Sequence[Flag],
    own_flags: Sequence[Flag] = (),
    after: Sequence[str] = (),
    array_limit: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Return the whole batch script of a job, for `sbatch FILE` without any flag.

    Args:
        job: the job to submit.
        body: text of its file in `slurm/`.
        site_flags: flags from `slurm/cluster.env`.
        own_flags: flags of this submission.
        after: ids of jobs that must succeed first, or only end first for a job that reports their
            failure; if one cannot succeed any more, Slurm cancels this job instead of keeping it
            forever.
        array_limit: the number of elements of an array that may run at a time.
        environment: variables for the job, in addition to the ones that Slurm exports.
    """
    header, commands = _split(body)
    submission = [f"--job-name={job.slurm_name}", f"--output={job.log}"]
    if job.array:
        limit = f"%{array_limit}" if array_limit else ""
        submission.append(f"--array={array_ranges(job.array)}{limit}")
    if after:
        end = "afterany" if job.reports_failure else "afterok"
        # The site's or the user's dependency would replace ours: join them.
        wanted = last_value((*site_flags, *own_flags), _DEPENDENCY, "")
        all_of = [f"{end}:{':'.join(after)}", *([wanted] if wanted else [])]
        submission += [f"{_DEPENDENCY}={','.join(all_of)}", "--kill-on-invalid-dep=yes"]
        # It stands below, and would replace the joined one.
        own_flags = [flag for flag in own_flags if flag.name != _DEPENDENCY]
    # Below all directives: Slurm stops reading them at the first command.
    exports = [f"export {key}={shlex.quote(value)}" for key, value in (environment or {}).items()]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# slurm/{job.script}, as `diffembed submit` asks for it",
            *header,
            f"# slurm/cluster.env: SITE_FLAGS and {job.flags}",
            *(_directive(*flag.words) for flag in site_flags),
            "# this submission",
            *map(_directive, submission),
            *(_directive(*flag.words) for flag in own_flags),
            *exports,
            f"set -- {shlex.join(job.arguments)}",
            commands,
        ]
    )


def array_ranges(indices: Sequence[int]) -> str:
    """Return ascending numbers in Slurm's notation: `0-2,5`."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][-1] == index - 1:
            ranges[-1][1:] = [index]
        else:
            ranges.append([index])
    return ",".join("-".join(map(str, ends)) for ends in ranges)


def _directive(*words: str) -> str:
    # Slurm parses quotes in these lines as a shell does.
    return _DIRECTIVE + shlex.join(words)


def _split(body: str) -> tuple[list[str], str]:
    """Split a script into its `#SBATCH` lines and its text without them and without `#!`."""
    lines = body.splitlines()
    if lines and lines[0].startswith("#!"):
        del lines[0]
    header = [line for line in lines if line.startswith(_DIRECTIVE)]
    return header, "\n".join(line for line in lines if not line.startswith(_DIRECTIVE)) + "\n"


FLAG_ARRAYS = (
    *("SITE_FLAGS", "SYNTHESIZE_FLAGS", "PREPARE_FLAGS", "MINE_FLAGS", "TRAIN_FLAGS"),
    *("EVALUATE_FLAGS", "CPU_FLAGS"),
)
_SITE_SECONDS = 60
# Each value ends with a zero byte; before the values of an array stands their number.
_SCRIPT = """\
set -eu
source "$1" >/dev/null
printf '%s\\0' "${ARRAY_LIMIT:-}"
shift
for name; do
  declare -p "$name" >/dev/null
  declare -n flags=$name
  printf '%s\\0' "${#flags[@]}" "${flags[@]}"
done
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A cluster's flags of `sbatch`.

    Args:
        path: the file with the flags.
        flags: by the name of their array.
        array_limit: the number of elements of an array that may run at a time; None: Slurm's limit.
    """

    path: Path
    flags: Mapping[str, tuple[Flag, ...]]
    array_limit: int | None

    def flags_of(self, array: str) -> tuple[Flag, ...]:
        """Return the flags of one kind of job, after the flags of all jobs, which they override."""
        return self.flags["SITE_FLAGS"] + self.flags[array]


def read_site() -> Site:
    """Read the site's file: `DIFFEMBED_CLUSTER_ENV`, or `slurm/cluster.env`.

    Raises:
        UserError: there is no such file, bash rejects it, or an array is missing.
    """
    path = Path(os.environ.get(SITE_VARIABLE, "slurm/cluster.env"))
    if not path.is_file():
        raise UserError(
            f"{path}: no such file",
            fix="go to the folder that holds slurm/, let `diffembed files` copy it here, or set "
            "DIFFEMBED_CLUSTER_ENV to the file",
        )
    # Zero bytes end the values, because flags may contain any other character; the last ends none.
    limit, *values = _run_site_file(path).split("\0")[:-1] or [""]
    if limit and not limit.isdecimal():
        raise UserError(f"{path}: ARRAY_LIMIT={limit}", allowed="a number, or empty")
    flags = {
        name: parse_flags(words, f"{path}: {name}") for name, words in _group(path, values).items()
    }
    return Site(path=path, flags=flags, array_limit=int(limit) if limit else None)


def _run_site_file(path: Path) -> str:
    """Return the output of `_SCRIPT` for a site file; batch scripts read it with `set -eu` too."""
    allowed = f"bash with the arrays {', '.join(FLAG_ARRAYS)}"
    try:
        if b"\r\n" in path.read_bytes():
            raise UserError(
                f"{path}: Windows line ends (CR LF)",
                allowed=allowed,
                fix=f"run `sed -i 's/\\r$//' {path}`",
            )
        done = subprocess.run(
            # Absolute: bash looks for a sourced name without a slash on PATH.
            ["bash", "-c", _SCRIPT, "bash", path.absolute(), *FLAG_ARRAYS],
            # A file that asks a question fails at once, instead of waiting for an answer.
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SITE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{path}: bash has not read it within {_SITE_SECONDS} s",
            allowed=allowed,
            fix="remove commands that wait or ask for input",
        ) from error
    if done.returncode:
        silent = f"a command in it ends with exit code {done.returncode} and no message"
        raise UserError(
            f"{path}: {done.stderr.strip() or silent}",
            allowed=allowed,
            fix="make every command in it succeed under `set -eu`, as in batch scripts; "
            f"`bash -eux {path}` shows the command",
        )
    return done.stdout


def _group(path: Path, values: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the arrays by name.

    Raises:
        UserError: an array is missing, or holds an empty text, which is not a flag.
    """
    found: dict[str, tuple[str, ...]] = {}
    left = iter(values)
    # Fewer than expected, without an error: the file itself has ended bash.
    for name, count in zip(FLAG_ARRAYS, left, strict=False):
        found[name] = tuple(itertools.islice(left, int(count)))
        if "" in found[name]:
            raise UserError(
                f"{path}: {name}: an empty text",
                allowed="flags of sbatch, such as (--nodes=4 --exclusive)",
                fix=f"write {name}=() for no flags; put no quotes around a variable that may be "
                f"empty",
            )
    if len(found) < len(FLAG_ARRAYS):
        raise UserError(
            f"{path}: bash ends before the end of the file",
            fix="remove `exit` from it; `return` leaves only the file",
        )
    return found
