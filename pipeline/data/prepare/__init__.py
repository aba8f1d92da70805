"""Raw data to a dataset folder: in parallel, resumable, always the same bytes.

    lookup -> collect -> check -> dedup -> sign -> pair -> catalogue
    sources   blocks     one      slices   slices  bands   one

    -> tokenise -> relate -> layout -> pack -> manifest
       slices      blocks    one       shards  one

Each step is a set of tasks; a task's output appears by rename, and what exists is not done again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.config import PrepareConfig
from pipeline.data.manifest import FILE_NAME, RECIPE_NAME, read_manifest
from pipeline.data.prepare.clean import check_rows, collect_block, dedup_slice, shelve_documents
from pipeline.data.prepare.near_duplicates import NUM_BANDS, pair_band, sign_slice
from pipeline.data.prepare.plan import Build, Progress, describe, make_plan, say
from pipeline.data.prepare.recipe import find_change, prepare_status, read_recipe
from pipeline.data.prepare.tokenise import make_catalogue, relate_block, tokenise_slice
from pipeline.data.prepare.write_shards import (
    count_unwanted,
    lay_out,
    pack_shard,
    read_layout,
    write_manifest,
)
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.files import hold_lock, require_writable
from pipeline.tokenizer import tokenizer_fingerprint
from pipeline.workers import Workers, open_workers

__all__ = ["prepare_status", "tokenizer_fingerprint"]

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
    ("check", check_rows, _one),
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
    same config and inputs is left as it is. Of several calls for one folder, one works and the
    others wait for it.

    Args:
        config: what to read, how to tokenise it, and where to write.
        num_workers: processes when not started by an MPI launcher; all cores by default.

    Returns:
        The dataset folder.

    Raises:
        UserError: a source, the tokenizer or the output folder is not usable.
    """
    target = _require_place(config.output_dir)
    build = Build(config, target.with_name(f".{target.name}.building"))
    rendezvous = target.with_name(f".{target.name}.step")
    with (
        open_workers(num_workers, rendezvous=rendezvous) as workers,
        contextlib.ExitStack() as stack,
    ):
        # Shards that are whole may be on a disk that is not writable, where no lock can be held.
        if workers.is_main and (build.folder.exists() or not _is_done(config, target)):
            require_writable(target.parent, key="output_dir")
            lock = target.with_name(f".{target.name}.lock")
            stack.enter_context(hold_lock(lock, tell=_say_who_is_first))
            _begin(build, target)
        workers.barrier()
        # Where the dataset is whole already, the main rank has begun nothing.
        if build.output("plan", 0).exists():
            _work(workers, build)
            if workers.is_main:
                _finish(build, target)
            workers.barrier()
    return config.output_dir


def _require_place(folder: Path) -> Path:
    """The real place of a dataset, which can be renamed to when the work is done.

    Raises:
        UserError: it cannot be.
    """
    target = folder.resolve()
    if os.path.ismount(target):
        raise UserError(
            f"output_dir: {folder} is where a file system is mounted", fix="name a folder inside it"
        )
    # Names of the folder's helpers are longer by this much.
    longest = 255 - len(".building-00000000-0000-000")
    if len(os.fsencode(target.name)) > longest:
        raise UserError(f"output_dir: {folder}", allowed=f"a name of at most {longest} bytes")
    return target


def _say_who_is_first(holder: str) -> None:
    say(f"waiting for another prepare of this folder ({holder})")


def _work(workers: Workers, build: Build) -> None:
    """Run all steps; after an error, say what becomes of the work that is done."""
    try:
        for name, work, count in _STEPS:
            outputs = [build.output(name, task) for task in range(count(build))]
            progress = Progress(name, outputs)
            workers.run(
                functools.partial(work, build),
                outputs,
                claims=build.folder / "claims" / name,
                on_done=progress.update if workers.is_main else lambda: None,
            )
            if workers.is_main:
                progress.finish()
    except Exception:
        say(
            f"what is done so far is kept in {build.folder}; the same command continues it, or "
            f"starts over if the config or an input is another by then"
        )
        raise


def _is_done(config: PrepareConfig, target: Path) -> bool:
    """Say whether the output folder holds the dataset of this very config and these very inputs.

    Raises:
        UserError: it holds something else.
    """
    if not target.exists():
        return False
    if not (target / FILE_NAME).is_file():
        if target.is_dir() and not any(target.iterdir()):
            return False
        raise UserError(
            f"output_dir: {target} exists and is no dataset",
            fix="choose another output_dir, or remove it",
        )
    recipe, dataset = read_recipe(target), Dataset.open(target, verify=True)
    change = find_change(config, recipe)
    if change is None and recipe.fingerprint != dataset.manifest.recipe:
        change = f"{RECIPE_NAME} is of another dataset"
    if change is not None:
        raise UserError(
            f"output_dir: {target} holds a dataset made from another config or other inputs: "
            f"{change}",
            fix="choose another output_dir, or remove it",
        )
    print(f"{config.output_dir} is whole: {_describe(config)}", flush=True)
    return True


def _begin(build: Build, target: Path) -> None:
    """Continue a build of the same config and inputs, or start over.

    Nothing is begun where another process has finished the dataset meanwhile.
    """
    if _is_done(build.config, target):
        # Of a process that was killed between its last two steps.
        shutil.rmtree(build.folder, ignore_errors=True)
        return
    # Those of a killed build; there are none where this process works alone.
    shutil.rmtree(build.folder / "claims", ignore_errors=True)
    if build.output("plan", 0).exists():
        change = _change_since_begun(build)
        if change is None:
            return
        say(f"starting over: {change}")
        shutil.rmtree(build.folder)
        build.__dict__.pop("plan", None)
    try:
        make_plan(build)
    except BaseException:
        # Without a plan, nothing in it is of use to a later call.
        shutil.rmtree(build.folder, ignore_errors=True)
        raise


def _change_since_begun(build: Build) -> str | None:
    try:
        recipe = read_recipe(build.folder)
    except UserError as error:
        return str(error)
    return find_change(build.config, recipe)


def _finish(build: Build, target: Path) -> None:
    """Rename the finished folder to its place; the parts are removed after.

    Raises:
        UserError: an input was changed while it was read.
    """
    unwanted = count_unwanted(build)
    if change := _change_since_begun(build):
        raise UserError(f"{change}, while it was prepared", fix="run the same command again")
    if target.is_dir():
        target.rmdir()  # empty, or `_is_done` would have refused it
    (build.folder / "dataset").rename(target)
    shutil.rmtree(build.folder)
    for source in read_manifest(target).sources:
        for warning in source.warnings:
            say(f"warning: {source.name}: {warning}")
    if unwanted:
        say(f"records left out by `where`: {unwanted:,}")
    print(_describe(build.config), flush=True)


def _describe(config: PrepareConfig) -> str:
    return describe(read_manifest(config.output_dir), config.output_dir)
