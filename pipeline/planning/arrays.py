"""Plan the jobs that embed texts: evaluations, minings and encodings, by task, without torch.

config --text_sizes.py--> texts of each task, cut at its lengths
model  --PlannedModel--> FLOPs of a forward, or seconds by a calibration
       --Work--> GPU time by task --describe_array--> table, total, hours on a number of GPUs

An element of an evaluation embeds the texts of one model, task and length on one GPU. With
`--texts`, elements share the distinct texts of all tasks; workers of a mining always share texts.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from pipeline.config import BM25, CorpusConfig, EvaluateConfig, MineConfig, TeacherConfig
from pipeline.data.manifest import FILE_NAME, read_manifest
from pipeline.data.shards import Dataset
from pipeline.data.sources.corpus import corpus_files
from pipeline.data.sources.paths import counts_rows, file_size, is_packed, list_files
from pipeline.errors import UserError, say_warning, several
from pipeline.evaluation.distinct_texts import BYTES_PER_TOKEN
from pipeline.evaluation.tasks import Element, instruction_for, list_elements, tasks_of
from pipeline.planning.calibration import Machine
from pipeline.planning.describe import (
    format_columns,
    format_price,
    format_seconds,
    gpu_time,
)
from pipeline.planning.planned_model import PlannedModel
from pipeline.planning.speed import UTILISATION, Gpu
from pipeline.planning.text_sizes import (
    CountedTexts,
    DescribedTask,
    TaskSizes,
    Texts,
    task_sizes,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One task of an array, or one step of a mining.

    Attributes:
        name: of the task or step.
        model: the model that does it.
        texts: in words: `100 documents, 10 queries`.
        origin: how the sizes are known.
        tokens: that the model reads.
        seconds: of one GPU; None for work that no GPU of this array does.
        length: tokens after which texts are cut; None where nothing is cut.
    """

    name: str
    model: str
    texts: str
    origin: str
    tokens: float = 0.0
    seconds: float | None = None
    length: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArrayPlan:
    """The work of an array, task by task.

    Attributes:
        title: of the table.
        work: one entry for each model, task and length, in the order of the array.
        whole: an entry is one element, which one GPU computes; otherwise GPUs share all work.
        shared: seconds where each distinct text is embedded once; None if that is no option.
        shared_is_bound: `shared` is an upper bound, because tasks may share further texts.
    """

    title: str
    work: tuple[Work, ...]
    whole: bool
    shared: float | None = None
    shared_is_bound: bool = True

    @property
    def seconds(self) -> float:
        """Seconds of all GPUs together."""
        return sum(work.seconds or 0.0 for work in self.work)

    def elapsed(self, gpus: int) -> float:
        """Return the seconds until all work is done, on this many GPUs at a time."""
        if not self.whole:
            return self.seconds / gpus
        # As Slurm starts an array: the next element on the first GPU that is free.
        free = [0.0] * gpus
        for work in self.work:
            heapq.heapreplace(free, free[0] + (work.seconds or 0.0))
        return max(free)


def _reading(
    name: str,
    model: PlannedModel,
    texts: Texts,
    limit: int | None,
    *,
    words: str,
    origin: str,
    added: float = 0.0,
) -> Work:
    """Return the work of a model that reads texts with `added` tokens more, cut at its longest."""
    longest = limit or model.longest
    # Work shows None for no limit; numpy's minimum needs a number.
    texts = texts.cut(longest or np.inf, added=added)
    return Work(
        name=name,
        model=model.name,
        texts=words,
        tokens=texts.tokens,
        seconds=model.seconds(texts),
        origin=origin,
        length=longest,
    )


def _embedding(name: str, model: PlannedModel, sizes: TaskSizes, limit: int | None) -> Work:
    """Return the work of embedding all documents and queries."""
    words = f"{sizes.documents.texts:,.0f} documents, {sizes.queries.texts:,.0f} queries"
    texts = sizes.documents.plus(sizes.queries)
    return _reading(name, model, texts, limit, words=words, origin=sizes.origin)


# --- evaluations -----------------------------------------------------------------------------


def plan_evaluation(
    config: EvaluateConfig,
    machine: Machine,
    *,
    model: str | None = None,
    described: DescribedTask | None = None,
    counted: CountedTexts | None = None,
) -> ArrayPlan:
    """Plan the array of an evaluation: one element for each model, task and length.

    Args:
        config: the evaluation.
        machine: one GPU of it embeds one element.
        model: planned in place of every model, such as one whose export does not exist yet.
        described: sizes of tasks about which nothing is known.
        counted: the texts as they are, in place of estimates.

    Raises:
        UserError: a model is not on this machine, or the sizes of a task are not known, or all
            are and some are described.
    """
    models = _models_of(config, machine, model)
    elements = list_elements(config)
    sizes = counted.sizes if counted else _estimated(config, elements, described)
    pairs = [(each, sizes[each.model.name, each.task]) for each in elements]
    work = [
        _embedding(each.task, models[each.model.name], found, each.max_length)
        for each, found in pairs
    ]
    if described is not None and all(each.origin != described.ORIGIN for each in work):
        raise UserError(
            "--documents: the sizes of all tasks are known", fix="remove it and the other sizes"
        )
    if counted is None:
        once = [(each.model.name, _distinct(each, elements, found)) for each, found in pairs]
    else:
        once = list(counted.distinct.items())
    shared = sum(models[name].seconds(texts) for name, texts in once)
    return ArrayPlan(
        title=f"{several(len(config.models), 'model')} x {len(elements) // len(config.models)} "
        f"tasks and lengths = {several(len(elements), 'element')}",
        work=tuple(work),
        whole=True,
        shared=shared,
        shared_is_bound=counted is None,
    )


