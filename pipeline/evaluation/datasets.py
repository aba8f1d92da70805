"""Load the tasks of mteb from local snapshots, complete and exactly as mteb defines them.

    hub --prefetch--> snapshots/mteb/BRIGHT/ --localise--> task --load_and_check--> task.dataset
                                                                --load_texts--> documents, queries

A document is its title and text, a query its text and its own instruction (FollowIR): both are
joined here (`document_texts`, `query_texts`), and nowhere else, for planning and scoring. A test
compares the strings with mteb's on every subset.

mteb's own offline mode is not an alternative: without network its loader sees only a data set's
default config and silently drops FollowIR's instructions and candidates, and p-MRR is exactly 0.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import snapshot_download

from pipeline.config import EvaluateConfig, OwnTask
from pipeline.errors import UserError, blame
from pipeline.evaluation.query_scores import require_mean
from pipeline.evaluation.tasks import (
    BENCHMARKS,
    LOCAL_REVISION,
    check_names,
    load_mteb,
    make_task,
    tasks_of,
)
from pipeline.files import require_writable, write_text


def document_texts(table: Any) -> list[str]:
    """Join title and text of each document of a corpus (columns `text` and optionally `title`)."""
    texts = table["text"][:]
    titles = table["title"][:] if "title" in table.column_names else [""] * len(texts)
    # Spaces at the ends may be tokens: they are removed where mteb removes them.
    return [
        f"{title} {text}".strip() if title else text.strip()
        for title, text in zip(titles, texts, strict=True)
    ]


def query_texts(table: Any) -> list[str]:
    """Join the text of each query and its own instruction, if the task has that column."""
    # A copy of the column; a row at a time would be slow.
    texts: list[str] = table["text"][:]
    if "instruction" not in table.column_names:
        return texts
    return [
        text if instruction is None else f"{text} {instruction}"
        for text, instruction in zip(texts, table["instruction"][:], strict=True)
    ]


# Subsets that are not named like the task in lower case.
_SPELLED = {
    "EarthScience": "earth_science",
    "SustainableLiving": "sustainable_living",
    "TheoremQATheorems": "theoremqa_theorems",
    "TheoremQAQuestions": "theoremqa_questions",
}
_BRIGHT_TASKS = {*BENCHMARKS["BRIGHT"], *BENCHMARKS["BRIGHT-long"]}


def _load_bright(task: Any, *, fix: str) -> dict[str, Any]:
    """Load corpus, queries and judgements of a localised BRIGHT task, as mteb holds a split.

    Raises:
        UserError: they cannot be loaded; `fix` is the advice.
    """
    # BrightEarthScienceLongRetrieval is the long half of the subset earth_science.
    topic = task.metadata.name.removeprefix("Bright").removesuffix("Retrieval")
    long = topic.endswith("Long")
    topic = topic.removesuffix("Long")
    subset = _SPELLED.get(topic, topic.lower())
    documents = _load_subset(task, "long_documents" if long else "documents", subset, fix)
    examples = _load_subset(task, "examples", subset, fix)
    # The long half has its own documents and judgements, but the same questions.
    gold = examples["gold_ids_long" if long else "gold_ids"]
    for query, ids in zip(examples["id"], gold, strict=True):
        _require_ids(task.metadata.name, query, ids, fix)
    return {
        "corpus": documents.select_columns(["id", "content"]).rename_column("content", "text"),
        "queries": examples.select_columns(["id", "query"]).rename_column("query", "text"),
        "relevant_docs": {
            query: dict.fromkeys(ids, 1) for query, ids in zip(examples["id"], gold, strict=True)
        },
    }


def _require_ids(where: str, query: Any, documents: Any, fix: str) -> None:
    """Refuse a query and the documents judged for it, unless their ids are texts."""
    listed = isinstance(documents, list)
    if not (listed and all(isinstance(each, str) for each in [query, *documents])):
        raise UserError(
            f"{where}: query {query!r} judges the documents {str(documents)[:80]}",
            allowed="ids that are texts",
            fix=fix,
        )


def _load_subset(task: Any, config: str, subset: str, fix: str) -> datasets.Dataset:
    """Load the files of one subset; given its name, `datasets` would convert all twelve."""
    source = task.metadata.dataset
    found = f"{task.metadata.name}: cannot load {config} of the data set {source['path']}"
    with blame(found, fix=fix):
        # The builder knows format and files of each subset from the data set's card.
        builder = datasets.load_dataset_builder(source["path"], config, revision=source["revision"])
        files = {subset: builder.config.data_files[subset]}
        return datasets.load_dataset(builder.name, data_files=files, split=subset)


# Written into the folder of a fetched data set when it is whole; holds its revision.
REVISION_FILE = ".revision"
_PREFETCH = "run `diffembed evaluate prefetch` on a machine with network"


def get_task(name: str, own: OwnTask | None = None) -> Any:
    """Return mteb's own task object, unmodified, or a task of the same kind for a user's folder.

    Raises:
        UserError: mteb has no task of that name, or it is not about retrieval or has a score that
            is no mean over queries, or an own task has the name of a task of mteb.
    """
    mteb = load_mteb()
    try:
        # mteb first: an own task must not hide one of mteb's.
        task = mteb.get_task(name)
    except KeyError as error:
        if own is not None:
            return make_task(own)
        folder = f"for a folder, write {{name: NAME, path: {name}}}" if Path(name).is_dir() else ""
        raise UserError(
            f"tasks: {name!r}: mteb has no such task",
            allowed="a benchmark (FollowIR, LongEmbed, BRIGHT, BRIGHT-long), an mteb task name, or "
            "{name: NAME, path: FOLDER} for your own retrieval task",
            fix=folder,
            docs="trouble.md#no-task",
        ) from error
    if own is not None:
        raise UserError(f"tasks: mteb has a task {name!r}", fix="give your own task another name")
    # Other types of tasks have no corpus and queries, and so lack this method of retrieval tasks.
    if not hasattr(task, "convert_v1_dataset_format_to_v2"):
        raise UserError(f"tasks: {name!r} is of type {task.metadata.type}", allowed="retrieval")
    require_mean(name, task.metadata.main_score)
    return task


def check_tasks(tasks: Mapping[str, OwnTask | None], snapshots: Path | None) -> None:
    """Check that tasks are known and their folders exist, before the first task is loaded.

    Raises:
        UserError: names the first task that fails.
    """
    # All names first: a typo should not wait for a missing folder.
    found = [get_task(name, own) for name, own in tasks.items()]
    for task, own in zip(found, tasks.values(), strict=True):
        if own is None:
            localise(task, snapshots)
        elif not own.path.is_dir():
            raise UserError(
                f"tasks.{own.name}: {own.path} is not a folder",
                allowed="a folder with corpus, queries and qrels",
            )


def localise(task: Any, snapshots: Path | None) -> Any:
    """Point one task object at its data set's folder below `snapshots`, laid out as on the hub.

    Only this object changes; an own task does not.

    Raises:
        UserError: the data set is not among the snapshots, or was fetched at another revision.
    """
    source = task.metadata.dataset
    if snapshots is None or source["revision"] == LOCAL_REVISION:
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
    # Absolute, because a relative path might look like a name on the hub. A copy of the metadata,
    # because mteb keeps it on the class: all such tasks of this process would change.
    update = {"dataset": {**source, "path": str(folder.resolve())}}
    task.metadata = task.metadata.model_copy(update=update)
    return task


def data_revision(task: Any, snapshots: Path | None) -> str:
    """Return the revision of a localised task's data; `local` if `prefetch` did not fetch them.

    mteb's own result files carry the pinned revision even if the data are a replica.
    """
    # Without snapshots the hub itself gave the pinned revision.
    if snapshots is not None:
        marker = Path(task.metadata.dataset["path"]) / REVISION_FILE
        if not marker.is_file():
            return LOCAL_REVISION
    return str(task.metadata.dataset["revision"])


def load_and_check(task: Any) -> None:
    """Load a task's data and check that everything its score needs is there.

    Raises:
        UserError: documents, queries, relevance judgements, or for FollowIR the instructions,
            candidates or changed judgements are missing.
    """
    fix = _fix_of(task)
    with blame(_cannot_load(task), fix=fix):
        task.load_data()
        # As mteb does before it scores: older tasks load dicts in attributes of their own.
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    for subset, split, data in evaluated_splits(task):
        where = f"{task.metadata.name} {subset}/{split}"
        # mteb makes dicts of BRIGHT's rows, in which repeated ids are gone.
        rows = _load_bright(task, fix=fix) if task.metadata.name in _BRIGHT_TASKS else data
        _check_split(where, data, fix, rows=rows)
        if task.metadata.type == "InstructionReranking":
            _check_instructions(where, data, fix)
            _check_changed_judgements(where, task, subset, set(data["queries"]["id"][:]), fix)


def _cannot_load(task: Any) -> str:
    return f"{task.metadata.name}: cannot load the data set {task.metadata.dataset['path']}"


def _fix_of(task: Any) -> str:
    """Return the advice for missing or damaged data, which depends on their origin."""
    source = task.metadata.dataset
    folder = Path(source["path"])
    if not folder.is_dir():
        return f"set snapshots to a folder, and {_PREFETCH}"
    if (folder / REVISION_FILE).is_file():
        return f"remove {folder} and {_PREFETCH}"
    if source["revision"] == LOCAL_REVISION:
        return f"repair the files in {folder}"
    return f"repair the files in {folder}, or name another snapshots folder and {_PREFETCH}"


def evaluated_splits(task: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield (subset, split, data) that a loaded task scores; it may have loaded more."""
    for subset, splits in task.dataset.items():
        for split, data in splits.items():
            if split in task.eval_splits:
                yield subset, split, data


