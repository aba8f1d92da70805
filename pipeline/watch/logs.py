"""Read what Slurm jobs left in a folder: their ids, their starts, and the last error of each log.

    FOLDER/jobs.json                   ids by job                    submission/slurm.py
           starts-JOB.json             every start of a training     submission/restart.py
           diffembed-NAME-JOB.out      log of a job
           diffembed-NAME-JOB_I.out    log of element I of an array

Files only: Slurm is not asked, so that a folder can be read anywhere it is mounted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from pipeline.watch.view import Grid, Tone, age, duration, oldest_first

# A log without a new line for this long is called silent.
_SILENT_SECONDS = 900.0
# Enough for a traceback of every rank; logs of long runs are too large to be read at each look.
_TAIL_BYTES = 2**16
# `3: ` is put before a rank's lines by `srun --label`, `[node1]` by others.
_LABEL = re.compile(r"^(\d+: |\[[\w.,:/ -]+\]:? ?)")
# Lines that begin like an error; the word inside of a sentence is none.
_ERROR = re.compile(
    # The last line of a traceback.
    r"^([\w.]*(Error|Exception|Interrupt)\b|SystemExit"
    # Launchers, and the shell about a process that a signal ended.
    r"|(slurmstepd|srun|sbatch|mpirun|bash): (error|fatal)|Segmentation fault|Killed\b|Fatal |FATAL"
    # bash about a line of a batch script.
    r"|[\w./-]+: line \d+: .*(not found|No such file|Permission denied|unbound variable)"
    # This package's own batch scripts.
    r"|[\w-]+\.sbatch: .*\| fix: )"
)
# Printed after an error, and about it: by launchers, and by `submission/restart.py` unless it
# requeues the job.
_ECHO = re.compile(r"^(slurmstepd|srun|mpirun|prterun)\b|^-+$|\d\d end: exit code|^not requeued")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LogEnd:
    """The end of a log.

    Attributes:
        path: the log.
        line: its last line.
        error: the last line that is an error; empty without one.
        failed: nothing but echoes of the error follows it.
        seconds: since the log was last written.
    """

    path: Path
    line: str
    error: str
    failed: bool
    seconds: float

    @property
    def is_silent(self) -> bool:
        """True for a log that has said nothing for a quarter of an hour."""
        return self.seconds > _SILENT_SECONDS

    @property
    def cited_error(self) -> str:
        """The error, and the name of the log that has it."""
        return f"{self.error} ({self.path.name})"


def read_log(path: Path) -> LogEnd | None:
    """Read the end of a log; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            # May cut a line, and a character of it.
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    # A progress bar overwrites its line.
    lines = [_LABEL.sub("", line.rpartition("\r")[2].rstrip()) for line in text.split("\n")]
    lines = [line for line in lines if line.strip()]
    error, failed = "", False
    for line in lines:
        echoes = _ECHO.search(line)
        # "srun: error: task 3: Exited" is both: after an error of a rank it must not replace it.
        if _ERROR.match(line) and not (failed and echoes):
            error, failed = line, True
        elif not echoes:
            failed = False  # the job has recovered, or was started again
    return LogEnd(
        path=path,
        line=lines[-1] if lines else "",
        error=error,
        failed=failed,
        seconds=age(path) or 0.0,
    )


def newest_log(folder: Path, name: str) -> LogEnd | None:
    """Return the end of the newest log of jobs with a name; elements of arrays do not count."""
    pattern = re.compile(rf"diffembed-{re.escape(name)}-\d+\.out")
    logs = oldest_first(path for path in folder.glob("*.out") if pattern.fullmatch(path.name))
    return read_log(logs[-1]) if logs else None


def element_logs(folder: Path, name: str) -> dict[int, Path]:
    """Return the newest log of each element of the arrays with a name."""
    pattern = re.compile(rf"diffembed-{re.escape(name)}-\d+_(\d+)\.out")
    matches = (pattern.fullmatch(path.name) for path in oldest_first(folder.glob("*.out")))
    # Of several jobs, a later log takes the place of an earlier one.
    return {int(match[1]): folder / match[0] for match in matches if match}


def read_json_or_none(path: Path) -> Any:
    """Return the content of a JSON file; None if it is missing, damaged or being replaced."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    return None


def starts_grid(folder: Path) -> Grid:
    """Return a table of all starts of training jobs, with the reason for which each ended."""
    rows = []
    for path in folder.glob("starts-*.json"):
        starts = read_json_or_none(path)
        job = path.stem.removeprefix("starts-")
        for start in starts if isinstance(starts, list) else ():
            if isinstance(start, dict):
                keys = ("time", "step", "nodes", "end")
                rows.append((job, *(str(start.get(key, "")) for key in keys)))
    # A successor has its own file, with a copy of the earlier starts.
    distinct = {row[1:]: row for row in rows}
    shown = sorted(distinct.values(), key=lambda row: row[1])
    # What `submission/restart.py` writes at a start, until it records its end.
    if shown and shown[-1][4].startswith("unknown"):
        shown[-1] = (*shown[-1][:4], "running, or ended without a record")
    # All but the last were interrupted, whatever their ends say.
    tones: list[Tone] = ["warn"] * (len(shown) - 1)
    header = ("job", "time", "from step", "nodes", "end")
    return Grid(f"{len(shown)} starts", header, tuple(shown), tuple(tones))


def jobs_grid(folder: Path) -> Grid:
    """Return a table of the jobs that were submitted from a folder, with the end of each log."""
    records = read_json_or_none(folder / "jobs.json")
    rows: list[tuple[str, ...]] = []
    tones: list[Tone] = []
    for entry in records.values() if isinstance(records, dict) else ():
        if not isinstance(entry, dict):
            continue
        name, job = str(entry.get("name", "")), str(entry.get("id", ""))
        # A job has one log, or one per element of its array.
        logs = [folder / f"diffembed-{name}-{job}.out"]
        logs += oldest_first(folder.glob(f"diffembed-{name}-{job}_*.out"))
        ends = [end for end in map(read_log, logs) if end is not None]
        failed = [end for end in ends if end.failed]
        if failed:
            count = f"{len(failed)} failed: " if len(ends) > 1 else ""
            line = count + failed[-1].error
        elif ends:
            line = f"{ends[-1].line} ({duration(ends[-1].seconds)} ago)"
        else:
            line = "no log yet"
        rows.append((name, job, str(entry.get("submitted", "")), line))
        tones.append("fail" if failed else "")
    header = ("job", "id", "submitted", "last line of its log")
    return Grid("Slurm jobs", header, tuple(rows), tuple(tones))
