"""Find how many texts of each length an array embeds, without torch and mteb unless counted.

evaluation   own task: its files, read      task of mteb: the statistics that mteb ships
             counted: tasks --load_texts--> texts --tokenizer of each model--> lengths, uncut
                                            --digest--> each distinct text once, as in a plan
mining       manifest of the shards         corpora: bytes of their files
encode       records of the input, read up to some megabytes
described    numbers of texts and their mean lengths

Where no tokenizer has counted, a token is 3.5 bytes of text, and lengths around a known mean are
log-normal. Letters: K different lengths.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import EvaluateConfig, OwnTask, Role, SourceConfig
from pipeline.data.manifest import LengthHistogram
from pipeline.data.sources.containers import plan_blocks, read_file, read_records
from pipeline.data.sources.corpus import documents_of, split_part
from pipeline.data.sources.paths import list_files
from pipeline.data.sources.records import BadRecords
from pipeline.errors import UserError, blame
from pipeline.evaluation.distinct_texts import (
    BYTES_PER_TOKEN,
    byte_sizes,
    digests,
    effective_lengths,
)
from pipeline.evaluation.encode_files import Fields
from pipeline.evaluation.tasks import instruction_for, lengths_of, list_elements, tasks_of
from pipeline.tokenizer import load_tokenizer

FloatArray = NDArray[np.float64]
# Standard deviation of a length's logarithm in the benchmarks' corpora, where only a mean is known.
_SPREAD = 0.8
# Lengths that stand in for a log-normal distribution, each for as many texts.
_QUANTILES = 64
# Bytes of a block, and blocks to read, of the input of an encoding: 4 MiB of it.
_BLOCK_BYTES, _SAMPLED = 2**18, 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Texts:
    """Numbers of texts by length: (K,) tokens, and (K,) texts of each."""

    lengths: FloatArray
    counts: FloatArray

    @classmethod
    def counted(cls, lengths: Sequence[int] | NDArray[np.integer]) -> Texts:
        """Return texts whose lengths are known one by one."""
        found, counts = np.unique(np.asarray(lengths, np.float64), return_counts=True)
        return cls(lengths=found, counts=counts.astype(np.float64))

    @classmethod
    def around(cls, count: float, mean: float, longest: float) -> Texts:
        """Return texts of log-normal length with this mean, none longer than `longest`."""
        # (K,) log-normal lengths in ascending order, the middles of K equally likely ranges.
        points = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
        normal, wanted = statistics.NormalDist(), min(mean, longest)
        drawn = np.exp(_SPREAD * np.array([normal.inv_cdf(point) for point in points]))
        # Scaled so that the mean holds after the cut. If the k shortest stay below `longest`,
        # factor x (sum of these k) + (K - k) x longest = K x mean; so for each k, a factor.
        rest = np.arange(_QUANTILES)[::-1]  # K - k
        factors = (_QUANTILES * wanted - rest * longest) / np.cumsum(drawn)
        # The largest k whose k-th length really stays below. Where the mean is `longest`, only the
        # first does, and only up to rounding.
        below = np.flatnonzero(factors * drawn <= longest * (1 + 1e-12))
        lengths = np.minimum(factors[below[-1]] * drawn, longest)
        return cls(lengths=lengths, counts=np.full(_QUANTILES, count / _QUANTILES))

    @classmethod
    def of_histogram(cls, found: LengthHistogram) -> Texts:
        """Return texts as in a manifest: their number and tokens exactly, lengths by power of 2."""
        counts = np.array(found.counts, np.float64)
        # Bin i holds lengths from 2^i to 2^(i + 1).
        middles = np.minimum(1.5 * 2.0 ** np.arange(len(counts)), found.longest)
        scale = found.tokens / max(1.0, float(counts @ middles))
        return cls(lengths=middles * scale, counts=counts)

    @property
    def texts(self) -> float:
        """Number of texts."""
        return float(self.counts.sum())

    @property
    def tokens(self) -> float:
        """Tokens of all texts."""
        return float(self.lengths @ self.counts)

    @property
    def squares(self) -> float:
        """The sum of squared lengths."""
        return float(self.lengths**2 @ self.counts)

    def cut(self, limit: float, *, added: float = 0.0) -> Texts:
        """Return the same texts with `added` tokens more, cut at `limit`."""
        return dataclasses.replace(self, lengths=np.minimum(self.lengths + added, limit))

    def longer_than(self, limit: float) -> Texts:
        """Return the texts that `limit` would cut."""
        kept = self.lengths > limit
        return Texts(lengths=self.lengths[kept], counts=self.counts[kept])

    def times(self, factor: float) -> Texts:
        """Return the same lengths with every count multiplied."""
        return dataclasses.replace(self, counts=self.counts * factor)

    def plus(self, other: Texts) -> Texts:
        """Return the texts of both."""
        return Texts(
            lengths=np.concatenate([self.lengths, other.lengths]),
            counts=np.concatenate([self.counts, other.counts]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskSizes:
    """The texts of a retrieval task, not yet cut.

    Attributes:
        documents: of all splits that are scored.
        queries: without the instruction of a model.
        distinct: number of distinct documents / number of documents.
        origin: how the sizes are known, for the plan.
    """

    documents: Texts
    queries: Texts
    distinct: float
    origin: str

    def asked(self, instruction: str) -> TaskSizes:
        """Return the same task with an instruction before each query."""
        added = len(instruction.encode()) / BYTES_PER_TOKEN
        return dataclasses.replace(self, queries=self.queries.cut(np.inf, added=added))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DescribedTask:
    """The sizes of a task as a user knows them; lengths are means in tokens."""

    ORIGIN: ClassVar[str] = "described"

    documents: int
    document_tokens: int
    queries: int
    query_tokens: int

    def sizes(self) -> TaskSizes:
        """Return texts of such lengths; the longest has four times the mean."""
        return TaskSizes(
            documents=Texts.around(
                self.documents, self.document_tokens, 4.0 * self.document_tokens
            ),
            queries=Texts.around(self.queries, self.query_tokens, 4.0 * self.query_tokens),
            distinct=1.0,
            origin=self.ORIGIN,
        )


def task_sizes(task: str, own: OwnTask | None, described: DescribedTask | None) -> TaskSizes:
    """Return the sizes of a task: read, published, or described.

    Raises:
        UserError: an own task cannot be read, or nothing is known about the task.
    """
    if own is not None:
        return _own_sizes(own)
    published = _published(task)
    if published is not None:
        return published
    if described is None:
        raise UserError(
            f"tasks: {task}: no statistics of this task in the installed mteb",
            fix="add --documents, --document-tokens, --queries and --query-tokens, or --count, "
            "which reads the data",
        )
    return described.sizes()


def _own_sizes(own: OwnTask) -> TaskSizes:
    """Read the files of an own task; a token is `BYTES_PER_TOKEN` bytes."""
    source = SourceConfig(name=own.name, format="mteb", path=str(own.path), split=own.split)
    bad = BadRecords(f"tasks.{own.name}")
    documents = [text for _, text, _ in documents_of(split_part(source, "corpus"), bad.add)]
    queries = []
    for file in split_part(source, "queries"):
        for record in read_file(file, split=None, on_bad=bad.add):
            value = record.value
            words = [value.get("text") or value.get("query"), value.get("instruction")]
            queries.append(" ".join(str(word) for word in words if word))
    bad.refuse()
    return TaskSizes(
        documents=Texts.counted(estimate_tokens(documents)),
        queries=Texts.counted(estimate_tokens(queries)),
        distinct=len(set(documents)) / max(1, len(documents)),
        origin="files, by bytes",
    )


def estimate_tokens(texts: Iterable[str]) -> NDArray[np.int64]:
    """Return (N,) estimated tokens of texts, as `diffembed evaluate plan` estimates them."""
    # Of half a surrogate pair, too, which the command itself refuses: this is only an estimate.
    sizes = np.array([len(text.encode(errors="surrogatepass")) for text in texts], np.float64)
    # One more: most tokenizers add a special token.
    return np.asarray(np.ceil(sizes / BYTES_PER_TOKEN) + 1, np.int64)


def read_inputs(source: str, *, field: str, role: Role) -> tuple[list[str], float]:
    """Read texts of the input of `diffembed encode`, at most `_SAMPLED` blocks of it.

    Args:
        source: files, as for `--input`.
        field: of the text.
        role: the title of a document precedes its text.

    Returns:
        Texts, and the number of texts of the whole input for each of them.

    Raises:
        UserError: there are no such files, or a record has no text.
    """
    blocks = [
        block
        for file in list_files(source, "--input")
        for block in plan_blocks(file, split=None, block_bytes=_BLOCK_BYTES, max_rows=None)
    ]
    # Evenly spaced: files are often sorted, by length too.
    step = max(1.0, len(blocks) / _SAMPLED)
    chosen = [blocks[int(number * step)] for number in range(int(len(blocks) / step))]
    title = "title" if (field, role) == ("text", "document") else None
    fields, bad, texts = Fields(text=field, title=title, id=None), BadRecords("--input"), []
    records = (r for block in chosen for r in read_records(block, split=None, on_bad=bad.add))
    for record in records:
        if isinstance(record.value.get(field), str):
            texts.append(fields.text_of(record))
        else:
            allowed = f"a text; fields are {', '.join(map(str, record.value))}"
            bad.add(record.fail(f"{field}: no text", allowed=allowed))
    bad.refuse()
    if not texts:
        raise UserError(f"--input: {source} holds no text", fix="name files with records")
    return texts, len(blocks) / len(chosen)


# --- statistics of mteb ----------------------------------------------------------------------


def statistics_folder() -> Path | None:
    """Return the folder of the installed mteb's statistics; mteb itself is not imported."""
    spec = importlib.util.find_spec("mteb")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "descriptive_stats"