def _estimated(
    config: EvaluateConfig, elements: Sequence[Element], described: DescribedTask | None
) -> dict[tuple[str, str], TaskSizes]:
    """Return sizes by model and task, queries with the model's instruction."""
    tasks = {name: task_sizes(name, own, described) for name, own in tasks_of(config).items()}
    return {
        (each.model.name, each.task): tasks[each.task].asked(
            instruction_for(each.task, each.model, config)
        )
        for each in elements
    }


def _models_of(
    config: EvaluateConfig, machine: Machine, model: str | None
) -> dict[str, PlannedModel]:
    return {
        each.name: PlannedModel.read(
            model or str(each.path),
            name=each.name,
            key="--model" if model else f"models.{each.name}",
            precision=each.precision,
            machine=machine,
            max_tokens=config.max_tokens,
        )
        for each in config.models
    }


def _distinct(element: Element, elements: Sequence[Element], sizes: TaskSizes) -> Texts:
    """Return the texts that no shorter length of the same task has embedded already.

    A text that fits a shorter length has one vector for both, which is computed there.
    """
    shorter = [
        other.max_length
        for other in elements
        if (other.model, other.task) == (element.model, element.task)
        and other.max_length < element.max_length
    ]
    texts = sizes.documents.times(sizes.distinct).plus(sizes.queries)
    return texts.longer_than(max(shorter, default=0)).cut(element.max_length)


# --- minings ---------------------------------------------------------------------------------


def plan_mining(
    config: MineConfig, machine: Machine, *, described: DescribedTask | None = None
) -> ArrayPlan:
    """Plan the steps of a mining that a GPU does: embeddings, searches, and a teacher's scores.

    Args:
        config: the mining.
        machine: its GPUs share each step.
        described: shards that do not exist yet.

    Raises:
        UserError: the shards or a model are not on this machine.
    """
    sizes, listed = _shards(config, described)
    read = functools.partial(PlannedModel.read, machine=machine)
    work = []
    for number, retriever in enumerate(config.retrievers):
        if retriever.path == BM25:
            continue
        key = f"retrievers.{number}.path"
        model = read(retriever.path, name=retriever.name, key=key, precision=retriever.precision)
        work.append(_embedding("embed", model, sizes, retriever.max_length))
        work.append(_searched(model, sizes, by_index=retriever.index is not None))
    if config.teacher is not None:
        # It scores what examples list, and the candidates of every query, if it has enough.
        pairs = listed + sizes.queries.texts * config.num_kept
        work.append(_taught(config.teacher, read, sizes, pairs))
    title = f"{config.output}: the steps of a mining on GPUs"
    return ArrayPlan(title=title, work=tuple(work), whole=False)


def _taught(
    teacher: TeacherConfig,
    read: Callable[..., PlannedModel],
    sizes: TaskSizes,
    pairs: float,
) -> Work:
    """Return a teacher's work: all texts once, or each pair of a query and its candidate."""
    if teacher.path is None:
        words = f"at most {pairs:,.0f} pairs"
        return Work(name="score", model=str(teacher.model), texts=words, origin="by the endpoint")
    model = read(teacher.path, name="teacher", key="teacher.path", precision=teacher.precision)
    if teacher.kind == "bi_encoder":
        return _embedding("embed", model, sizes, teacher.max_length)
    return _scored(model, sizes, pairs, teacher.max_length)


def _shards(config: MineConfig, described: DescribedTask | None) -> tuple[TaskSizes, float]:
    """Return the texts to search, and the documents that examples list already."""
    if described is not None:
        sizes, listed = described.sizes(), float(described.queries)  # a positive each
    else:
        if not (config.data / FILE_NAME).is_file():
            raise UserError(
                f"data: {config.data} is not prepared yet",
                fix="describe the shards: --rows, --query-tokens and --document-tokens",
            )
        manifest = read_manifest(config.data)
        sizes = TaskSizes(
            documents=Texts.of_histogram(manifest.document_lengths),
            queries=Texts.of_histogram(manifest.query_lengths),
            distinct=1.0,
            origin="shards",
        )
        examples = Dataset.open(config.data, verify=False).examples
        columns = ("positives", "negatives") if config.keep_negatives else ("positives",)
        ids = np.arange(len(examples))
        listed = float(sum(examples.lengths(column, ids).sum() for column in columns))
    # Nothing of a corpus is read: its documents are assumed to be as long as the shards'.
    mean = sizes.documents.tokens / max(1.0, sizes.documents.texts)
    for corpus in config.corpora:
        files = _files_of(corpus)
        if any(is_packed(file) or counts_rows(file) for file in files):
            say_warning(f"corpora.{corpus.name}: compressed, and so larger than planned")
        tokens = sum(map(file_size, files)) / BYTES_PER_TOKEN
        more = Texts.around(min(tokens / mean, corpus.max_rows or np.inf), mean, 4 * mean)
        sizes = dataclasses.replace(
            sizes, documents=sizes.documents.plus(more), origin=f"{sizes.origin}, corpora by bytes"
        )
    return sizes, listed


