"""List the elements of an evaluation, word its queries, and read own tasks; without mteb.

    config --> tasks_of --> list_elements: one `Element` per model, task and length, in this order:

        index   model   task                     max_length
        0       weak    BrightAopsRetrieval      4096
        1       weak    LEMBPasskeyRetrieval      512
        2       weak    LEMBPasskeyRetrieval     4096
        3       strong  BrightAopsRetrieval      4096

Instructions come only from here: mteb falls back to one default instruction, and applies it to
documents as well, so that scores drop without any message.
"""

from __future__ import annotations

import atexit
import dataclasses
import difflib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import EvaluateConfig, EvaluatedModel, OwnTask, SourceConfig
from pipeline.data.sources.containers import read_file
from pipeline.data.sources.corpus import (
    documents_of,
    identifier,
    judgement_files,
    judgement_records,
    split_part,
)
from pipeline.data.sources.records import (
    BadRecords,
    BadRowError,
    Record,
    require_whole_characters,
)
from pipeline.errors import UserError

# The folder that mteb creates when it is imported; this package keeps nothing there.
_CACHE = "MTEB_CACHE"
# The revision of data in a local folder, in metadata and results; data of the hub have a commit.
LOCAL_REVISION = "local"


@functools.lru_cache(maxsize=1)
def load_mteb() -> Any:
    """Import mteb, also if the home folder is missing or read-only, as on many compute nodes."""
    if _CACHE not in os.environ:
        try:
            Path.home().joinpath(".cache", "mteb").mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # RuntimeError: no home folder is known
            folder = tempfile.mkdtemp(prefix="diffembed-mteb-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            os.environ[_CACHE] = folder
    import mteb

    return mteb


_BRIGHT_TOPICS = (
    "Biology",
    "EarthScience",
    "Economics",
    "Psychology",
    "Robotics",
    "Stackoverflow",
    "SustainableLiving",
    "Pony",
)
# Names and tasks of mteb's benchmarks; a test compares them. The two BRIGHT entries split mteb's
# `BRIGHT(v1.1)`, whose standard and long halves have different metrics.
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "FollowIR": (
        "Robust04InstructionRetrieval",
        "News21InstructionRetrieval",
        "Core17InstructionRetrieval",
    ),
    "LongEmbed": (
        "LEMBNarrativeQARetrieval",
        "LEMBNeedleRetrieval",
        "LEMBPasskeyRetrieval",
        "LEMBQMSumRetrieval",
        "LEMBSummScreenFDRetrieval",
        "LEMBWikimQARetrieval",
    ),
    "BRIGHT": (
        *(f"Bright{topic}Retrieval" for topic in _BRIGHT_TOPICS),
        "BrightLeetcodeRetrieval",
        "BrightAopsRetrieval",
        "BrightTheoremQATheoremsRetrieval",
        "BrightTheoremQAQuestionsRetrieval",
    ),
    "BRIGHT-long": tuple(f"Bright{topic}LongRetrieval" for topic in _BRIGHT_TOPICS),
    # Only for comparison with old tables: its excluded documents are not excluded.
    "BRIGHT-v1": ("BrightRetrieval",),
    "BRIGHT-v1-long": ("BrightLongRetrieval",),
}


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Return task names in order, with benchmarks replaced by their tasks, each task once."""
    tasks: dict[str, None] = {}
    for name in names:
        tasks.update(dict.fromkeys(BENCHMARKS.get(name, (name,))))
    return tuple(tasks)


def benchmark_of(task: str) -> str:
    """Return the benchmark of a task; `other` for all other tasks."""
    for benchmark, tasks in BENCHMARKS.items():
        if task in tasks:
            return benchmark
    return "other"


DEFAULT_INSTRUCTION = "Retrieve text based on user query"
_POST = "Given a {} post, retrieve passages that help answer it"
_BRIGHT = {
    "Biology": _POST.format("Biology"),
    "EarthScience": _POST.format("Earth Science"),
    "Economics": _POST.format("Economics"),
    "Psychology": _POST.format("Psychology"),
    "Robotics": _POST.format("Robotics"),
    "Stackoverflow": _POST.format("Stack Overflow"),
    "SustainableLiving": _POST.format("Sustainable Living"),
    "Pony": "Given a question about the Pony language, retrieve documentation that helps answer it",
    "Leetcode": "Given a coding problem, retrieve problems that are solved by the same method",
    "Aops": "Given a math problem, retrieve problems that are solved by the same method",
    "TheoremQATheorems": "Given a math problem, retrieve theorems that help solve it",
    "TheoremQAQuestions": "Given a math problem, retrieve problems solved by the same theorem",
}
# Long and short halves of a topic share their questions, and so their instruction.
_BRIGHT_INSTRUCTIONS = {
    task: _BRIGHT[task.removeprefix("Bright").removesuffix("Retrieval").removesuffix("Long")]
    for benchmark in ("BRIGHT", "BRIGHT-long")
    for task in BENCHMARKS[benchmark]
}
# By task, or by benchmark for all its tasks.
INSTRUCTIONS: dict[str, str] = {
    **_BRIGHT_INSTRUCTIONS,
}
# The published sentences of arXiv 2505.15045 (appendix D.2), letter by letter, misprints included:
# they made its tables. Its other tasks have none, and get the default with a colon.
_PAPER_DEFAULT = "Retrieve text based on user query:"
_PAPER_POST = "Given a {}, retrieve relevant passages that help answer the {}:"
_PAPER_BRIGHT = {
    "Biology": _PAPER_POST.format("biology post", "post"),
    "Economics": _PAPER_POST.format("economics post", "post"),
    "Stackoverflow": _PAPER_POST.format("post", "post"),
    "Pony": _PAPER_POST.format("Pony question", "question"),
    "Leetcode": "Given a coding problem, retrieve the relevant problems that can be solved by the "
    "similar algorithms or data structures:",
    "Aops": "Given a problem, rretrieve the relevant problems that can be solved by the similar "
    "math theorems:",
    "TheoremQATheorems": "Given a problem, retrieve the relevant theorems that help solve the "
    "given problem:",
    "TheoremQAQuestions": "Given a problem, retrieve the relevant problems that can be solved by "
    "the similar theorems:",
}
PAPER_INSTRUCTIONS: dict[str, str] = {
    "BrightRetrieval": "Given a problem, retrieve solutions to other problems that use the same "
    "method as the correct solution to the given question:",
    **{f"Bright{topic}Retrieval": text for topic, text in _PAPER_BRIGHT.items()},
}
_INSTRUCTION_SETS = {
    "diffembed": (INSTRUCTIONS, DEFAULT_INSTRUCTION),
    "paper": (PAPER_INSTRUCTIONS, _PAPER_DEFAULT),
}


def instruction_for(task: str, model: EvaluatedModel, config: EvaluateConfig) -> str:
    """Return the instruction of a task's queries for a model.

    The model's `instructions` win over the config's, and these over the model's set; an instruction
    may be empty. FollowIR's own instructions are part of each query's text, behind this one.
    """
    table, default = _INSTRUCTION_SETS[model.instruction_set]
    for given in (model.instructions, config.instructions, table):
        for name in (task, benchmark_of(task)):
            if name in given:
                return given[name]
    return default


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Element:
    """One element of the job array; `own` is its task's folder, unless it is a task of mteb."""

    index: int
    model: EvaluatedModel
    task: str
    max_length: int
    folder: Path
    own: OwnTask | None = None

    @property
    def result_path(self) -> Path:
        """Return the path of the result, which is written last: finished elements have it."""
        return self.folder / "result.json"