@functools.cache
def _published(task: str) -> TaskSizes | None:
    folder = statistics_folder()
    found = sorted(folder.rglob(f"{task}.json")) if folder and folder.is_dir() else []
    if not found:
        return None
    with blame(f"{found[0]}: damaged", fix="install mteb again, or add --count"):
        splits = list(json.loads(found[0].read_text()).values())
        parts = [
            (_around(split["documents_text_statistics"]), _around(split["queries_text_statistics"]))
            for split in splits
        ]
        unique = sum(split["documents_text_statistics"]["unique_texts"] for split in splits)
    documents = functools.reduce(Texts.plus, (part for part, _ in parts))
    queries = functools.reduce(Texts.plus, (part for _, part in parts))
    return TaskSizes(
        documents=documents,
        queries=queries,
        distinct=min(1.0, unique / documents.texts),
        origin="published sizes",
    )


def _around(found: dict[str, Any]) -> Texts:
    """Return texts from mteb's statistics, which count characters; they are taken for bytes."""
    mean, longest = (
        found[key] / BYTES_PER_TOKEN + 1 for key in ("average_text_length", "max_text_length")
    )
    # The statistics of one kind of texts do not have their number.
    count = found["total_text_length"] / found["average_text_length"]
    return Texts.around(count, mean, max(mean, longest))


