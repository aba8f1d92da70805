"""Load mteb tasks from local snapshots, complete and exactly as mteb defines them.

mteb joins a document's title and text, and a query's text and its own (FollowIR) instruction. That
happens here once; nothing downstream may add either again.

Scoring loads them as mteb does. A test compares the two on every subset, and a text that scoring
asks for and the listing lacks is refused by name.

Why not mteb's own offline mode: with the hub out of reach its loader sees only a data set's default
config, drops FollowIR's instructions and candidates without a word, and p-MRR becomes exactly 0.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from pipeline.config import EvaluateConfig, OwnTask
from pipeline.errors import UserError, blame
from pipeline.evaluation.tasks import BENCHMARKS, check_names, load_mteb, make_task, tasks_of
from pipeline.files import require_writable, write_text

Role = Literal["query", "document"]


def document_texts(table: Any) -> list[str]:
    """Title and text of each document of a corpus (columns `text` and optionally `title`)."""
    texts = table["text"][:]
    titles = table["title"][:] if "title" in table.column_names else [""] * len(texts)
    return [
        f"{title} {text}".strip() if title else text.strip()
        for title, text in zip(titles, texts, strict=True)
    ]


def query_texts(table: Any) -> list[str]:
    """Text of each query, followed by its own instruction where the task has that column."""
    texts: list[str] = table["text"][:]
    if "instruction" not in table.column_names:
        return texts
    return [
        text if instruction is None else f"{text} {instruction}"
        for text, instruction in zip(texts, table["instruction"][:], strict=True)
    ]


# Subsets whose name is not that of the task in lower case.
_SPELLED = {
    "EarthScience": "earth_science",
    "SustainableLiving": "sustainable_living",
    "TheoremQATheorems": "theoremqa_theorems",
    "TheoremQAQuestions": "theoremqa_questions",
}
_TASKS = {*BENCHMARKS["BRIGHT"], *BENCHMARKS["BRIGHT-long"]}


def is_bright(task: str) -> bool:
    """Whether `load_columns` reads the task."""
    return task in _TASKS


def load_columns(task: Any, *, fix: str) -> dict[str, Any]:
    """Return corpus, queries and judgements of a localised BRIGHT task, as mteb holds a split.

    Raises:
        UserError: they cannot be loaded, which `fix` mends.
    """
    topic = task.metadata.name.removeprefix("Bright").removesuffix("Retrieval")
    long = topic.endswith("Long")
    topic = topic.removesuffix("Long")
    subset = _SPELLED.get(topic, topic.lower())
    documents = _load(task, "long_documents" if long else "documents", subset, fix)
    examples = _load(task, "examples", subset, fix)
    gold = examples["gold_ids_long" if long else "gold_ids"]
    return {
        "corpus": documents.select_columns(["id", "content"]).rename_column("content", "text"),
        "queries": examples.select_columns(["id", "query"]).rename_column("query", "text"),
        "relevant_docs": {
            query: dict.fromkeys(ids, 1) for query, ids in zip(examples["id"], gold, strict=True)
        },
    }


def _load(task: Any, config: str, subset: str, fix: str) -> datasets.Dataset:
    """One subset's files alone; by its name, `datasets` would convert all twelve."""
    source = task.metadata.dataset
    found = f"{task.metadata.name}: cannot load {config} of the data set {source['path']}"
    with blame(found, fix=fix):
        builder = datasets.load_dataset_builder(source["path"], config, revision=source["revision"])
        files = {subset: builder.config.data_files[subset]}
        return datasets.load_dataset(builder.name, data_files=files, split=subset)


# Written beside a fetched data set when it is whole; holds its revision.
REVISION_FILE = ".revision"
_LOCAL = "local"
_PREFETCH = "run `diffembed evaluate prefetch` on a machine with network"