def _require(condition: bool, where: str, missing: str, fix: str) -> None:
    if not condition:
        raise UserError(f"{where}: {missing}", fix=fix)


def _check_split(where: str, data: Any, fix: str, *, rows: Any) -> None:
    """Refuse a split that lacks something, and count doubtful rows.

    Args:
        where: task, subset and split, for messages.
        data: the split as mteb scores it.
        fix: the advice.
        rows: the split as its files hold it, with rows of repeated ids.
    """
    _require(len(data["corpus"]) > 0, where, "no documents", fix)
    _require(len(data["queries"]) > 0, where, "no queries", fix)
    _check_strings(f"{where}: document", data["corpus"], fix)
    _check_strings(f"{where}: query", data["queries"], fix)
    # A query without judgements would count as 0 in the mean.
    judged = data["relevant_docs"]
    unjudged = [query for query in data["queries"]["id"][:] if not judged.get(query)]
    _require(not unjudged, where, f"no relevance judgements for queries {unjudged[:3]}", fix)
    _check_judgements(where, judged, fix)
    relevant = any(grade > 0 for grades in judged.values() for grade in grades.values())
    _require(relevant, where, "no query has a relevant document (a grade above 0)", fix)
    # Queries without such a list are ranked against all documents.
    if data.get("top_ranked"):
        _check_candidates(where, data, fix)
    _report_doubtful(where, rows)


