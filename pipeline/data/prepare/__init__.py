"""Turn raw files into a dataset folder: in parallel, resumable, with the same bytes every time.

    step        tasks     a row of source "faq" on its way
    ----        -----     ---------------------------------
    make_plan   1         rows.jsonl bytes 0-40000 is block 0; its documents fall into 2 slices
    lookup      sources   (only where rows name documents by id: id d7 -> "a lake")
    collect     blocks    {"query": "river?", "pos": ["flowing water"], "neg": ["a lake", ""]}
                            -> query "Instruct: Define\nQuery: river?", positives [91c4..],
                               negatives [0a7e..]; "" is dropped; texts by hash to slices 1 and 0
    check       1         (bad rows of all blocks are refused together)
    dedup       slices    0a7e.. also occurs in block 3: its text is taken from block 0
    sign        slices    "a lake" -> 128 MinHash values, 16 band keys
    pair        bands     "a lake" and "A lake." share a band and 90 % of the values: one document
    catalogue   1         0a7e.. is document 0, 91c4.. document 1; (faq, "Define") is group 0
    tokenise    slices    document 0 -> [64, 12, 7]
    relate      blocks    query [9, 31, 4, 8], positives [1], negatives [0], sorted by group
    layout      1         documents 0-1 go to shard documents-00000, examples 0-99 to examples-00000
    pack        shards    documents-00000.arrow, its sha256 and lengths
    manifest    1         report.md, dropped.jsonl (with ""), recipe.json, manifest.json

build.py lists the files that the steps hand each other. A task's output appears by rename; a task
whose output exists is not run again, so that a killed build continues where it stopped.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.config import PrepareConfig
from pipeline.data.manifest import RECIPE_NAME, holds_dataset, read_manifest
from pipeline.data.prepare.build import Build, Progress, describe, make_plan, say
from pipeline.data.prepare.clean import check_rows, collect_block, dedup_slice, store_corpus
from pipeline.data.prepare.recipe import find_change, read_recipe
from pipeline.data.prepare.tokenise import (
    NUM_BANDS,
    make_catalogue,
    pair_band,
    relate_block,
    sign_slice,
    tokenise_slice,
)
from pipeline.data.prepare.write_shards import (
    complete_dataset,
    count_unwanted,
    lay_out,
    pack_shard,
    read_layout,
)
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.files import resolve_target
from pipeline.workers import Workers, build_alone


class Step(NamedTuple):
    """A step: its folder's name, its work on one task, and how many tasks it has."""

    name: str
    work: Callable[[Build, int], None]
    num_tasks: Callable[[Build], int]


def _one(build: Build) -> int:
    return 1


def _blocks(build: Build) -> int:
    return len(build.plan.blocks)


def _slices(build: Build) -> int:
    return build.plan.num_slices


STEPS = (
    Step("lookup", store_corpus, lambda build: len(build.plan.sources)),
    Step("collect", collect_block, _blocks),
    Step("check", check_rows, _one),
    Step("dedup", dedup_slice, _slices),
    Step("sign", sign_slice, lambda build: _slices(build) if build.finds_near_duplicates else 0),
    Step("pair", pair_band, lambda build: NUM_BANDS if build.finds_near_duplicates else 0),
    Step("catalogue", make_catalogue, _one),
    Step("tokenise", tokenise_slice, _slices),
    Step("relate", relate_block, _blocks),
    Step("layout", lay_out, _one),
    Step("pack", pack_shard, lambda build: len(read_layout(build))),
    Step("manifest", complete_dataset, _one),
)


def prepare(
    config: PrepareConfig, *, num_workers: int | None = None, steps: Sequence[Step] = STEPS
) -> Path:
    """Build the dataset folder of a config, alone or as one rank of an MPI job.

    After an interruption at any point, the same call continues. A folder that is already complete
    for the same config and inputs stays untouched. Of several calls for one folder, one works and
    the others wait for it.

    Args:
        config: the inputs, how to tokenise them, and where to write.
        num_workers: processes when not started by an MPI launcher; all cores by default.
        steps: run in this order; after the last one the dataset gets its final name.

    Returns:
        The dataset folder.

    Raises:
        UserError: a source, the tokenizer or the output folder is not usable.
    """
    target = resolve_target(config.output_dir, key="output_dir")
    build = Build(config, target.with_name(f".{target.name}.building"))
    with build_alone(
        target,
        key="output_dir",
        num_workers=num_workers,
        is_done=lambda: not build.folder.exists() and _is_done(config, target),
        start=lambda: _start_or_continue(build, target),
        say=say,
    ) as workers:
        # Without a plan the dataset was already complete, and the main rank started nothing.
        if build.plan_path.exists():
            _run_steps(workers, build, steps)
            if workers.is_main:
                _finish(build, target)
    return config.output_dir