def get_task(name: str, own: OwnTask | None = None) -> Any:
    """mteb's own task object, unmodified, or a task of the same kind for the user's own folder.

    Raises:
        UserError: mteb has no task of that name, or it is no retrieval task, or an own task has the
            name of a task of mteb.
    """
    mteb = load_mteb()
    try:
        task = mteb.get_task(name)
    except KeyError as error:
        if own is not None:
            return make_task(own)
        folder = f"for a folder, write {{name: NAME, path: {name}}}" if Path(name).is_dir() else ""
        raise UserError(
            f"tasks: {name!r}: mteb has no such task",
            allowed="a benchmark (FollowIR, LongEmbed, BRIGHT, BRIGHT-long), an mteb task name, or "
            "{name: NAME, path: FOLDER} for a retrieval task of your own",
            fix=folder,
        ) from error
    if own is not None:
        raise UserError(f"tasks: mteb has a task {name!r}", fix="give your own another name")
    if not hasattr(task, "convert_v1_dataset_format_to_v2"):
        raise UserError(f"tasks: {name!r} is of type {task.metadata.type}", allowed="retrieval")
    return task


def check_tasks(tasks: Mapping[str, OwnTask | None], snapshots: Path | None) -> None:
    """Find unknown tasks and missing folders before the first task is loaded.

    Raises:
        UserError: names the first such task.
    """
    found = [get_task(name, own) for name, own in tasks.items()]
    for task, own in zip(found, tasks.values(), strict=True):
        if own is None:
            localise(task, snapshots)
        elif not own.path.is_dir():
            raise UserError(
                f"tasks.{own.name}: {own.path} is no folder",
                allowed="a folder with corpus, queries and qrels",
            )


def localise(task: Any, snapshots: Path | None) -> Any:
    """Point one task object at its data set's folder below `snapshots`, laid out as on the hub.

    Only this object changes: mteb keeps metadata on the class, so it is copied first. A task of the
    user's own has its folder already.

    Raises:
        UserError: the data set is not among the snapshots, or was fetched at another revision.
    """
    source = task.metadata.dataset
    if snapshots is None or source["revision"] == _LOCAL:
        return task
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
            return _LOCAL
    return str(task.metadata.dataset["revision"])


def load_and_prove(task: Any) -> None:
    """Load a task's data and check that everything its score needs is there.

    Raises:
        UserError: documents, queries, relevance judgements, or for FollowIR the instructions,
            candidates or changed judgements are missing.
    """
    fix = _fix_of(task)
    with blame(_cannot_load(task), fix=fix):
        task.load_data()
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    for subset, split, data in evaluated_splits(task):
        where = f"{task.metadata.name} {subset}/{split}"
        _prove_split(where, data, fix)
        if task.metadata.type == "InstructionReranking":
            _prove_instructions(where, data, fix)
            _prove_changed_judgements(where, task, set(data["queries"]["id"][:]), fix)


def _cannot_load(task: Any) -> str:
    return f"{task.metadata.name}: cannot load the data set {task.metadata.dataset['path']}"


def _fix_of(task: Any) -> str:
    """What helps against missing or damaged data, by where they come from."""
    source = task.metadata.dataset
    folder = Path(source["path"])
    if not folder.is_dir():
        return f"set snapshots to a folder, and {_PREFETCH}"
    if (folder / REVISION_FILE).is_file():
        return f"remove {folder} and {_PREFETCH}"
    if source["revision"] == _LOCAL:
        return f"mend the files in {folder}"
    return f"mend the files in {folder}, or name another snapshots folder and {_PREFETCH}"


def evaluated_splits(task: Any) -> Iterator[tuple[str, str, Any]]:
    """(subset, split, data) of what a loaded task scores; it may have loaded more."""
    for subset, splits in task.dataset.items():
        for split, data in splits.items():
            if split in task.eval_splits:
                yield subset, split, data


def _require(condition: bool, where: str, missing: str, fix: str) -> None:
    if not condition:
        raise UserError(f"{where}: {missing}", fix=fix)


def _prove_split(where: str, data: Any, fix: str) -> None:
    _require(len(data["corpus"]) > 0, where, "no documents", fix)
    _require(len(data["queries"]) > 0, where, "no queries", fix)
    _prove_texts(f"{where}: document", data["corpus"], fix)
    _prove_texts(f"{where}: query", data["queries"], fix)
    judged = data["relevant_docs"]
    unjudged = [query for query in data["queries"]["id"][:] if not judged.get(query)]
    _require(not unjudged, where, f"no relevance judgements for queries {unjudged[:3]}", fix)
    _say_doubtful(where, data)


