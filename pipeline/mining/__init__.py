"""Mine hard negatives: a folder of shards and retrievers in, another folder of shards out.

    step      tasks               a query on its way
    ----      -----               ------------------
    corpora   1                   documents of further corpora are tokenised and numbered
    texts     blocks              [31, 4, 8] -> "how to reset?", "Find the answer"
    check     1                   refuse texts that a retriever would read differently
    known     1                   all positives of this query, in any example
    sets      1                   n-grams of the evaluation sets
    marks     document blocks     signature of each document; in an evaluation set or not
    index     BM25 retrievers     words of all documents
    embed     blocks, retrievers  one vector each
    faiss     retrievers with index   its index of all documents' vectors
    search    query blocks, retrievers   documents 17, 4, 93, ... and their scores
    recall    retrievers with index   share of the exact documents that the index finds
    levels    1                   percentiles of all positives' scores, for margins
    pick      query blocks        17 is a positive, 4 is above the margin, 93 is kept
    teach     blocks              the teacher's vectors, if it is a bi-encoder
    score     query blocks        the teacher gives 93 a score of 0.2
    write     example shards      negatives [93, ...], scores [0.9, 0.2, ...]
    vectors   shards              the teacher's vectors, row by row
    complete  1                   documents by link, audit, manifest

plan.py names every file by what it was computed from. A task's output appears by rename, and a task
whose output exists is not run again: a killed mining continues, and one with other settings starts
where they matter. The bytes depend neither on the number of workers nor on interruptions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.config import BM25, MineConfig
from pipeline.data.manifest import FILE_NAME, LengthHistogram, Manifest, holds_dataset
from pipeline.data.shards import AUDIT_NAME, Dataset
from pipeline.errors import UserError
from pipeline.evaluation.models import num_parameters, processes_here
from pipeline.files import require_writable, resolve_target, write_json, write_sealed
from pipeline.mining import approximate, pick, retrieve, teacher, texts, write
from pipeline.mining.plan import (
    CorpusReport,
    MinePlan,
    Mining,
    find_change,
    is_bm25,
    is_mined,
    local_folder,
    plan_mining,
)
from pipeline.tokenizer import load_tokenizer, tokenizer_fingerprint
from pipeline.workers import Workers, build_alone


class Step(NamedTuple):
    """A step: its name, its work on one task, and the output of each task.

    A step that the config does not need has no outputs, and so no tasks.
    """

    name: str
    work: Callable[[Mining, int], None]
    outputs: Callable[[Mining], list[Path]]


def _texts(mining: Mining) -> list[Path]:
    # The file that a task writes last.
    return [mining.texts(role, k).with_suffix(".npz") for role, k in mining.text_blocks]


def _sets(mining: Mining) -> list[Path]:
    if mining.config.decontaminate is None:
        return []
    return [mining.store("marks") / "contamination" / "index.json"]


def _vectors(mining: Mining) -> list[Path]:
    plan = mining.plan
    tasks = retrieve.embedding_tasks(mining)
    return [mining.vectors(plan.retrievers[number], role, k) for number, role, k in tasks]


def _taught(mining: Mining) -> list[Path]:
    model = mining.plan.teacher
    tasks = teacher.embedding_tasks(mining)
    return [mining.vectors(model, role, k) for role, k in tasks] if model else []


def _of_queries(kind: str) -> Callable[[Mining], list[Path]]:
    return lambda mining: [mining.block_file(kind, k) for k in range(len(mining.query_blocks))]


# In an order in which each finds the files that it reads.
STEPS = (
    Step("corpora", texts.read_corpora, lambda m: [m.store("texts") / "corpora.json"]),
    Step("texts", texts.restore_texts, _texts),
    Step("check", lambda m, _: _check_inputs(m), lambda m: [m.building / "checked.json"]),
    Step("known", texts.list_known, lambda m: [m.store("texts") / "known.npz"]),
    Step("sets", texts.index_evaluation_sets, _sets),
    Step(
        "marks",
        texts.mark_documents,
        lambda m: [m.marks(k) for k in range(len(m.document_blocks))],
    ),
    Step(
        "index",
        retrieve.index_words,
        lambda m: [retrieve.bm25_index(m, k) for k in retrieve.bm25_retrievers(m)],
    ),
    Step("embed", retrieve.embed_retriever_block, _vectors),
    Step("faiss", retrieve.index_vectors, approximate.index_records),
    Step(
        "search",
        retrieve.search_block,
        # As `search_block` divides its task: all blocks of the first retriever, then of the next.
        lambda m: [
            m.block_file("found", k, number)
            for number in range(len(m.config.retrievers))
            for k in range(len(m.query_blocks))
        ],
    ),
    Step("recall", retrieve.compare_searches, approximate.recall_files),
    Step("levels", pick.measure_levels, lambda m: [m.store("picked") / "levels.json"]),
    Step("pick", pick.pick_block, _of_queries("picked")),
    Step("teach", teacher.embed_teacher_block, _taught),
    Step(
        "score",
        teacher.score_block,
        lambda m: _of_queries("teacher")(m) if m.config.teacher else [],
    ),
    Step(
        "write",
        write.write_shard,
        lambda m: [m.summary("examples", k) for k in range(len(m.source.manifest.example_shards))],
    ),
    Step(
        "vectors",
        write.write_vectors,
        lambda m: [m.summary("vectors", k) for k in range(len(write.vector_tasks(m)))],
    ),
    Step("complete", write.complete, lambda m: [m.building / "dataset" / FILE_NAME]),
)


def mine(config: MineConfig, *, num_workers: int | None = None) -> Path:
    """Write the mined dataset of a config, alone or as one rank of an MPI job or Slurm step.

    After an interruption at any point, the same call continues. A folder that is already complete
    for the same data, models and settings stays untouched.

    Args:
        config: data, retrievers, rules and output.
        num_workers: processes when no launcher started this one; by default one per GPU, or as many
            as the cores and the memory allow.

    Returns:
        The dataset folder.

    Raises:
        UserError: the data, a model, a rule or the output folder is not usable.
    """
    mining = Mining(config)
    target = resolve_target(config.output, key="output")
    # By the main worker alone, and once: it reads the inputs.
    plan = functools.cache(functools.partial(plan_mining, config))
    with build_alone(
        target,
        key="output",
        num_workers=num_workers or _num_processes(config),
        is_done=lambda: _is_done(mining, plan(), target),
        start=lambda: _start_or_continue(mining, plan(), target),
        say=_say,
    ) as workers:
        # Without a plan the dataset was already complete.
        if mining.plan_path.exists():
            _run_steps(workers, mining)
            if workers.is_main:
                _finish(mining)
    return config.output


def _num_processes(config: MineConfig) -> int | None:
    """Return how many processes the memory of the models allows; None without any: all cores."""
    folders = [
        Path(local_folder(r.path, key="retrievers")) for r in config.retrievers if not is_bm25(r)
    ]
    if config.teacher is not None and config.teacher.path is not None:
        folders.append(Path(local_folder(config.teacher.path, key="teacher.path")))
    return processes_here(folders) if folders else None


def _say(text: str) -> None:
    print(f"mine: {text}", file=sys.stderr, flush=True)


def _is_done(mining: Mining, plan: MinePlan, target: Path) -> bool:
    """Return whether the output holds the dataset of this plan.

    Raises:
        UserError: it holds something else.
    """
    config = mining.config
    if not holds_dataset(target, key="output"):
        return False
    # Every byte: "complete" must not be said of a folder that is damaged.
    manifest = Dataset.open(target, verify=True).manifest
    if manifest.recipe == plan.result:
        # Left by a process that was killed between its last steps.
        write.remove_rest(mining)
        print(f"{config.output} is complete: {_describe(manifest)}", flush=True)
        return True
    raise UserError(
        f"output: {target} holds {find_change(config, plan, manifest)}",
        fix="choose another output, or remove it; finished work in the store is used again",
    )


def _start_or_continue(mining: Mining, plan: MinePlan, target: Path) -> None:
    """Keep the unfinished folder of the same plan, or start another one.

    Do neither if another process has finished the dataset in the meantime.
    """
    if _is_done(mining, plan, target):
        return
    # Hashed here, once: later steps map the shards in every process without hashing them.
    Dataset.open(mining.config.data, verify=True)
    require_writable(mining.config.store_folder, key="store")
    # Claims of killed ranks would keep their tasks from ever being done.
    shutil.rmtree(mining.building / "claims", ignore_errors=True)
    if mining.plan_path.exists():
        # A plan that is damaged, or from an earlier version, is replaced like another one.
        with contextlib.suppress(UserError):
            if mining.plan == plan:
                return
        # Cached by the comparison: the steps would work by the plan that is replaced.
        mining.__dict__.pop("plan", None)
    shutil.rmtree(mining.building, ignore_errors=True)
    write_sealed(mining.plan_path, dataclasses.asdict(plan))


def _run_steps(workers: Workers, mining: Mining) -> None:
    try:
        for step in STEPS:
            # Listed only now: there is no number of blocks before the corpora are read.
            outputs = step.outputs(mining)
            missing = sum(not path.exists() for path in outputs)
            started = time.monotonic()
            workers.run(
                functools.partial(_do, step.name, mining),
                outputs,
                claims=mining.building / "claims" / step.name,
            )
            if workers.is_main and missing:
                seconds = time.monotonic() - started
                _say(f"{step.name}: {missing} of {len(outputs)} parts, {seconds:.1f} s")
        if workers.is_main:
            for name, recall in approximate.read_recalls(mining).items():
                _say(f"the index of {name} finds {recall}")
    except Exception:
        _say(f"finished work is kept in {mining.config.store_folder}; the same command continues")
        raise


def _do(name: str, mining: Mining, task: int) -> None:
    """Do one task; by the name of its step, whose lambdas no child process could unpickle."""
    next(step for step in STEPS if step.name == name).work(mining, task)


def _check_inputs(mining: Mining) -> None:
    """Refuse a window behind all documents, and texts that are not as they were prepared."""
    first = mining.config.window.first
    if first > mining.num_documents:
        raise UserError(
            f"window.first: {first:,}, but there are {mining.num_documents:,} documents: the "
            "window is empty",
            fix="lower window.first, or add documents by corpora",
        )
    counts = texts.count_states(mining)
    inexact = counts.same_tokens + counts.changed
    if inexact and mining.config.texts == "exact":
        if counts.changed:
            raise UserError(
                f"texts: {counts.changed:,} texts cannot be restored from the tokens of "
                f"{mining.config.data}: decoding loses characters",
                fix="set texts: decoded to search with the decoded texts",
            )
        _require_same_tokenizer(mining, inexact)
    # With the shards and not in the store: another config of the same texts has other models.
    write_json(mining.building / "checked.json", dataclasses.asdict(counts))


def _require_same_tokenizer(mining: Mining, inexact: int) -> None:
    """Refuse models that would read more than the dataset's tokenizer has kept of its texts.

    Args:
        mining: the mining.
        inexact: number of texts that have the tokens of the prepared ones, but other characters.

    Raises:
        UserError: names the first model with another tokenizer.
    """
    own = mining.source.tokenizer
    names = [retriever.name for retriever in mining.config.retrievers]
    folders = [model.folder for model in mining.plan.retrievers]
    teacher = mining.config.teacher
    # An endpoint's tokenizer is not on this machine.
    if teacher is not None and teacher.path is not None and mining.plan.teacher is not None:
        names.append("teacher")
        folders.append(mining.plan.teacher.folder)
    for name, folder in zip(names, folders, strict=True):
        # BM25 drops case and spaces itself.
        if folder != BM25 and tokenizer_fingerprint(load_tokenizer(folder)) != own.fingerprint:
            raise UserError(
                f"texts: the tokenizer {own.path} of the dataset drops case or spaces ({inexact:,} "
                f"texts), which the tokenizer of {name!r} would see",
                fix="set texts: decoded to search with the decoded texts, or take a model with "
                "the dataset's tokenizer",
            )


def _finish(mining: Mining) -> None:
    """Give the dataset its final name, unless an input has changed in the meantime."""
    if plan_mining(mining.config) != mining.plan:
        raise UserError(
            "the data, a corpus or a model changed while it was mined", fix="run the command again"
        )
    manifest = write.publish(mining)
    print(f"{mining.config.output}: {_describe(manifest)}", flush=True)


def _describe(manifest: Manifest) -> str:
    return (
        f"{manifest.num_examples:,} examples in {len(manifest.example_shards)} shards, "
        f"{manifest.num_documents:,} documents -> {AUDIT_NAME}"
    )


# --- estimate: computes and writes nothing -----------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The size of a mining.

    Attributes:
        documents: texts and tokens to search.
        queries: the same of the examples.
        unread: corpora that no earlier mining has read; their documents come in addition.
    """

    documents: LengthHistogram
    queries: LengthHistogram
    unread: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens that every embedder reads."""
        return self.documents.tokens + self.queries.tokens


def describe_mining(config: MineConfig) -> str:
    """Return what each step would compute, and how much of it the store holds already.

    Raises:
        UserError: the data, a model or the output is not usable.
    """
    if is_mined(config):
        return f"{config.output} is complete: nothing to do"
    mining = plan_only(config)
    work = _measure(mining)
    lines = [
        f"{config.data}: {work.queries.texts:,} queries of {work.queries.tokens:,} tokens, "
        f"{work.documents.texts:,} documents of {work.documents.tokens:,} tokens",
        *(f"corpora.{name}: not read yet, its documents come in addition" for name in work.unread),
        "",
        _row("step", "parts", "in store", "work"),
        *_rows(mining, work),
    ]
    return "\n".join(lines)


def plan_only(config: MineConfig) -> Mining:
    """Return a mining whose plan is in memory alone."""
    mining = Mining(config)
    # In place of the cached properties, which would read files that do not exist yet.
    vars(mining)["plan"] = plan_mining(config)
    if not (mining.store("texts") / "corpora.json").is_file():
        nothing = LengthHistogram.of(np.empty(0, np.int64), 1)
        vars(mining)["corpora"] = CorpusReport(shards=(), lengths=nothing, read={}, repeated={})
    return mining


def _measure(mining: Mining) -> Work:
    manifest, known = mining.source.manifest, mining.corpora.read
    return Work(
        documents=manifest.document_lengths.plus(mining.corpora.lengths),
        queries=manifest.query_lengths,
        unread=tuple(c.name for c in mining.config.corpora if c.name not in known),
    )


def _rows(mining: Mining, work: Work) -> Iterator[str]:
    continues = _is_current(mining)
    for step in STEPS:
        outputs = step.outputs(mining)
        # What lies in the folder of another plan's shards is removed at the start.
        kept = [p for p in outputs if continues or not p.is_relative_to(mining.building)]
        done = sum(path.exists() for path in kept)
        if outputs:
            sizes = (f"{len(outputs):,}", f"{done:,}")
            yield _row(step.name, *sizes, _work_of(step.name, mining, work))


def _row(step: str, parts: str, done: str, work: str) -> str:
    return f"{step:<8} {parts:>7} {done:>8}  {work}".rstrip()


def _is_current(mining: Mining) -> bool:
    try:
        # Read from disk by a new `Mining`: this one has its plan in memory.
        return bool(Mining(mining.config).plan == mining.plan)
    except UserError:
        return False


def _work_of(step: str, mining: Mining, work: Work) -> str:
    config, documents, queries = mining.config, work.documents.texts, work.queries.texts
    embedders = [r for r in config.retrievers if not is_bm25(r)]
    teacher = config.teacher
    match step:
        case "texts":
            return f"{work.tokens:,} tokens to text"
        case "marks":
            return f"signatures of {documents:,} documents"
        case "index":
            return f"words of {documents:,} documents"
        case "embed":
            return "; ".join(
                _forward(r.name, local_folder(r.path, key="retrievers"), work.tokens)
                for r in embedders
            )
        case "faiss":
            return f"vectors of {documents:,} documents"
        case "search":
            exact = len(config.retrievers) - len(approximate.indexed_retrievers(config))
            words = f"{exact * queries * documents:,} scores of pairs" if exact else "by an index"
            return f"{words}, the best {config.depth:,} of each query"
        case "recall":
            return "a sample of the queries, by all pairs"
        case "pick":
            return f"at most {config.num_kept:,} candidates of each of {queries:,} queries"
        case "teach" if teacher is not None and teacher.path is not None:
            return _forward("teacher", local_folder(teacher.path, key="teacher.path"), work.tokens)
        case "score" if teacher is not None:
            return _scored(mining)
        case "write":
            return f"{queries:,} examples"
    return ""


def _forward(name: str, folder: str, tokens: int) -> str:
    """Describe one forward of all texts: two operations for each weight and token."""
    weights = num_parameters(Path(folder))
    return (
        f"{name}: {tokens:,} tokens through {weights / 1e6:,.0f} million weights, at most "
        f"{2 * weights * tokens / 1e12:,.1f} TFLOP"
    )


def _scored(mining: Mining) -> str:
    """Count the pairs of query and document that the teacher scores."""
    examples = mining.source.examples
    ids = np.arange(len(examples))
    most = int(examples.lengths("positives", ids).sum()) + len(ids) * mining.config.num_kept
    if mining.config.keep_negatives:
        most += int(examples.lengths("negatives", ids).sum())
    kind = mining.config.teacher.kind if mining.config.teacher else ""
    asked = f", in {len(ids):,} requests or more" if kind == "endpoint" else ""
    return f"at most {most:,} pairs by the {kind.replace('_', '-')}{asked}"