def lengths_of(config: EvaluateConfig, task: str) -> tuple[int, ...]:
    """Return the maximum lengths of a task: its own, else its benchmark's, else the config's."""
    for name in (task, benchmark_of(task)):
        if name in config.lengths:
            return config.lengths[name]
    return (config.max_length,)


def tasks_of(config: EvaluateConfig) -> dict[str, OwnTask | None]:
    """Return all tasks in order, with benchmarks replaced by their tasks; None for tasks of mteb.

    Raises:
        UserError: an own task has the name of a benchmark or of one of its tasks.
    """
    tasks: dict[str, OwnTask | None] = {}
    for task in config.tasks:
        if isinstance(task, str):
            # A task that is named twice is scored once.
            tasks.update(dict.fromkeys(expand([task])))
        elif task.name in BENCHMARKS or benchmark_of(task.name) != "other":
            raise UserError(f"tasks: {task.name!r} is a name of mteb", fix="give it another name")
        else:
            tasks[task.name] = task
    return tasks


def check_names(config: EvaluateConfig) -> None:
    """Refuse lengths and instructions for tasks that are not evaluated.

    Raises:
        UserError: a key is not an evaluated task or benchmark, most likely because of a typo.
    """
    tasks = tasks_of(config)
    benchmarks = [name for name in BENCHMARKS if any(benchmark_of(task) == name for task in tasks)]
    allowed = [*tasks, *benchmarks]
    _refuse_unknown("lengths", config.lengths, allowed)
    _refuse_unknown("instructions", config.instructions, allowed)
    for number, model in enumerate(config.models):
        _refuse_unknown(f"models.{number}.instructions", model.instructions, allowed)