def _files_of(corpus: CorpusConfig) -> list[str]:
    if corpus.format == "mteb":
        return corpus_files(corpus.as_source())
    return list_files(corpus.path, f"corpora.{corpus.name}.path")


def _searched(model: PlannedModel, sizes: TaskSizes, *, by_index: bool) -> Work:
    if by_index:
        words = f"{sizes.queries.texts:,.0f} searches of an index"
        return Work(name="search", model=model.name, texts=words, origin="by faiss, on CPUs")
    pairs = sizes.documents.texts * sizes.queries.texts
    flops = 2.0 * pairs * model.shape.hidden_size
    speed = model.machine.require_speed()
    if isinstance(speed, Gpu):
        seconds = flops / (speed.fp32 * UTILISATION)
    else:
        seconds = speed.of(1).search.at(flops, sizes.queries.texts)
    words = f"{pairs:,.0f} scores of pairs"
    return Work(name="search", model=model.name, texts=words, origin=sizes.origin, seconds=seconds)


def _scored(model: PlannedModel, sizes: TaskSizes, pairs: float, limit: int | None) -> Work:
    """Return the work of a cross-encoder, which reads a query and a document together."""
    query = sizes.queries.tokens / max(1.0, sizes.queries.texts)
    # Candidates are as long as documents in general, and each comes with a query of mean length.
    texts = sizes.documents.times(pairs / max(1.0, sizes.documents.texts))
    words = f"at most {pairs:,.0f} pairs"
    return _reading("score", model, texts, limit, words=words, origin=sizes.origin, added=query)


# --- encodings -------------------------------------------------------------------------------


def plan_encoding(
    model: PlannedModel, texts: Texts, *, limit: int | None, origin: str
) -> ArrayPlan:
    """Plan `diffembed encode`, whose processes share the texts."""
    words = f"{texts.texts:,.0f} texts"
    work = _reading("encode", model, texts, limit, words=words, origin=origin)
    return ArrayPlan(title=f"{model.name}: texts to vectors", work=(work,), whole=False)


# --- text ------------------------------------------------------------------------------------


def describe_array(
    plan: ArrayPlan, machine: Machine, *, gpus: int, price: float | None = None
) -> str:
    """Format the work by task, its total, and the time on a number of GPUs.

    Args:
        plan: of the array.
        machine: that the plan was made for.
        gpus: at work at a time.
        price: of one GPU for one hour.
    """
    if not plan.work:
        return f"{plan.title}: none"
    models = dict.fromkeys(work.model for work in plan.work)
    head = ["task", "model", "length", "texts", "tokens", "time of a GPU", "sizes"]
    rows = [head] + [_cells(work) for work in plan.work]
    if len(models) > 1:
        rows += [_total((w for w in plan.work if w.model == name), name) for name in models]
    total = [*_total(plan.work, "all")[:-1], f"from {machine.origin()}"]
    lines = [plan.title, "", format_columns([*rows, total]), ""]
    cost = "" if price is None else f", {format_price(plan.seconds, price)} at {price:g} an hour"
    longest = max(plan.work, key=lambda work: work.seconds or 0.0)
    one, together = format_seconds(plan.elapsed(gpus)), several(gpus, "GPU")
    if plan.whole:
        name = f"{longest.name} of {longest.model}"
        one += f"; the longest element {format_seconds(longest.seconds or 0.0)} ({name})"
    lines.append(f"{gpu_time(plan.seconds)}{cost}; on {together} at a time {one}")
    if plan.shared is not None:
        cost = "" if price is None else f", {format_price(plan.shared, price)}"
        bound = "at most " if plan.shared_is_bound else ""
        lines.append(
            f"with --texts N, each distinct text once: {bound}{gpu_time(plan.shared)}{cost}; on "
            f"{together} {format_seconds(plan.shared / gpus)}"
        )
    lines.append("GPUs only: start of jobs, reading, tokenising and scoring come in addition.")
    return "\n".join(lines)


def _cells(work: Work) -> list[str]:
    tokens = f"{work.tokens:,.0f}" if work.tokens else "-"
    length = "-" if work.length is None else f"{work.length:,}"
    seconds = "-" if work.seconds is None else format_seconds(work.seconds)
    return [work.name, work.model, length, work.texts, tokens, seconds, work.origin]


def _total(work: Iterable[Work], model: str) -> list[str]:
    work = tuple(work)
    tokens = sum(each.tokens for each in work)
    seconds = sum(each.seconds or 0.0 for each in work)
    return ["sum", model, "", "", f"{tokens:,.0f}", format_seconds(seconds), ""]
