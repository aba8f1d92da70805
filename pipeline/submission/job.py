"""One Slurm job as values, and its batch script as one string; nothing is asked or written here."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.submission.flags import Flag, last_value

_DIRECTIVE = "#SBATCH "
_DEPENDENCY = "--dependency"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A request to Slurm, before its flags and the ids of other jobs are known.

    Args:
        name: what it does, such as `train`; also the job's name in Slurm, after `diffembed-`.
        script: the file in `slurm/` that it runs.
        flags: the array in `slurm/cluster.env` with this kind of job's flags.
        folder: where its batch script, its configs and its log are kept.
        arguments: of the script.
        files: what the arguments name below `folder`, as they are now: a job that waits in the
            queue for days must not see later edits.
        array: numbers of the array's elements; empty for a job that is no array.
        after: names of the jobs of the same chain that must have succeeded.
        tells_of_failure: whether it runs also when they have not, to say what is missing.
        exclusive: whether `folder` may have one job of this name at a time.
    """

    name: str
    script: str
    flags: str
    folder: Path
    arguments: tuple[str, ...]
    files: Mapping[Path, str] = dataclasses.field(default_factory=dict)
    array: tuple[int, ...] = ()
    after: tuple[str, ...] = ()
    tells_of_failure: bool = False
    exclusive: bool = False

    @property
    def key(self) -> str:
        """Equal for jobs that do the same: name and arguments, whose file names hold hashes."""
        return f"{self.name}-{digest(self.name, *self.arguments)}"

    @property
    def text_path(self) -> Path:
        """Where the batch script is kept."""
        return self.folder / f"{self.key}.sbatch"

    @property
    def log(self) -> Path:
        """Where the job writes, in Slurm's notation."""
        # The folder's own name is not Slurm's to expand.
        folder = Path(str(self.folder).replace("%", "%%"))
        return folder / ("%x-%A_%a.out" if self.array else "%x-%j.out")

    @property
    def slurm_name(self) -> str:
        """Its name in Slurm, unless a flag changes it."""
        return f"diffembed-{self.name}"


def digest(*parts: str) -> str:
    """A short hash of some strings."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


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
    """The whole batch script of a job, for `sbatch FILE` without a flag.

    Args:
        job: what is submitted.
        body: text of its file in `slurm/`; its own `#SBATCH` lines come first, so that all others
            win over them.
        site_flags: flags from `slurm/cluster.env`.
        own_flags: flags of this submission; they win over the site's.
        after: ids of jobs that must have succeeded, unless this one tells of their failure; when
            one no longer can, Slurm cancels this job instead of keeping it forever.
        array_limit: how many elements of an array may run at a time.
        environment: variables for the job, in addition to those that Slurm passes on.
    """
    header, commands = _split(body)
    submission = [f"--job-name={job.slurm_name}", f"--output={job.log}"]
    if job.array:
        limit = f"%{array_limit}" if array_limit else ""
        submission.append(f"--array={array_ranges(job.array)}{limit}")
    if after:
        end = "afterany" if job.tells_of_failure else "afterok"
        # Slurm takes the last of several equal flags: the site's or the user's would replace ours.
        wanted = last_value((*site_flags, *own_flags), _DEPENDENCY, "")
        all_of = [f"{end}:{':'.join(after)}", *([wanted] if wanted else [])]
        submission += [f"{_DEPENDENCY}={','.join(all_of)}", "--kill-on-invalid-dep=yes"]
        own_flags = [flag for flag in own_flags if flag.name != _DEPENDENCY]
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
    """Ascending numbers in Slurm's notation: `0-2,5`."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][-1] == index - 1:
            ranges[-1][1:] = [index]
        else:
            ranges.append([index])
    return ",".join("-".join(map(str, ends)) for ends in ranges)


def _directive(*words: str) -> str:
    # Slurm reads quotes in these lines as a shell does.
    return _DIRECTIVE + shlex.join(words)


def _split(body: str) -> tuple[list[str], str]:
    """The `#SBATCH` lines of a script, and its text without them and without `#!`."""
    lines = body.splitlines()
    if lines and lines[0].startswith("#!"):
        del lines[0]
    header = [line for line in lines if line.startswith(_DIRECTIVE)]
    return header, "\n".join(line for line in lines if not line.startswith(_DIRECTIVE)) + "\n"
