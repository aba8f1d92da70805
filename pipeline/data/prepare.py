"""Raw retrieval data to a dataset folder: in parallel, resumable anywhere, the same bytes always.

    lookup -> collect -> dedup -> sign -> pair -> catalogue
    sources   blocks     slices   slices  bands   one

    -> tokenise -> relate -> layout -> pack -> manifest
       slices      blocks    one       shards  one

Each step is a set of tasks; a task's output appears by rename, and what exists is not done again.
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.config import PrepareConfig
from pipeline.data.building.collect import collect_block, dedup_slice
from pipeline.data.building.finish import write_manifest
from pipeline.data.building.lookup import shelve_documents
from pipeline.data.building.near import pair_band, sign_slice
from pipeline.data.building.pack import lay_out, pack_shard, read_layout
from pipeline.data.building.plan import Build, make_plan, recipe_of
from pipeline.data.building.relate import make_catalogue, relate_block, tokenise_slice
from pipeline.data.crew import Crew, gather_crew
from pipeline.data.manifest import FILE_NAME, read_manifest
from pipeline.data.similarity import NUM_BANDS
from pipeline.data.tokens import tokenizer_fingerprint
from pipeline.errors import UserError

__all__ = ["prepare", "tokenizer_fingerprint"]

_Step = tuple[str, Callable[[Build, int], None], Callable[[Build], int]]


def _one(build: Build) -> int:
    return 1


def _num_blocks(build: Build) -> int:
    return len(build.plan.blocks)


def _num_slices(build: Build) -> int:
    return build.plan.num_slices


def _num_sources(build: Build) -> int:
    return len(build.plan.sources)


def _num_signed_slices(build: Build) -> int:
    return 0 if build.config.near_duplicates is None else build.plan.num_slices


def _num_bands(build: Build) -> int:
    return 0 if build.config.near_duplicates is None else NUM_BANDS


def _num_shards(build: Build) -> int:
    return len(read_layout(build))


_STEPS: tuple[_Step, ...] = (
    ("lookup", shelve_documents, _num_sources),
    ("collect", collect_block, _num_blocks),
    ("dedup", dedup_slice, _num_slices),
    ("sign", sign_slice, _num_signed_slices),
    ("pair", pair_band, _num_bands),
    ("catalogue", make_catalogue, _one),
    ("tokenise", tokenise_slice, _num_slices),
    ("relate", relate_block, _num_blocks),
    ("layout", lay_out, _one),
    ("pack", pack_shard, _num_shards),
    ("manifest", write_manifest, _one),
)


def prepare(config: PrepareConfig, *, num_workers: int | None = None) -> Path:
    """Build the dataset folder of a config, alone or as one rank of an MPI job.

    Interrupted at any point, the same call continues. A folder that is already complete for the
    same config and inputs is left as it is.

    Args:
        config: what to read, how to tokenise it, and where to write.
        num_workers: processes when not started by an MPI launcher; all cores by default.

    Returns:
        The dataset folder.

    Raises:
        UserError: a source, the tokenizer or the output folder is not usable.
    """
    target = config.output_dir
    build = Build(config, target.with_name(f".{target.name}.building"))
    with gather_crew(num_workers, meeting_folder=target.with_name(f".{target.name}.step")) as crew:
        if not _is_done(config):
            # Everybody looks at the target before anybody can have finished it.
            crew.wait()
            if crew.is_main:
                _begin(build)
            crew.wait()
            for name, work, count in _STEPS:
                _run_step(crew, build, name, work, count(build))
            if crew.is_main:
                _finish(build)
            crew.wait()
    return target


def _run_step(
    crew: Crew, build: Build, name: str, work: Callable[[Build, int], None], count: int
) -> None:
    outputs = [build.output(name, task) for task in range(count)]
    missing = sum(not output.exists() for output in outputs)
    if crew.is_main and missing:
        print(f"prepare: {name}: {missing} of {count} tasks", file=sys.stderr, flush=True)
    crew.run(functools.partial(work, build), outputs, claims=build.folder / "claims" / name)


def _is_done(config: PrepareConfig) -> bool:
    """Whether the output folder holds the dataset of this very config.

    Raises:
        UserError: it holds something else.
    """
    target = config.output_dir
    if not target.exists():
        return False
    if not (target / FILE_NAME).is_file():
        if target.is_dir() and not any(target.iterdir()):
            return False
        raise UserError(
            f"output_dir: {target} exists and is no dataset",
            fix="choose another output_dir, or remove it",
        )
    if read_manifest(target).recipe != recipe_of(config):
        raise UserError(
            f"output_dir: {target} holds a dataset made from another config or other inputs",
            fix="choose another output_dir, or remove it",
        )
    return True


def _begin(build: Build) -> None:
    """Continue a build of the same config and inputs, start over otherwise."""
    # Those of a killed build; there are none where this process works alone.
    shutil.rmtree(build.folder / "claims", ignore_errors=True)
    if build.output("plan", 0).exists() and build.plan.recipe != recipe_of(build.config):
        shutil.rmtree(build.folder)
        build.__dict__.pop("plan", None)
    if not build.output("plan", 0).exists():
        build.folder.mkdir(parents=True, exist_ok=True)
        make_plan(build)


def _finish(build: Build) -> None:
    """The finished folder takes its place in one rename; the parts are removed after."""
    target = build.config.output_dir
    if target.is_dir():
        target.rmdir()  # empty, or `_is_done` would have refused it
    (build.folder / "dataset").rename(target)
    shutil.rmtree(build.folder)
    for source in read_manifest(target).sources:
        for warning in source.warnings:
            print(f"prepare: warning: {source.name}: {warning}", file=sys.stderr, flush=True)