def _say_doubtful(where: str, data: Any) -> None:
    """Count what mteb scores all the same, though it may be a fault of the files."""
    documents, queries = data["corpus"], data["queries"]
    known = set(documents["id"][:])
    judged = {d for query in queries["id"][:] for d in data["relevant_docs"][query]}
    doubtful = {
        "judged documents that the corpus lacks, never found": len(judged - known),
        "documents with an earlier document's id and another text, of which one counts": (
            _num_ambiguous(documents, document_texts) if len(known) < len(documents) else 0
        ),
        "queries with an earlier query's id and another text, of which one counts": _num_ambiguous(
            queries, query_texts
        ),
    }
    for what, count in doubtful.items():
        if count:
            print(f"{where}: {what}: {count}", flush=True)


def _num_ambiguous(table: Any, texts_of: Callable[[Any], list[str]]) -> int:
    first: dict[str, str] = {}
    pairs = zip(table["id"][:], texts_of(table), strict=True)
    return sum(first.setdefault(name, text) != text for name, text in pairs)


def _prove_texts(where: str, table: Any, fix: str) -> None:
    """Refuse texts that are no strings; a title or an instruction may be null."""
    ids = table["id"][:]
    _require(None not in ids, where, "an id is null", fix)
    for column in ("text", "title", "instruction"):
        if column not in table.column_names:
            _require(column != "text", where, "no column of texts", fix)
            continue
        for name, value in zip(ids, table[column][:], strict=True):
            if not isinstance(value, str) and (value is not None or column == "text"):
                kind = "null" if value is None else type(value).__name__
                raise UserError(f"{where} {name!r}: {column} is {kind}", allowed="a text", fix=fix)


def _prove_instructions(where: str, data: Any, fix: str) -> None:
    queries = data["queries"]
    given = queries["instruction"][:] if "instruction" in queries.column_names else []
    _require(any(given), where, "no instructions", fix)
    candidates = data["top_ranked"] or {}
    without = [query for query in queries["id"][:] if not candidates.get(query)]
    _require(not without, where, f"no candidates (top_ranked) for queries {without[:3]}", fix)


def _prove_changed_judgements(where: str, task: Any, queries: set[str], fix: str) -> None:
    """mteb loads these only after encoding, when their absence has become expensive."""
    changed = changed_judgements(task)
    _require(bool(changed), where, "no changed judgements (qrel_diff)", fix)
    lonely = [q for q in changed if not {f"{q}-og", f"{q}-changed"} <= queries]
    missing = f"queries {lonely[:3]} of qrel_diff lack an -og or -changed twin"
    _require(not lonely, where, missing, fix)


def changed_judgements(task: Any) -> dict[str, list[str]]:
    """FollowIR: per base query the documents that its changed instruction makes irrelevant."""
    source = task.metadata.dataset
    try:
        rows = datasets.load_dataset(
            source["path"], "qrel_diff", split="qrel_diff", revision=source["revision"]
        )
    except (ValueError, FileNotFoundError) as error:
        raise UserError(
            f"{task.metadata.name}: no changed judgements (qrel_diff): {error}", fix=_fix_of(task)
        ) from error
    return {row["query-id"]: list(row["corpus-ids"]) for row in rows}


def task_texts(
    name: str, *, snapshots: Path | None, own: OwnTask | None = None
) -> tuple[list[str], list[str]]:
    """Every document and every query of a task, as mteb will ask for them, after the proof."""
    documents: list[str] = []
    queries: list[str] = []
    with tempfile.TemporaryDirectory(prefix="diffembed-") as scratch, private_cache(Path(scratch)):
        task = localise(get_task(name, own), snapshots)
        if is_bright(name):
            with blame(_cannot_load(task), fix=_fix_of(task)):
                splits = [load_columns(task, fix=_fix_of(task))]
            _prove_split(name, splits[0], _fix_of(task))
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
