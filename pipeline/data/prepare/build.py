"""Plan a dataset build: its tasks, the files they hand each other, and its progress.

All files are in `.NAME.building` next to the dataset. A task writes its summary, STEP/TASK.json,
last: where that exists, the task is done and its other files are complete.

    file                    written for each   read by                    content
    plan/000000.json        build              every step                 BuildPlan
    tokenizer.json          build              tokenise, relate           as the library writes it
    recipe.json             build              the next `prepare`         Recipe
    contamination/          build              collect                    see contamination.py
    lookup/*.documents      source             collect                    CORPUS_SCHEMA
    lookup/*.index          source             collect                    (2, D) hash of id, row
    collect/*.rows          block              relate                     ROW_SCHEMA
    collect/*.documents     block              dedup, sign, tokenise      TEXT_SCHEMA, by slice
    collect/*.held_out      block              manifest                   a row kept out, per line
    dedup/*.documents       slice              sign, pair, catalogue,     DISTINCT_SCHEMA
                                               tokenise
    sign/*.signatures       slice              pair                       (R, 128) uint32
    sign/*.bands            slice              pair                       (16, R) uint64
    pair/*.pairs            band               catalogue                  (2, P) later, earlier
    catalogue/*.hashes      build              tokenise, relate           (D,) S16, ascending
    catalogue/*.numbers     build              tokenise, relate           (D,) number in the shards
    catalogue/*.first       build              tokenise                   (D,) document kept for it
    tokenise/*.documents    slice              layout, pack               shards.DOCUMENT_SCHEMA
    relate/*.examples       block              layout, pack               shards.EXAMPLE_SCHEMA
    */*.dropped             lookup, collect,   manifest                   lines of dropped.jsonl
                            tokenise task
    dataset/                shard, build       `prepare`, which gives it  the dataset folder
                                               its final name

A block is a stretch of one input file, a slice a range of document hashes, a band a part of the
MinHash signatures. Letters: D distinct documents, R documents of a slice, P pairs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter

from pipeline.config import PrepareConfig, SourceConfig
from pipeline.data.manifest import REPORT_NAME, LengthHistogram, Manifest, ShardInfo
from pipeline.data.prepare.contamination import build_index
from pipeline.data.prepare.recipe import (
    identify_tokenizer,
    make_recipe,
    require_inputs,
    write_recipe,
)
from pipeline.data.shards import Dataset
from pipeline.data.sources import expand_sources, plan_source
from pipeline.data.sources.containers import block_bytes_of
from pipeline.data.sources.records import EXCERPT, BadRowCounts, FileBlock, whole_characters
from pipeline.files import write_json, write_text
from pipeline.model_limits import read_limits
from pipeline.tokenizer import TextTokenizer, TokenizerInfo, load_fast_tokenizer

# (R,) 16-byte hashes of texts; numpy compares them as bytes, an order that all steps share.
TextHashes = NDArray[np.bytes_]

CORPUS_SCHEMA = pa.schema([("id", pa.large_string()), ("text", pa.large_string())])
ROW_SCHEMA = pa.schema(
    [
        ("query", pa.large_string()),  # instruction and text, as they will be tokenised
        ("prefix", pa.int32()),  # characters of the instruction
        ("suffix", pa.int32()),  # characters that the template puts behind the text
        ("query_key", pa.int64()),
        ("instruction", pa.large_string()),
        ("concept", pa.int64()),
        ("positives", pa.large_list(pa.binary(16))),
        ("negatives", pa.large_list(pa.binary(16))),
        ("num_first_negatives", pa.int32()),
        ("scores", pa.large_list(pa.float32())),
    ]
)
TEXT_SCHEMA = pa.schema(
    [
        ("hash", pa.binary(16)),
        ("text", pa.large_string()),
        ("prefix", pa.int32()),
        ("suffix", pa.int32()),
    ]
)
# A distinct document, and the block and row of its slice there that its text is read from.
DISTINCT_SCHEMA = pa.schema([("hash", pa.binary(16)), ("block", pa.int32()), ("row", pa.int32())])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LookupSummary:
    """Documents that a source refers to by id, and what `check_queries` found."""

    step: ClassVar[str] = "lookup"
    documents: int
    first_texts: dict[str, str]
    unjudged: int
    dropped: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CollectSummary(BadRowCounts):
    """Rows of a block, and their instructions up to one more than may name groups.

    `absent` are columns whose field no row of the block has, `fields` the fields of its first row.
    """

    step: ClassVar[str] = "collect"
    read: int
    unwanted: int
    dropped: dict[str, int]
    has_scores: bool
    instructions: list[str]
    held_out: int = 0
    absent: list[str] = dataclasses.field(default_factory=list)
    fields: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DedupSummary:
    """Documents of a slice, with repetitions."""

    step: ClassVar[str] = "dedup"
    found: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SignSummary:
    """Documents of a slice that have a signature."""

    step: ClassVar[str] = "sign"
    documents: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PairSummary:
    """Pairs of near-duplicates that a band found."""

    step: ClassVar[str] = "pair"
    pairs: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CatalogueSummary:
    """Groups of examples as (number of the source, instruction), and documents of each slice."""

    step: ClassVar[str] = "catalogue"
    groups: list[tuple[int, str]]
    slices: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokeniseSummary:
    """Documents of a slice that are kept, and merged into others; tokens of those kept."""

    step: ClassVar[str] = "tokenise"
    kept: int
    near_duplicates: int
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RelateSummary:
    """Examples of a block by the number of their group."""

    step: ClassVar[str] = "relate"
    groups: dict[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowRange:
    """Rows start..stop-1 of one task's table."""

    task: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackSummary:
    """A finished shard."""

    step: ClassVar[str] = "pack"
    shard: ShardInfo
    lengths: LengthHistogram