# Texts of one call of a tokenizer.
_BATCH = 1000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CountedTexts:
    """The texts of an evaluation, counted.

    Attributes:
        sizes: by model and task, uncut; queries with their template and instruction.
        distinct: by model, each distinct text of all its tasks and lengths once, cut.
    """

    sizes: dict[tuple[str, str], TaskSizes]
    distinct: dict[str, Texts]


def count_texts(config: EvaluateConfig) -> CountedTexts:
    """Load every task once and count its texts for every model.

    Raises:
        UserError: the data of a task or the tokenizer of a model are missing.
    """
    # Not at the top: both load torch.
    from pipeline.evaluation.datasets import load_texts
    from pipeline.model.load_export import read_template

    tokenizers = {model.name: load_tokenizer(str(model.path)) for model in config.models}
    templates = {model.name: model.template or read_template(model.path) for model in config.models}
    # Texts that fit several lengths share the shortest of them, as in a plan of texts.
    every = sorted({element.max_length for element in list_elements(config)})
    sizes: dict[tuple[str, str], TaskSizes] = {}
    found: dict[str, list[tuple[NDArray[np.uint64], NDArray[np.int64]]]] = {}
    for task, own in tasks_of(config).items():
        documents, queries = load_texts(task, snapshots=config.snapshots, own=own)
        for model in config.models:
            roles: tuple[tuple[Role, list[str], str], ...] = (
                ("document", documents, ""),
                ("query", queries, instruction_for(task, model, config)),
            )
            counted = []
            for role, texts, instruction in roles:
                frame = templates[model.name].frame(role, instruction)
                lengths_N = count_tokens(tokenizers[model.name], texts, *frame)
                counted.append(Texts.counted(lengths_N))
                column = pa.array(texts, type=pa.large_string())
                bytes_N = byte_sizes(column)
                for wanted in lengths_of(config, task):
                    limits_N = effective_lengths(instruction, bytes_N, wanted, every)
                    # Half of a digest tells texts apart; a plan refuses a collision.
                    names_N = digests(role, instruction, column, limits_N)[:, 0]
                    found.setdefault(model.name, []).append(
                        (names_N, np.minimum(lengths_N, wanted))
                    )
            sizes[model.name, task] = TaskSizes(
                documents=counted[0], queries=counted[1], distinct=1.0, origin="counted"
            )
    return CountedTexts(
        sizes=sizes, distinct={name: _distinct(parts) for name, parts in found.items()}
    )


def count_tokens(
    tokenizer: Any, texts: Sequence[str], prefix: str, suffix: str
) -> NDArray[np.int64]:
    """Return (N,) tokens of texts between prefix and suffix, special tokens included."""
    lengths: list[int] = []
    for start in range(0, len(texts), _BATCH):
        strings = [prefix + text + suffix for text in texts[start : start + _BATCH]]
        lengths += map(len, tokenizer(strings, verbose=False)["input_ids"])
    # Of an empty text one token is made, because pooling needs one.
    return np.maximum(np.array(lengths, np.int64), 1)


def _distinct(parts: Sequence[tuple[NDArray[np.uint64], NDArray[np.int64]]]) -> Texts:
    names_N, lengths_N = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    _, first = np.unique(names_N, return_index=True)
    return Texts.counted(lengths_N[first])
