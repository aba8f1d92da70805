"""`jobs.json`: which jobs were submitted for a folder; one writer at a time."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.run_dir import one_at_a_time, write_json
from pipeline.submission.job import Job


class Record:
    """Ids of the jobs of one folder, by key; as many keys as configs were submitted."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "jobs.json"
        self._jobs: dict[str, dict[str, str]] = {}
        if self._path.exists():
            self._jobs = json.loads(self._path.read_text())

    def ids(self) -> list[str]:
        """All of them, ended ones too."""
        return [entry["id"] for entry in self._jobs.values()]

    def id_of(self, job: Job) -> str:
        """The job that does the same; empty when none was submitted."""
        return self._jobs.get(job.key, {}).get("id", "")

    def others(self, job: Job) -> list[str]:
        """Jobs of the same name that do something else."""
        return [
            entry["id"]
            for key, entry in self._jobs.items()
            if entry["name"] == job.name and key != job.key
        ]

    def add(self, job: Job, job_id: str) -> None:
        """Note a submitted job; it is on disk when this returns."""
        self._note(job.key, job.name, job_id)

    def replace(self, old_id: str, new_id: str) -> None:
        """Note that a job goes on as another one; it is on disk when this returns."""
        for key, entry in self._jobs.items():
            if entry["id"] == old_id:
                self._note(key, entry["name"], new_id)

    def _note(self, key: str, name: str, job_id: str) -> None:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._jobs[key] = {"name": name, "id": job_id, "submitted": now}
        write_json(self._path, self._jobs)


@contextlib.contextmanager
def locked_records(folders: set[Path]) -> Iterator[dict[Path, Record]]:
    """The records of some folders while nobody else submits to them; waits for who does.

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
        yield {folder: Record(folder) for folder in folders}
