"""Plan a dataset build: tasks, files of each step, progress lines, counts of dropped rows."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from pipeline.config import PrepareConfig, SourceConfig
from pipeline.data.manifest import REPORT_NAME, Manifest
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
from pipeline.data.sources.records import Block
from pipeline.files import write_text
from pipeline.tokenizer import TextTokenizer, TokenizerInfo, load_fast_tokenizer, read_limits

# Text per slice of the document store; a task holds one slice in memory.
_SLICE_BYTES = 4 * 2**20
_MAX_SLICES = 4096
Hashes = NDArray[np.bytes_]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBlock:
    """A block and the number of the source it belongs to."""

    source: int
    block: Block


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything the tasks must agree on; written once, read by all."""

    recipe: str
    sources: tuple[SourceConfig, ...]
    blocks: tuple[PlannedBlock, ...]
    num_slices: int
    tokenizer: TokenizerInfo


@dataclasses.dataclass(frozen=True)
class Build:
    """A dataset being built in `folder`; picklable, so that worker processes can share it."""

    config: PrepareConfig
    folder: Path

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan on disk."""
        return TypeAdapter(Plan).validate_json(self.output("plan", 0).read_text())

    @functools.cached_property
    def encoder(self) -> TextTokenizer:
        """The tokenizer of the plan."""
        info = self.plan.tokenizer
        return TextTokenizer(
            (self.folder / "tokenizer.json").read_text(),
            eos_id=info.eos_id,
            append_eos=info.append_eos,
        )

    def output(self, step: str, task: int) -> Path:
        """The file whose existence means that a task is done."""
        return self.folder / step / f"{task:06d}.json"

    def beside(self, step: str, task: int, suffix: str) -> Path:
        """Another file of a task, complete wherever `output` exists."""
        return self.folder / step / f"{task:06d}.{suffix}"

    def slice_of(self, hashes: Hashes) -> NDArray[np.int64]:
        """(R,) slice of each 16-byte hash; slices are in the order of the hashes."""
        head = np.frombuffer(hashes.tobytes(), dtype=">u2").reshape(-1, 8)[:, 0]
        return head.astype(np.int64) * self.plan.num_slices >> 16


def make_plan(build: Build) -> None:
    """Record the inputs, list the blocks, count the slices, and store the tokenizer."""
    config, began = build.config, time.time_ns()
    # The tokenizer after all that a config may say wrong: looking it up may need a network.
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
    plan = Plan(
        recipe=recipe.fingerprint,
        sources=sources,
        blocks=blocks,
        num_slices=min(max(1, -(-size // _SLICE_BYTES)), _MAX_SLICES),
        tokenizer=tokenizer,
    )
    if config.reuse is not None:
        # Once, by the bytes: a flipped bit of the earlier dataset may still be a token.
        Dataset.open(config.reuse, verify=True)
    if config.decontaminate is not None:
        build_index(config.decontaminate, build.folder / "contamination")
    write_text(build.folder / "tokenizer.json", tokenizer_json)
    write_recipe(build.folder, recipe, began_ns=began)
    write_text(build.output("plan", 0), TypeAdapter(Plan).dump_json(plan).decode())


_SECONDS_BETWEEN_LINES = 10.0
# What each step counts, and how many of it the summary of a finished task holds.
_COUNTED: dict[str, tuple[str, Callable[[Any], int]]] = {
    "lookup": ("documents", lambda done: done["documents"]),
    "collect": ("rows", lambda done: done["read"]),
    "dedup": ("texts", lambda done: done["found"]),
    "sign": ("documents", lambda done: done["documents"]),
    "pair": ("pairs", lambda done: done["pairs"]),
    "tokenise": ("documents", lambda done: done["kept"]),
    "relate": ("examples", lambda done: sum(done["groups"].values())),
    "pack": ("rows", lambda done: done["shard"]["rows"]),
}


def say(text: str) -> None:
    """Print one line about the work."""
    print(f"prepare: {text}", file=sys.stderr, flush=True)


class Progress:
    """Counts what the tasks of one step have done, from their outputs."""

    def __init__(self, step: str, outputs: Sequence[Path]) -> None:
        self._step, self._outputs = step, outputs
        self._left = set(range(len(outputs)))
        self._done = 0
        self._count()
        self._was_done, self._had_work = self._done, bool(self._left)
        self._began = self._last = time.monotonic()

    def _count(self) -> None:
        for task in [task for task in self._left if self._outputs[task].exists()]:
            if self._step in _COUNTED:
                summary = json.loads(self._outputs[task].read_text())
                self._done += _COUNTED[self._step][1](summary)
            self._left.remove(task)

    def update(self) -> None:
        """Print a line if the last one is old enough."""
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        self._count()
        if self._left:
            total = len(self._outputs)
            self._say(f", part {total - len(self._left)} of {total}")

    def finish(self) -> None:
        """Print what the step did, if it had anything to do."""
        self._count()
        if self._had_work and self._done:
            self._say("")

    def _say(self, part: str) -> None:
        if self._step not in _COUNTED:
            return
        seconds = time.monotonic() - self._began
        rate = (self._done - self._was_done) / max(seconds, 1e-3)
        unit = _COUNTED[self._step][0]
        say(f"{self._step}: {self._done:,} {unit}{part}, {seconds:.1f} s, {rate:,.0f}/s")


def describe(manifest: Manifest, folder: Path) -> str:
    """One line: what is kept, how many texts were dropped and why, and where to read more."""
    reasons: collections.Counter[str] = collections.Counter()
    for source in manifest.sources:
        for name, count in source.dropped.items():
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
    """How many entries of dropped.jsonl have each reason."""
    counts = collections.Counter(f"{entry['dropped']}: {entry['reason']}" for entry in entries)
    return dict(sorted(counts.items()))


def write_dropped(build: Build, step: str, task: int, entries: list[dict[str, str]]) -> None:
    """One JSON line per dropped text."""
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    write_text(build.beside(step, task, "dropped"), "".join(lines))
