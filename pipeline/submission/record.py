"""`jobs.json`: which jobs were submitted for a folder; one writer at a time.

A number alone is not a job: another cluster, a Slurm that lost its state, and the copy of a folder
all have jobs of the same numbers. A job in the queue belongs to a folder when its batch script lies
there, or when it is still exactly what was noted there of a submission from this very folder.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run_dir import one_at_a_time, write_json
from pipeline.submission.job import Job
from pipeline.submission.scheduler import QueuedJob

_SUFFIX = ".sbatch"


class Record:
    """The jobs of one folder, by key; as many keys as configs were submitted.

    Args:
        folder: holds the batch scripts and `jobs.json`.
        cluster: name of the Slurm that is asked.
    """

    def __init__(self, folder: Path, cluster: str) -> None:
        self.path = folder / "jobs.json"
        self._folder, self._cluster = folder.resolve(), cluster
        self._jobs, self.is_damaged = _read(self.path)

    def ids(self) -> list[str]:
        """Ids that this cluster may know, ended jobs included."""
        return [entry["id"] for entry in self._jobs.values() if not self._is_elsewhere(entry)]

    def elsewhere(self, job: Job) -> str:
        """The other cluster that has got this job, and its id there; empty when none has."""
        entry = self._jobs.get(job.key, {})
        return f"{entry['cluster']} (job {entry['id']})" if self._is_elsewhere(entry) else ""

    def find(self, queue: Iterable[QueuedJob]) -> dict[str, QueuedJob]:
        """Those of some jobs that belong to this folder and wait or run, by key."""
        found: dict[str, QueuedJob] = {}
        # Of two with one script, the later one continues the earlier one.
        for job in sorted(queue, key=lambda job: int(job.id)):
            if job.is_active and (key := self._key_of(job)):
                found[key] = job
        return found

    def _key_of(self, job: QueuedJob) -> str:
        script = Path(job.command)
        if script.suffix == _SUFFIX and script.parent.resolve() == self._folder:
            return script.stem
        # A site's own sbatch may submit a copy of the script.
        for key, entry in self._jobs.items():
            if (
                entry["id"] == job.id
                and not self._is_elsewhere(entry)
                and entry.get("folder") == str(self._folder)
                and entry.get("seen") == [job.name, job.command]
                # A job that is queued again counts as submitted later.
                and entry["submitted"] <= job.submitted
            ):
                return key
        return ""

    def add(self, key: str, job_id: str) -> None:
        """Note a submitted job; it is on disk when this returns."""
        now = datetime.datetime.now().isoformat(timespec="seconds")
        self._jobs[key] = {
            "name": name_of(key),
            "id": job_id,
            "submitted": now,
            "cluster": self._cluster,
            "folder": str(self._folder),
        }
        write_json(self.path, self._jobs)

    def confirm(self, queue: Iterable[QueuedJob]) -> None:
        """Note how Slurm shows the jobs that were added, by its own clock."""
        shown = {job.id: job for job in queue}
        for entry in self._jobs.values():
            job = shown.get(entry["id"])
            if job and entry.get("folder") == str(self._folder) and "seen" not in entry:
                entry |= {"submitted": job.submitted, "seen": [job.name, job.command]}
        write_json(self.path, self._jobs)

    def _is_elsewhere(self, entry: dict[str, Any]) -> bool:
        return bool(entry.get("cluster", self._cluster) != self._cluster)


def name_of(key: str) -> str:
    """The name of the job with this key (see `Job.key`)."""
    return key.rpartition("-")[0]


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], bool]:
    """The entries of `jobs.json`, and True if it was damaged; Slurm's queue knows the rest."""
    if not path.exists():
        return {}, False
    try:
        tree = json.loads(path.read_text())
    except ValueError:
        return {}, True
    whole = {
        key: entry
        for key, entry in (tree.items() if isinstance(tree, dict) else ())
        if isinstance(entry, dict)
        and str(entry.get("id", "")).isdecimal()
        and isinstance(entry["id"], str)
        and isinstance(entry.get("submitted"), str)
    }
    return whole, not isinstance(tree, dict) or len(whole) < len(tree)


@contextlib.contextmanager
def locked_records(folders: set[Path], cluster: str) -> Iterator[dict[Path, Record]]:
    """The records of some folders while no other process submits to them; waits for one that does.

    Raises:
        UserError: a folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        # Sorted: two who lock the same folders in another order would wait for each other.
        for folder in sorted(folders):
            try:
                stack.enter_context(one_at_a_time(folder / ".lock"))
            except OSError as error:
                raise UserError(
                    f"{folder}: cannot be written ({error.strerror})",
                    fix="choose an output_dir of your own",
                ) from error
        yield {folder: Record(folder, cluster) for folder in folders}
