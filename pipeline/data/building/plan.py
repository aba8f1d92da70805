"""What a build consists of: blocks of input, slices of documents, and where each output goes."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from pipeline.config import PrepareConfig, SourceConfig
from pipeline.data.building.recipe import (
    identify_tokenizer,
    make_recipe,
    require_inputs,
    write_recipe,
)
from pipeline.data.contamination import build_index
from pipeline.data.shards import Dataset
from pipeline.data.sources import (
    Block,
    block_bytes_of,
    expand_sources,
    plan_source,
)
from pipeline.data.tokens import TextEncoder, TokenizerInfo, load_tokenizer
from pipeline.limits import read_limits
from pipeline.run_dir import write_text

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
    def encoder(self) -> TextEncoder:
        """The tokenizer of the plan."""
        info = self.plan.tokenizer
        return TextEncoder(
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
    tokenizer_json, tokenizer = load_tokenizer(config.tokenizer, append_eos=config.append_eos)
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