def _is_done(config: PrepareConfig, target: Path) -> bool:
    """Return whether the output folder holds the dataset of this config and these inputs.

    Raises:
        UserError: it holds something else.
    """
    if not holds_dataset(target, key="output_dir"):
        return False
    recipe, dataset = read_recipe(target), Dataset.open(target, verify=True)
    change = find_change(config, recipe)
    if change is None and recipe.fingerprint != dataset.manifest.recipe:
        change = f"{RECIPE_NAME} is of another dataset"
    if change is not None:
        raise UserError(
            f"output_dir: {target} holds a dataset made from another config or other inputs: "
            f"{change}",
            fix="choose another output_dir, or remove it",
            docs="trouble.md#other-dataset",
        )
    print(f"{config.output_dir} is complete: {_describe(config)}", flush=True)
    return True


def _start_or_continue(build: Build, target: Path) -> None:
    """Continue a build of the same config and inputs, or start over.

    If another process has finished the dataset in the meantime, do neither.
    """
    if _is_done(build.config, target):
        # Left by a process that was killed after the rename of the dataset.
        shutil.rmtree(build.folder, ignore_errors=True)
        return
    # A claim that a killed rank left would keep its task from ever being done.
    shutil.rmtree(build.folder / "claims", ignore_errors=True)
    if build.plan_path.exists():
        change = _change_since_start(build)
        if change is None:
            return
        say(f"starting over: {change}")
        shutil.rmtree(build.folder)
        build.__dict__.pop("plan", None)  # the cached plan of the removed folder
    try:
        make_plan(build)
    except BaseException:  # an interruption by the user, too
        # Without a plan, a later call can use nothing in the folder.
        shutil.rmtree(build.folder, ignore_errors=True)
        raise


def _change_since_start(build: Build) -> str | None:
    try:
        recipe = read_recipe(build.folder)
    except UserError as error:
        return str(error)
    return find_change(build.config, recipe)


def _run_steps(workers: Workers, build: Build, steps: Sequence[Step]) -> None:
    """Run all steps; after an error, print what happens to the finished work."""
    try:
        for step in steps:
            num_tasks = step.num_tasks(build)
            progress = Progress(build, step.name, num_tasks)
            workers.run(
                functools.partial(step.work, build),
                [build.summary_path(step.name, task) for task in range(num_tasks)],
                claims=build.folder / "claims" / step.name,
                on_done=progress.update if workers.is_main else lambda: None,
            )
            if workers.is_main:
                progress.finish()
    except Exception:
        say(
            f"finished work is kept in {build.folder}; the same command continues it, or "
            f"starts over if the config or an input has changed by then"
        )
        raise


def _finish(build: Build, target: Path) -> None:
    """Give the dataset its final name, and remove the rest of the build.

    Raises:
        UserError: an input was changed while it was read.
    """
    # Read before the rename, after which the summaries are removed.
    unwanted = count_unwanted(build)
    held_out = json.loads(build.summary_path("manifest", 0).read_text()).get("held_out", [])
    # Tasks read the inputs for hours. If one changed meanwhile, its hash in the recipe would not be
    # that of the rows in the shards.
    if change := _change_since_start(build):
        raise UserError(f"{change}, while it was prepared", fix="run the same command again")
    if target.is_dir():
        target.rmdir()  # empty, or `_is_done` would have refused it
    build.dataset.rename(target)
    shutil.rmtree(build.folder)
    for source in read_manifest(target).sources:
        for warning in source.warnings:
            say(f"warning: {source.name}: {warning}")
    for line in held_out:
        say(f"holdout: {line}")
    if unwanted:
        say(f"records left out by `where`: {unwanted:,}")
    print(_describe(build.config), flush=True)


def _describe(config: PrepareConfig) -> str:
    return describe(read_manifest(config.output_dir), config.output_dir)