def _check_judgements(where: str, judged: Any, fix: str) -> None:
    """Refuse judgements that pytrec_eval would refuse after everything is encoded."""
    for query, grades in judged.items():
        _require_ids(where, query, list(grades), fix)
        for document, grade in grades.items():
            if type(grade) is not int:
                raise UserError(
                    f"{where}: query {query!r}: document {document!r} has the grade {grade!r}",
                    allowed="whole numbers",
                    fix=fix,
                )


def _check_candidates(where: str, data: Any, fix: str) -> None:
    """Refuse candidates that the corpus lacks: scoring would fail once everything is embedded."""
    known, listed = set(data["corpus"]["id"][:]), data["top_ranked"]
    # Other splits may share the list of candidates.
    odd = [q for q in data["queries"]["id"][:] if not known.issuperset(listed.get(q, ()))]
    missing = f"candidates (top_ranked) of queries {odd[:3]} are not in the corpus"
    _require(not odd, where, missing, fix)


def _report_doubtful(where: str, data: Any) -> None:
    """Print counts of rows that mteb scores, though they may be errors in the files."""
    documents, queries = data["corpus"], data["queries"]
    known = set(documents["id"][:])
    judgements = [data["relevant_docs"][query] for query in set(queries["id"][:])]
    candidates = data.get("top_ranked")
    # Documents of all judgements, relevant or not.
    judged = {document for grades in judgements for document in grades}
    doubtful = {
        "queries without a relevant document, which count as 0": sum(
            all(grade <= 0 for grade in grades.values()) for grades in judgements
        ),
        "queries without candidates, which find nothing": (
            sum(not candidates.get(query) for query in queries["id"][:]) if candidates else 0
        ),
        "judged documents that the corpus lacks, never found": len(judged - known),
        "documents with an earlier document's id and another text, of which one counts": (
            _num_ambiguous(documents, document_texts) if len(known) < len(documents) else 0
        ),
        "queries with an earlier query's id and another text, of which one counts": _num_ambiguous(
            queries, query_texts
        ),
    }
    for kind, count in doubtful.items():
        if count:
            print(f"{where}: {kind}: {count}", flush=True)