class _Summary(Protocol):
    step: ClassVar[str]


S = TypeVar("S", bound=_Summary)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBlock:
    """A block and the number of the source it belongs to."""

    source: int
    block: FileBlock


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """Everything the tasks must agree on; written once, read by all."""

    recipe: str
    sources: tuple[SourceConfig, ...]
    blocks: tuple[PlannedBlock, ...]
    num_slices: int
    tokenizer: TokenizerInfo


@dataclasses.dataclass(frozen=True)
class Build:
    """A dataset being built in `folder`, with the path of every file of the table above.

    Picklable, so that worker processes can share it.
    """

    config: PrepareConfig
    folder: Path

    def summary_path(self, step: str, task: int) -> Path:
        """Return the file whose existence means that a task is done."""
        return self._path(step, task, "json")

    def write_summary(self, task: int, summary: Any) -> None:
        """Write a task's summary, as its last file."""
        write_json(self.summary_path(summary.step, task), dataclasses.asdict(summary))

    def read_summary(self, kind: type[S], task: int) -> S:
        """Read the summary of a task that is done."""
        path = self.summary_path(kind.step, task)
        summary: S = _adapter(kind).validate_json(path.read_bytes())
        return summary

    def corpus(self, source: int) -> Path:
        """Documents that a source refers to by id."""
        return self._path("lookup", source, "documents")

    def corpus_index(self, source: int) -> Path:
        """Rows of `corpus` in the order of their ids' hashes."""
        return self._path("lookup", source, "index")

    def rows(self, block: int) -> Path:
        """Cleaned rows of a block, with their documents as hashes."""
        return self._path("collect", block, "rows")

    def block_texts(self, block: int) -> Path:
        """Distinct documents of a block: one record batch for each slice."""
        return self._path("collect", block, "documents")

    def held_out(self, block: int) -> Path:
        """Rows of a block that are kept out of training, one JSON line each."""
        return self._path("collect", block, "held_out")

    def distinct(self, number: int) -> Path:
        """Distinct documents of a slice over all blocks, without their texts."""
        return self._path("dedup", number, "documents")

    def signatures(self, number: int) -> Path:
        """MinHash signatures of a slice's documents."""
        return self._path("sign", number, "signatures")

    def bands(self, number: int) -> Path:
        """Keys of the bands of a slice's signatures."""
        return self._path("sign", number, "bands")

    def pairs(self, band: int) -> Path:
        """Near-duplicates found by a band."""
        return self._path("pair", band, "pairs")

    def catalogue(self, column: str) -> Path:
        """Return a column over all distinct documents: `hashes`, `numbers` or `first`."""
        return self._path("catalogue", 0, column)

    def documents(self, number: int) -> Path:
        """Tokenised documents of a slice."""
        return self._path("tokenise", number, "documents")

    def examples(self, block: int) -> Path:
        """Tokenised examples of a block."""
        return self._path("relate", block, "examples")

    def dropped(self, step: str, task: int) -> Path:
        """One JSON line for each text that a task dropped."""
        return self._path(step, task, "dropped")

    def _path(self, step: str, task: int, suffix: str) -> Path:
        return self.folder / step / f"{task:06d}.{suffix}"

    @property
    def plan_path(self) -> Path:
        """The plan; without it, nothing else in the folder is of use."""
        return self.summary_path("plan", 0)

    @property
    def tokenizer_json(self) -> Path:
        """The tokenizer, as the library writes it."""
        return self.folder / "tokenizer.json"

    @property
    def contamination(self) -> Path:
        """Folder of the index of evaluation sets."""
        return self.folder / "contamination"

    @property
    def dataset(self) -> Path:
        """Folder of the shards, before it gets its final name."""
        return self.folder / "dataset"

    @functools.cached_property
    def plan(self) -> BuildPlan:
        """The plan on disk."""
        plan: BuildPlan = _adapter(BuildPlan).validate_json(self.plan_path.read_bytes())
        return plan

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the plan."""
        info = self.plan.tokenizer
        text = self.tokenizer_json.read_text()
        return TextTokenizer(text, eos_id=info.eos_id, append_eos=info.append_eos)

    @property
    def finds_near_duplicates(self) -> bool:
        """False where the steps `sign` and `pair` have no tasks."""
        return self.config.near_duplicates is not None

    def blocks_of(self, source: int) -> list[int]:
        """Return the numbers of a source's blocks."""
        return [k for k, planned in enumerate(self.plan.blocks) if planned.source == source]

    def slice_of(self, hashes: TextHashes) -> NDArray[np.int64]:
        """(R,) slice of each hash; slices are in the order of the hashes."""
        # By the first two bytes, read as a big-endian number, whose order is that of the bytes.
        # (R,) x 16 bytes -> (R, 8) -> (R,) from 0 to 65535; the shift divides by 65536.
        head = np.frombuffer(hashes.tobytes(), dtype=">u2").reshape(-1, 8)[:, 0]
        return head.astype(np.int64) * self.plan.num_slices >> 16


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