def _refuse_unknown(key: str, names: Iterable[str], allowed: list[str]) -> None:
    for name in names:
        if name not in allowed:
            similar = difflib.get_close_matches(name, allowed, n=1)
            raise UserError(
                f"{key}: {name!r} is not evaluated",
                allowed=", ".join(allowed),
                fix=f"write {similar[0]}" if similar else f"remove it, or add {name} to tasks",
            )


def list_elements(config: EvaluateConfig) -> tuple[Element, ...]:
    """Return all elements in array order: model by model, task by task, length by length.

    Raises:
        UserError: lengths or instructions are given for a task that is not evaluated.
    """
    check_names(config)
    tasks = tasks_of(config)
    triples = [
        (model, task, length)
        for model in config.models
        for task in tasks
        for length in lengths_of(config, task)
    ]
    return tuple(
        Element(
            index=index,
            model=model,
            task=task,
            max_length=length,
            folder=config.output_dir / "results" / model.name / task / str(length),
            own=tasks[task],
        )
        for index, (model, task, length) in enumerate(triples)
    )


def element_at(config: EvaluateConfig, index: int) -> Element:
    """Return the element with an index.

    Raises:
        UserError: no element has it; the array was started for another config.
    """
    elements = list_elements(config)
    if not 0 <= index < len(elements):
        raise UserError(
            f"evaluation element {index}",
            allowed=f"0 to {len(elements) - 1} ({len(config.models)} models x "
            f"{len(elements) // len(config.models)} tasks and lengths)",
            fix="start the array with the length that `diffembed evaluate count` prints",
        )
    return elements[index]