def _num_ambiguous(table: Any, texts_of: Callable[[Any], list[str]]) -> int:
    first: dict[str, str] = {}
    pairs = zip(table["id"][:], texts_of(table), strict=True)
    return sum(first.setdefault(name, text) != text for name, text in pairs)


def _check_strings(where: str, table: Any, fix: str) -> None:
    """Refuse texts that are not strings; a title or an instruction may be null."""
    ids = table["id"][:]
    odd = [each for each in ids if not isinstance(each, str)]
    if odd:
        found = "an id is null" if odd[0] is None else f"an id is {odd[0]!r}"
        raise UserError(f"{where}: {found}", allowed="texts", fix=fix)
    for column in ("text", "title", "instruction"):
        if column not in table.column_names:
            _require(column != "text", where, "no column of texts", fix)
            continue
        for name, value in zip(ids, table[column][:], strict=True):
            if not isinstance(value, str) and (value is not None or column == "text"):
                kind = "null" if value is None else type(value).__name__
                raise UserError(f"{where} {name!r}: {column} is {kind}", allowed="a text", fix=fix)


def _check_instructions(where: str, data: Any, fix: str) -> None:
    queries = data["queries"]
    given = queries["instruction"][:] if "instruction" in queries.column_names else []
    _require(any(given), where, "no instructions", fix)
    # FollowIR re-ranks a given list per query.
    candidates = data["top_ranked"] or {}
    without = [query for query in queries["id"][:] if not candidates.get(query)]
    _require(not without, where, f"no candidates (top_ranked) for queries {without[:3]}", fix)


def _check_changed_judgements(
    where: str, task: Any, subset: str, queries: set[str], fix: str
) -> None:
    """Load judgements that mteb loads only after encoding, when an error has become expensive."""
    changed = changed_judgements(task, subset)
    _require(bool(changed), where, "no changed judgements (qrel_diff)", fix)
    # p-MRR compares the ranks of both queries of a pair.
    unpaired = [q for q in changed if not {f"{q}-og", f"{q}-changed"} <= queries]
    missing = f"queries {unpaired[:3]} of qrel_diff lack an -og or -changed twin"
    _require(not unpaired, where, missing, fix)


def changed_judgements(task: Any, subset: str) -> dict[str, list[str]]:
    """Return the documents that become irrelevant when a base query's instruction changes.

    Only FollowIR has such judgements, and mFollowIR for each language.
    """
    source = task.metadata.dataset
    # English queries on another language share that language's judgements: eng-fas and fas.
    language = "" if subset == "default" else f"-{subset.removeprefix('eng-')}"
    try:
        rows = datasets.load_dataset(
            source["path"], f"qrel_diff{language}", split="qrel_diff", revision=source["revision"]
        )
    except (ValueError, FileNotFoundError) as error:
        raise UserError(
            f"{task.metadata.name}: no changed judgements (qrel_diff): {error}", fix=_fix_of(task)
        ) from error
    return {row["query-id"]: list(row["corpus-ids"]) for row in rows}


