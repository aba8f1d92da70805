"""Brings data sets to a folder on a machine with network, for compute nodes without."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.tasks.elements import check_names, tasks_of
from pipeline.evaluation.tasks.snapshots import (
    REVISION_FILE,
    get_task,
    load_and_prove,
    localise,
    private_cache,
)
from pipeline.run_dir import require_writable, write_text

# BRIGHT's repositories also hold queries rewritten by other models; no task reads them.
_ONLY = {
    "mteb/BRIGHT": ["README.md", "documents/*", "long_documents/*", "examples/*"],
    "xlangai/BRIGHT": ["README.md", "documents/*", "long_documents/*", "examples/*"],
}


def prefetch(config: EvaluateConfig, *, endpoint: str | None = None) -> Path:
    """Fetch every task's data set at the revision mteb pins, then prove each task complete.

    What is already there at that revision is kept; run again, it continues. Own tasks are only
    proved complete.

    Args:
        endpoint: address of a hub other than the configured one.

    Returns:
        The folder of snapshots.

    Raises:
        UserError: `snapshots` is not set or cannot be written, or the hub cannot be reached.
    """
    check_names(config)
    if config.snapshots is None:
        raise UserError("snapshots: not set", fix="name the folder that the data sets go to")
    require_writable(config.snapshots, key="snapshots")
    tasks = {name: get_task(name, own) for name, own in tasks_of(config).items()}
    sources = {
        (tasks[name].metadata.dataset["path"], tasks[name].metadata.dataset["revision"])
        for name, own in tasks_of(config).items()
        if own is None
    }
    for number, (repository, revision) in enumerate(sorted(sources), start=1):
        print(f"data set {number}/{len(sources)}: {repository} at {revision[:12]}", flush=True)
        _fetch(config.snapshots / repository, repository, revision, endpoint)
    for task in tasks.values():
        with tempfile.TemporaryDirectory() as scratch, private_cache(Path(scratch)):
            load_and_prove(localise(task, config.snapshots))
        print(f"{task.metadata.name}: complete", flush=True)
    return config.snapshots


def _fetch(folder: Path, repository: str, revision: str, endpoint: str | None) -> None:
    marker = folder / REVISION_FILE
    if marker.is_file() and marker.read_text().strip() == revision:
        return
    marker.unlink(missing_ok=True)
    try:
        snapshot_download(
            repository,
            repo_type="dataset",
            revision=revision,
            local_dir=folder,
            allow_patterns=_ONLY.get(repository),
            endpoint=endpoint,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise UserError(
            f"{repository} at {revision[:12]}: {str(error).splitlines()[0]}",
            fix="run this on a machine that reaches the hub",
        ) from error
    # Last: its presence means that the snapshot is whole.
    write_text(marker, revision + "\n")