# Text per slice of the document store; a task holds one slice in memory.
_SLICE_BYTES = 4 * 2**20
# Each block's file has a record batch for every slice. Beyond this many, slices grow instead.
_MAX_SLICES = 4096


def make_plan(build: Build) -> None:
    """Record the inputs, list the blocks, count the slices, and store the tokenizer."""
    # Before anything is hashed: only files older than this can be trusted by their times.
    config, started_ns = build.config, time.time_ns()
    # The tokenizer comes after every check of the config: finding it may need a network.
    sources = expand_sources(config.sources)
    require_inputs(config)
    tokenizer_json, tokenizer = load_fast_tokenizer(config.tokenizer, append_eos=config.append_eos)
    read_limits(config.tokenizer).require_length(
        {
            "max_query_length": config.max_query_length,
            "max_document_length": config.max_document_length,
        },
        fix="shorten it, so that longer texts are cut",
    )
    recipe = make_recipe(config, identify_tokenizer(tokenizer_json, tokenizer))
    blocks = tuple(
        PlannedBlock(source=number, block=block)
        for number, source in enumerate(sources)
        for block in plan_source(source, block_bytes=config.block_bytes)
    )
    size = sum(block_bytes_of(planned.block) for planned in blocks)
    plan = BuildPlan(
        recipe=recipe.fingerprint,
        sources=sources,
        blocks=blocks,
        # From the input alone: the number of workers must not change the bytes.
        num_slices=min(max(1, -(-size // _SLICE_BYTES)), _MAX_SLICES),
        tokenizer=tokenizer,
    )
    if config.reuse is not None:
        # Hash its bytes once: after a flipped bit, a token may still look like a token.
        Dataset.open(config.reuse, verify=True)
    # One index for all blocks, built by the main rank before any of them is read.
    if config.decontaminate is not None:
        build_index(config.decontaminate, build.contamination)
    write_text(build.tokenizer_json, tokenizer_json)
    write_recipe(build.folder, recipe, started_ns=started_ns)
    # Last: where there is a plan, the tasks find everything else.
    write_text(build.plan_path, _adapter(BuildPlan).dump_json(plan).decode())


_SECONDS_BETWEEN_LINES = 10.0
# For each step with progress lines: its summary, the unit that is counted, and how.
_COUNTED: dict[str, tuple[type[Any], str, Callable[[Any], int]]] = {
    "lookup": (LookupSummary, "documents", lambda task: task.documents),
    "collect": (CollectSummary, "rows", lambda task: task.read),
    "dedup": (DedupSummary, "texts", lambda task: task.found),
    "sign": (SignSummary, "documents", lambda task: task.documents),
    "pair": (PairSummary, "pairs", lambda task: task.pairs),
    "tokenise": (TokeniseSummary, "documents", lambda task: task.kept),
    "relate": (RelateSummary, "examples", lambda task: sum(task.groups.values())),
    "pack": (PackSummary, "rows", lambda task: task.shard.rows),
}


def say(text: str) -> None:
    """Print one line about the work."""
    print(f"prepare: {text}", file=sys.stderr, flush=True)


class Progress:
    """Count the work that the tasks of one step have done, from their summaries."""

    def __init__(self, build: Build, step: str, num_tasks: int) -> None:
        self._build, self._step, self._num_tasks = build, step, num_tasks
        self._left = set(range(num_tasks))
        self._done = 0
        # Work of an earlier, interrupted call is not part of the rate.
        self._count()
        self._was_done, self._had_work = self._done, bool(self._left)
        self._started = self._last = time.monotonic()

    def _count(self) -> None:
        path = self._build.summary_path
        for task in [task for task in self._left if path(self._step, task).exists()]:
            if self._step in _COUNTED:
                kind, _, count = _COUNTED[self._step]
                self._done += count(self._build.read_summary(kind, task))
            self._left.remove(task)

    def update(self) -> None:
        """Print a line if the last one is old enough."""
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        self._count()
        if self._left:
            self._print(f", part {self._num_tasks - len(self._left)} of {self._num_tasks}")

    def finish(self) -> None:
        """Print the work that the step did, if it had any."""
        self._count()
        if self._had_work and self._done:
            self._print("")

    def _print(self, part: str) -> None:
        if self._step not in _COUNTED:
            return
        seconds = time.monotonic() - self._started
        rate = (self._done - self._was_done) / max(seconds, 1e-3)
        unit = _COUNTED[self._step][1]
        say(f"{self._step}: {self._done:,} {unit}{part}, {seconds:.1f} s, {rate:,.0f}/s")


def describe(manifest: Manifest, folder: Path) -> str:
    """Return one line: what is kept, how many texts were dropped and why, where to read more."""
    reasons: collections.Counter[str] = collections.Counter()
    for source in manifest.sources:
        for name, count in source.dropped.items():
            # Without the kind of text: "positive: empty" and "negative: empty" are one reason here.
            reasons[name.rpartition(": ")[2]] += count
    dropped = f"{reasons.total():,} dropped"
    if reasons:
        dropped += f" ({', '.join(f'{count:,} {name}' for name, count in reasons.most_common())})"
    if manifest.num_near_duplicates:
        dropped += f", {manifest.num_near_duplicates:,} near-duplicate documents merged"
    return (
        f"{manifest.num_examples:,} examples, {manifest.num_documents:,} documents, {dropped} "
        f"-> {folder / REPORT_NAME}"
    )


def count_dropped(entries: list[dict[str, str]]) -> dict[str, int]:
    """Return how many entries of dropped.jsonl have each reason."""
    counts = collections.Counter(f"{entry['dropped']}: {entry['reason']}" for entry in entries)
    return dict(sorted(counts.items()))


def write_dropped(build: Build, step: str, task: int, entries: list[dict[str, str]]) -> None:
    """Write one JSON line for each dropped text, with the start of the text."""
    shown = ({**entry, "text": entry["text"][:EXCERPT]} for entry in entries)
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in shown]
    # An entry may quote an evaluation set, whose texts may hold halves of surrogate pairs.
    write_text(build.dropped(step, task), whole_characters("".join(lines)))