def load_texts(
    name: str, *, snapshots: Path | None, own: OwnTask | None = None
) -> tuple[list[str], list[str]]:
    """Return every document and every query of a task, as scoring will embed them.

    Raises:
        UserError: the task's data are missing or incomplete.
    """
    documents: list[str] = []
    queries: list[str] = []
    with tempfile.TemporaryDirectory(prefix="diffembed-") as scratch, private_cache(Path(scratch)):
        task = localise(get_task(name, own), snapshots)
        if name in _BRIGHT_TASKS:
            # By column: mteb goes through 1.3 million documents row by row.
            with blame(_cannot_load(task), fix=_fix_of(task)):
                splits = [_load_bright(task, fix=_fix_of(task))]
            _check_split(name, splits[0], _fix_of(task), rows=splits[0])
        else:
            load_and_check(task)
            splits = [data for _, _, data in evaluated_splits(task)]
        for data in splits:
            documents += document_texts(data["corpus"])
            queries += query_texts(data["queries"])
    return documents, queries


@contextlib.contextmanager
def private_cache(folder: Path) -> Iterator[None]:
    """Let `datasets` keep its converted files in `folder`.

    Array elements must not share a cache: its locks fail in a read-only home, and a converted file
    may outlive the snapshot that it came from.
    """
    saved = datasets.config.HF_DATASETS_CACHE
    shown = datasets.are_progress_bars_disabled()
    # A variable of the module: `datasets` reads its environment only at import.
    datasets.config.HF_DATASETS_CACHE = folder
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = saved
        if not shown:
            datasets.enable_progress_bars()


# BRIGHT's repositories also hold queries rewritten by other models, which no task reads.
_BRIGHT_FILES = ["README.md", "documents/*", "long_documents/*", "examples/*"]
_PATTERNS = {"mteb/BRIGHT": _BRIGHT_FILES, "xlangai/BRIGHT": _BRIGHT_FILES}


def prefetch(config: EvaluateConfig, *, endpoint: str | None = None) -> Path:
    """Fetch every task's data set at the revision that mteb pins, and check that it is complete.

    Data sets that were fetched at that revision are kept, so that a second run continues. The data
    of own tasks are only checked.

    Args:
        endpoint: address of another hub than the configured one.

    Returns:
        The folder of snapshots.

    Raises:
        UserError: `snapshots` is not set or cannot be written, or the hub cannot be reached.
    """
    check_names(config)
    if config.snapshots is None:
        raise UserError("snapshots: not set", fix="name the folder for the data sets")
    require_writable(config.snapshots, key="snapshots")
    tasks = [get_task(name, own) for name, own in tasks_of(config).items()]
    # A set, because tasks share data sets: all of BRIGHT is one.
    sources = {
        (source["path"], source["revision"])
        for source in (task.metadata.dataset for task in tasks)
        if source["revision"] != LOCAL_REVISION
    }
    for number, (repository, revision) in enumerate(sorted(sources), start=1):
        print(f"data set {number}/{len(sources)}: {repository} at {revision[:12]}", flush=True)
        _fetch(config.snapshots / repository, repository, revision, endpoint)
    for task in tasks:
        with tempfile.TemporaryDirectory() as scratch, private_cache(Path(scratch)):
            load_and_check(localise(task, config.snapshots))
        print(f"{task.metadata.name}: complete", flush=True)
    return config.snapshots


def _fetch(folder: Path, repository: str, revision: str, endpoint: str | None) -> None:
    marker = folder / REVISION_FILE
    if marker.is_file() and marker.read_text().strip() == revision:
        return
    # Not whole while it is replaced.
    marker.unlink(missing_ok=True)
    try:
        snapshot_download(
            repository,
            repo_type="dataset",
            revision=revision,
            local_dir=folder,
            allow_patterns=_PATTERNS.get(repository),
            endpoint=endpoint,
        )
    except OSError as error:  # HfHubHTTPError and LocalEntryNotFoundError are, too
        raise UserError(
            f"{repository} at {revision[:12]}: {str(error).splitlines()[0]}",
            fix="run this on a machine that reaches the hub",
        ) from error
    # Last: its presence means that the snapshot is whole.
    write_text(marker, revision + "\n")
