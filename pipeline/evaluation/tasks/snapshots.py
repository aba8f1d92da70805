"""mteb tasks on local snapshots of their data sets, proved complete before anything is encoded.

Why not mteb's own offline mode: with the hub out of reach its loader sees only a data set's default
config, drops FollowIR's instructions and candidates without a word, and p-MRR becomes exactly 0.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import mteb

from pipeline.errors import UserError, blame
from pipeline.evaluation.tasks.bright import is_bright, load_columns
from pipeline.evaluation.tasks.texts import document_texts, query_texts

# Written beside a fetched data set when it is whole; holds its revision.
REVISION_FILE = ".revision"
_PREFETCH = "run `diffembed evaluate prefetch` on a machine with network"


def get_task(name: str) -> Any:
    """mteb's own task object, unmodified.

    Raises:
        UserError: mteb has no task of that name, or it is no retrieval task.
    """
    try:
        task = mteb.get_task(name)
    except KeyError as error:
        raise UserError(
            f"tasks: {name!r}: mteb has no such task",
            allowed="a benchmark (FollowIR, LongEmbed, BRIGHT, BRIGHT-long) or an mteb task name",
        ) from error
    if not hasattr(task, "convert_v1_dataset_format_to_v2"):
        raise UserError(f"tasks: {name!r} is of type {task.metadata.type}", allowed="retrieval")
    return task


def localise(task: Any, snapshots: Path | None) -> Any:
    """Point one task object at its data set's folder below `snapshots`, laid out as on the hub.

    Only this object changes: mteb keeps metadata on the class, so it is copied first.

    Raises:
        UserError: the data set is not among the snapshots, or was fetched at another revision.
    """
    if snapshots is None:
        return task
    source = task.metadata.dataset
    folder = snapshots / source["path"]
    if not folder.is_dir():
        raise UserError(
            f"{task.metadata.name}: no folder {folder}",
            allowed=f"the hub's {source['path']} below snapshots ({snapshots})",
            fix=f"correct snapshots, or {_PREFETCH}",
        )
    marker = folder / REVISION_FILE
    if marker.is_file() and marker.read_text().strip() != source["revision"]:
        raise UserError(
            f"{folder}: revision {marker.read_text().strip()[:12]}",
            allowed=f"{source['revision'][:12]}, which this mteb pins for {task.metadata.name}",
            fix=_PREFETCH,
        )
    update = {"dataset": {**source, "path": str(folder.resolve())}}
    task.metadata = task.metadata.model_copy(update=update)
    return task


def data_revision(task: Any, snapshots: Path | None) -> str:
    """The revision of a localised task's data; `local` for a folder that nobody fetched.

    mteb's own result files carry its pinned revision even where the data are a replica.
    """
    if snapshots is not None:
        marker = Path(task.metadata.dataset["path"]) / REVISION_FILE
        if not marker.is_file():
            return "local"
    return str(task.metadata.dataset["revision"])


def load_and_prove(task: Any) -> None:
    """Load a task's data and check that everything its score needs is there.

    Raises:
        UserError: documents, queries, relevance judgements, or for FollowIR the instructions,
            candidates or changed judgements are missing.
    """
    name, path = task.metadata.name, task.metadata.dataset["path"]
    with blame(f"{name}: cannot load the data set {path}", fix=_PREFETCH):
        task.load_data()
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    for subset, split, data in evaluated_splits(task):
        where = f"{task.metadata.name} {subset}/{split}"
        _prove_split(where, data)
        if task.metadata.type == "InstructionReranking":
            _prove_instructions(where, data)
            _prove_changed_judgements(where, task, set(data["queries"]["id"][:]))


def evaluated_splits(task: Any) -> Iterator[tuple[str, str, Any]]:
    """(subset, split, data) of what a loaded task scores; it may have loaded more."""
    for subset, splits in task.dataset.items():
        for split, data in splits.items():
            if split in task.eval_splits:
                yield subset, split, data


def _require(condition: bool, where: str, missing: str) -> None:
    if not condition:
        raise UserError(f"{where}: {missing}", fix=_PREFETCH)


def _prove_split(where: str, data: Any) -> None:
    _require(len(data["corpus"]) > 0, where, "no documents")
    _require(len(data["queries"]) > 0, where, "no queries")
    judged = data["relevant_docs"]
    unjudged = [query for query in data["queries"]["id"][:] if not judged.get(query)]
    _require(not unjudged, where, f"no relevance judgements for queries {unjudged[:3]}")


def _prove_instructions(where: str, data: Any) -> None:
    queries = data["queries"]
    given = queries["instruction"][:] if "instruction" in queries.column_names else []
    _require(any(given), where, "no instructions")
    candidates = data["top_ranked"] or {}
    without = [query for query in queries["id"][:] if not candidates.get(query)]
    _require(not without, where, f"no candidates (top_ranked) for queries {without[:3]}")


def _prove_changed_judgements(where: str, task: Any, queries: set[str]) -> None:
    """mteb loads these only after encoding, when their absence has become expensive."""
    changed = changed_judgements(task)
    _require(bool(changed), where, "no changed judgements (qrel_diff)")
    lonely = [q for q in changed if not {f"{q}-og", f"{q}-changed"} <= queries]
    _require(not lonely, where, f"queries {lonely[:3]} of qrel_diff lack an -og or -changed twin")


def changed_judgements(task: Any) -> dict[str, list[str]]:
    """FollowIR: per base query the documents that its changed instruction makes irrelevant."""
    source = task.metadata.dataset
    try:
        rows = datasets.load_dataset(
            source["path"], "qrel_diff", split="qrel_diff", revision=source["revision"]
        )
    except (ValueError, FileNotFoundError) as error:
        raise UserError(
            f"{task.metadata.name}: no changed judgements (qrel_diff): {error}", fix=_PREFETCH
        ) from error
    return {row["query-id"]: list(row["corpus-ids"]) for row in rows}


def task_texts(name: str, *, snapshots: Path | None) -> tuple[list[str], list[str]]:
    """Every document and every query of a task, as mteb will ask for them, after the proof."""
    documents: list[str] = []
    queries: list[str] = []
    with tempfile.TemporaryDirectory(prefix="diffembed-") as scratch, private_cache(Path(scratch)):
        task = localise(get_task(name), snapshots)
        if is_bright(name):
            splits = [load_columns(task)]
            _prove_split(name, splits[0])
        else:
            load_and_prove(task)
            splits = [data for _, _, data in evaluated_splits(task)]
        for data in splits:
            documents += document_texts(data["corpus"])
            queries += query_texts(data["queries"])
    return documents, queries


@contextlib.contextmanager
def private_cache(folder: Path) -> Iterator[None]:
    """Let `datasets` keep its converted files in `folder`.

    Array elements must not share one cache: a read-only home breaks its locks, and a converted
    file may outlive the snapshot it came from.
    """
    saved = datasets.config.HF_DATASETS_CACHE
    shown = datasets.are_progress_bars_disabled()
    datasets.config.HF_DATASETS_CACHE = folder
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = saved
        if not shown:
            datasets.enable_progress_bars()