def make_task(own: OwnTask) -> Any:
    """Return a task that mteb scores like its own: nDCG@10 over all queries with judgements."""
    mteb = load_mteb()
    from mteb.abstasks import AbsTaskRetrieval

    # mteb keeps metadata on the class, so that every own task is a class.
    class FolderTask(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = mteb.TaskMetadata(
            name=own.name,
            description=f"Retrieval of the documents in {own.path}.",
            dataset={"path": str(own.path), "revision": LOCAL_REVISION},
            type="Retrieval",
            category="t2t",
            eval_splits=[own.split],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            self.dataset = {"default": {own.split: read_split(own)}}
            self.data_loaded = True

    return FolderTask()


def read_split(own: OwnTask) -> dict[str, Any]:
    """Read corpus, queries and judgements in the form of mteb's splits.

    As in mteb's own tasks, queries without judgements do not count; their number is printed.

    Raises:
        UserError: a file is missing or damaged, or no query has judgements; names file and line.
    """
    # Slow to import, and not needed to list elements.
    from datasets import Dataset

    source = SourceConfig(name=own.name, format="mteb", path=str(own.path), split=own.split)
    bad = BadRecords(f"tasks.{own.name}")
    try:
        corpus = _distinct(documents_of(split_part(source, "corpus"), bad.add), bad)
        queries = _distinct_queries(_records(split_part(source, "queries"), bad), bad)
        judged = _judgements(judgement_files(source), bad)
        # Queries without judgements are left out, whatever they hold.
        for name, record in queries.items():
            if name in judged:
                _check_query(record, bad)
        # Parts of the hub's layout that re-ranking and instructed tasks have.
        files = split_part(source, "instruction", required=False)
        instructions = _of_queries(files, "instruction", _text_or_none, bad)
        files = split_part(source, "top_ranked", required=False)
        candidates = _of_queries(files, "corpus-ids", _ids_of(corpus), bad)
        bad.refuse()
    except UserError as error:
        # The readers name a source, but the user wrote a task.
        found = error.found.replace(f"sources.{own.name}", f"tasks.{own.name}")
        raise UserError(found, allowed=error.allowed, fix=error.fix) from error
    relevant = {query: documents for query, documents in judged.items() if query in queries}
    if not relevant:
        raise UserError(
            f"tasks.{own.name}: no query of {own.path} has judgements in split {own.split!r}",
            fix="check the ids in queries and qrels, or give the task another split",
        )
    _report_left_out(own, queries, judged)
    # mteb expects judgements for every query.
    scored = {query: record for query, record in queries.items() if query in relevant}
    return {
        "corpus": Dataset.from_dict({"id": list(corpus), "text": list(corpus.values())}),
        "queries": Dataset.from_dict(_query_columns(scored, instructions)),
        "relevant_docs": relevant,
        "top_ranked": candidates,
    }


def _judgements(files: list[str], bad: BadRecords) -> dict[str, dict[str, int]]:
    judged: dict[str, dict[str, int]] = {}
    for record, query, document, score in judgement_records(tuple(files), bad.add):
        # trec_eval takes only whole grades.
        if not float(score).is_integer():
            allowed = "a whole number; documents above 0 are relevant"
            bad.add(record.fail(f"score {score}", allowed=allowed))
        elif judged.setdefault(query, {}).setdefault(document, int(score)) != score:
            found = f"query {query!r} and document {document!r} have another score before"
            bad.add(record.fail(found, allowed="one score per pair"))
    return judged


def _distinct(documents: Iterator[tuple[str, str, Record]], bad: BadRecords) -> dict[str, str]:
    """Return texts by id; a document with the id of another one is bad."""
    corpus: dict[str, str] = {}
    for name, text, record in documents:
        if corpus.setdefault(name, text) != text:
            found = f"an earlier document has the id {name!r}"
            bad.add(record.fail(found, allowed="one id per document"))
    return corpus


def _distinct_queries(records: Iterator[Record], bad: BadRecords) -> dict[str, Record]:
    """Return records by id; a query without an id, or with the id of another one, is bad."""
    queries: dict[str, Record] = {}
    for record in records:
        try:
            # Repeated rows are harmless; another text under the same id is not.
            first = queries.setdefault(name := identifier(record), record)
        except BadRowError as fault:
            bad.add(fault)
            continue
        if _query_of(first) != _query_of(record):
            found = f"an earlier query has the id {name!r}"
            bad.add(record.fail(found, allowed="one id per query"))
    return queries


def _check_query(record: Record, bad: BadRecords) -> None:
    text, instruction = _query_of(record)
    try:
        if not isinstance(text, str):
            raise record.fail("no text", allowed="a text in the field text or query")
        require_whole_characters(record, identifier(record), text, str(instruction))
    except BadRowError as fault:
        bad.add(fault)


def _query_of(record: Record) -> tuple[object, object]:
    """Return the text and the instruction of a query."""
    value = record.value
    return value.get("text", value.get("query")), value.get("instruction")


def _records(files: list[str], bad: BadRecords) -> Iterator[Record]:
    for file in files:
        yield from read_file(file, split=None, on_bad=bad.add)


def _of_queries(
    files: list[str], field: str, read: Callable[[Any], Any], bad: BadRecords
) -> dict[str, Any] | None:
    """Return a field by query id; None without files.

    Args:
        read: returns the field's value; raises ValueError with what is allowed.
    """
    if not files:
        return None
    found: dict[str, Any] = {}
    for record in _records(files, bad):
        try:
            query, value = str(record.value["query-id"]), read(record.value.get(field))
            require_whole_characters(record, query, str(value))
        except KeyError:
            bad.add(record.fail("no query-id", fix=record.fields_found))
        except BadRowError as fault:
            bad.add(fault)
        except ValueError as error:
            bad.add(record.fail(f"{field}: {record.value.get(field)!r:.80}", allowed=str(error)))
        else:
            if found.setdefault(query, value) != value:
                again = f"an earlier record has another {field} for the query {query!r}"
                bad.add(record.fail(again, allowed="one per query"))
    return found


def _text_or_none(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError("a text")


def _ids_of(corpus: Container[str]) -> Callable[[Any], list[str]]:
    def read(value: Any) -> list[str]:
        if not isinstance(value, list) or not all(str(each) in corpus for each in value):
            raise ValueError("a list of ids of documents in the corpus")
        return [str(each) for each in value]

    return read


def _query_columns(
    queries: dict[str, Record], given: Mapping[str, str | None] | None
) -> dict[str, list[Any]]:
    """Return ids and texts, and the queries' own instructions if there are any.

    Args:
        queries: with an instruction in the record itself.
        given: instructions of a separate part, which come first.
    """
    texts, instructions = zip(*map(_query_of, queries.values()), strict=True)
    if given is not None:
        instructions = tuple(map(given.get, queries, instructions))
    columns = {"id": list(queries), "text": list(texts)}
    # With empty instructions, `query_texts` would put a space behind each text.
    if any(instructions):
        columns["instruction"] = list(instructions)
    return columns


def _report_left_out(own: OwnTask, queries: dict[str, Record], judged: dict[str, Any]) -> None:
    counts = {
        "queries without judgements, left out": len(queries.keys() - judged.keys()),
        "judged queries without text, left out": len(judged.keys() - queries.keys()),
    }
    for kind, count in counts.items():
        if count:
            print(f"{own.name}: {kind}: {count}", flush=True)
