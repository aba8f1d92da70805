"""Write the plan of an evaluation: the distinct texts of all tasks, in blocks of equal cost.

    tasks --> distinct texts, longest first --> blocks --> element i of N embeds its share

    output_dir/plan/cut-1a2b3c4d5e6f/texts.arrow             texts, one Arrow batch per block
                                     index.npz               digest of a text -> block, row
               0123456789ab/plan.json                        the blocks that the plan uses
                            index.npz                        digest of a text -> block, row
    output_dir/store/MODEL/cut-1a2b3c4d5e6f/block-00000.npy  vectors of a block

Texts are divided, not tasks: BRIGHT's Leetcode alone has 41 % of that benchmark's tokens. A text
that an earlier plan has embedded stays in its block: one more task costs its new texts only.

Letters: N, M texts; B blocks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import EvaluateConfig, EvaluatedModel
from pipeline.errors import UserError
from pipeline.evaluation.distinct_texts import (
    SCHEMA,
    DistinctTexts,
    PlannedTask,
    PlannedText,
    TaskTexts,
    list_texts,
)
from pipeline.evaluation.models import check_fit
from pipeline.evaluation.tasks import instruction_for, list_elements, tasks_of
from pipeline.files import (
    batch_writer,
    check_kind,
    load_arrays,
    read_batch,
    read_json,
    save_arrays,
    unseal,
    write_sealed,
)
from pipeline.model.export_folder import model_fingerprint
from pipeline.workers import LocalWorkers

# Enough that each of 64 elements gets 32 blocks; a killed element loses at most one.
_NUM_BLOCKS = 2048
# A useful forward, in tokens.
_MIN_BLOCK_COST = 32_768.0
_TEXTS = "texts.arrow"
_INDEX = "index.npz"
# Part of a plan's identity: plans of another version are made again.
_VERSION = 4
_PLAN = "plan.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingPlan:
    """A written plan: the blocks to embed, and their costs.

    Attributes:
        folder: of the plan.
        num_texts: distinct texts.
        num_occurrences: texts, with the repetitions of tasks and lengths.
        occurrence_cost: of embedding all occurrences; the costs of the blocks sum to less.
        lengths: all lengths of the evaluation, ascending.
        blocks: name of the block file of each block, and its number there.
        block_costs: of each block, in tokens of a short text.
    """

    folder: Path
    num_texts: int
    num_occurrences: int
    occurrence_cost: float
    lengths: tuple[int, ...]
    blocks: tuple[tuple[str, int], ...]
    block_costs: tuple[float, ...]

    def read_block(self, block: int) -> list[PlannedText]:
        """Read the texts of a block, longest first, and no other block."""
        name, number = self.blocks[block]
        folder = self.folder.parent / name
        fix = f"delete {folder} and run `diffembed evaluate plan` again"
        rows = read_batch(folder / _TEXTS, number, fix=fix).to_pylist()
        return [PlannedText(**row) for row in rows]

    def vectors_path(self, store: Path, block: int) -> Path:
        """Return the path of a block's vectors in a model's store."""
        return vectors_path(store, *self.blocks[block])


def write_plan(config: EvaluateConfig, *, num_workers: int = 1) -> EmbeddingPlan:
    """List, divide and write the texts of the config's tasks; loads every task's data once.

    Args:
        num_workers: processes that load tasks in parallel; the plan does not depend on it.

    Raises:
        UserError: a task's data are missing or incomplete, or a text cannot fit the GPU.
    """
    check_fit(config)
    folder = plan_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    # In the plan's folder, not in /tmp: the texts of all tasks may be larger than a node's memory.
    with tempfile.TemporaryDirectory(prefix=".texts-", dir=folder) as scratch:
        tasks = _list_tasks(config, Path(scratch), num_workers)
        distinct = DistinctTexts.of(tasks)
        files = read_block_files(folder.parent)
        # Planned again: data may have changed, or blocks of other plans were embedded.
        earlier = read_plan(config) if (folder / _PLAN).is_file() else None
        # Blocks of this plan stay usable, or planning again would start over.
        own = frozenset(earlier.blocks) if earlier else frozenset()
        positions_N3 = _known_positions(config, files, own, distinct.digests)
        new_N = positions_N3[:, 0] < 0
        if new_N.any():
            files.append(write_block_file(folder.parent, distinct.only(new_N)))
            at = find_digests(files[-1].digests, distinct.digests[new_N])
            positions_N3[new_N, 0] = len(files) - 1
            positions_N3[new_N, 1:] = files[-1].positions[at]
    # Blocks that hold at least one text of this plan; each is embedded as a whole.
    used_B2, block_N = np.unique(positions_N3[:, :2], axis=0, return_inverse=True)
    plan = EmbeddingPlan(
        folder=folder,
        num_texts=len(distinct.costs),
        num_occurrences=sum(len(task.rows) for task in tasks),
        occurrence_cost=float(sum(task.costs.sum() for task in tasks)),
        lengths=_all_lengths(config),
        blocks=tuple((files[file].name, int(block)) for file, block in used_B2),
        block_costs=tuple(float(files[file].costs[block]) for file, block in used_B2),
    )
    if plan != earlier:
        # Its index must not be read with the blocks of another plan.
        (folder / _PLAN).unlink(missing_ok=True)
    # (N, 2): number in `plan.blocks`, and row in that block.
    positions_N2 = np.stack([block_N.reshape(-1), positions_N3[:, 2]], axis=1).astype(np.int32)
    digests_N2, positions_N2 = sort_by_digest(distinct.digests, positions_N2)
    save_arrays(folder / _INDEX, digests=digests_N2, places=positions_N2)
    # Last: its presence means that the plan is whole.
    tree = dataclasses.asdict(plan)
    del tree["folder"]  # see `read_plan`
    write_sealed(folder / _PLAN, {"version": _VERSION, **tree})
    return plan


def _known_positions(
    config: EvaluateConfig,
    files: Sequence[BlockFile],
    own: Set[tuple[str, int]],
    digests_N2: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """Return (N, 3) file, block and row of texts in usable blocks; -1 for all others.

    A block is usable if every model has embedded it, or if this very plan had it before (`own`).
    Any other might cost more than it saves: blocks mix tasks, and some may no longer be evaluated.
    """
    positions_N3 = np.full((len(digests_N2), 3), -1)
    for number, file in enumerate(files):
        embedded = _embedded_blocks(config, file)
        usable = np.array([b in embedded or (file.name, b) in own for b in range(len(file.costs))])
        at_N = find_digests(file.digests, digests_N2)
        # The first file with a text wins. Unknown texts (-1) read a wrong entry of `usable`, which
        # `at_N >= 0` discards.
        chosen_N = (positions_N3[:, 0] < 0) & (at_N >= 0) & usable[file.positions[at_N, 0]]
        positions_N3[chosen_N, 0] = number
        positions_N3[chosen_N, 1:] = file.positions[at_N[chosen_N]]
    return positions_N3


def _embedded_blocks(config: EvaluateConfig, file: BlockFile) -> set[int]:
    """Return the blocks that every model has embedded."""
    try:
        stores = [store_folder(config, model) for model in config.models]
    except UserError:
        return set()  # a plan may be made before its exports
    return {
        block
        for block in range(len(file.costs))
        if all(vectors_path(store, file.name, block).is_file() for store in stores)
    }


def read_plan(config: EvaluateConfig) -> EmbeddingPlan:
    """Read the plan of a config.

    Raises:
        UserError: not made yet, or the tasks, lengths, instructions or snapshots have changed.
    """
    folder = plan_folder(config)
    if not (folder / _PLAN).is_file():
        raise UserError(
            f"{folder}: no plan for these tasks, lengths, instructions and snapshots",
            fix="run `diffembed evaluate plan` with this config",
        )
    fix = f"delete {folder} and run `diffembed evaluate plan` again"
    tree = unseal(read_json(folder / _PLAN, fix=fix), folder / _PLAN, fix=fix)
    # The file does not name its folder, so that an output folder can be moved.
    tree = {**tree, "folder": str(folder)} if isinstance(tree, dict) else tree
    return check_kind(tree, EmbeddingPlan, where=str(folder / _PLAN), fix=fix)


def plan_folder(config: EvaluateConfig) -> Path:
    """Return the folder of the plan of these tasks, lengths, instructions and snapshots."""
    tasks = [
        [t.task, t.instructions, t.lengths, *([str(t.own.path), t.own.split] if t.own else [])]
        for t in _planned_tasks(config)
    ]
    # Models count only by their instructions: a plan does not depend on exports.
    inputs = [_VERSION, str(config.snapshots), tasks]
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]
    return config.output_dir / "plan" / digest


def _all_lengths(config: EvaluateConfig) -> tuple[int, ...]:
    return tuple(sorted({element.max_length for element in list_elements(config)}))


def _planned_tasks(config: EvaluateConfig) -> list[PlannedTask]:
    """Collect instructions and lengths by task; models share the documents of a task."""
    # Dicts as ordered sets.
    instructions: dict[str, dict[str, None]] = {}
    lengths: dict[str, dict[int, None]] = {}
    for element in list_elements(config):
        instruction = instruction_for(element.task, element.model, config)
        instructions.setdefault(element.task, {})[instruction] = None
        lengths.setdefault(element.task, {})[element.max_length] = None
    own = tasks_of(config)
    return [
        PlannedTask(
            task=task,
            instructions=tuple(sorted(found)),
            lengths=tuple(sorted(lengths[task])),
            own=own[task],
        )
        for task, found in sorted(instructions.items())
    ]


def _list_tasks(config: EvaluateConfig, folder: Path, num_workers: int) -> list[TaskTexts]:
    tasks = _planned_tasks(config)
    work = functools.partial(
        list_texts, snapshots=config.snapshots, all_lengths=_all_lengths(config), folder=folder
    )
    num_workers = min(num_workers, len(tasks))
    with contextlib.closing(LocalWorkers(num_workers, imports=("mteb",))) as workers:
        listed = dict(workers.each(work, tasks))
    # In the order of the tasks, not of completion: the plan does not depend on their speed.
    return [listed[task] for task in tasks]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockFile:
    """A file of texts in blocks, with its index.

    Attributes:
        folder: of texts and index.
        digests: (N, 2) identities of the texts, sorted for `find_digests`.
        positions: (N, 2) block of each text, and its row there.
        costs: (B,) of each block, in tokens of a short text.
    """

    folder: Path
    digests: NDArray[np.uint64]
    positions: NDArray[np.int32]
    costs: NDArray[np.float64]

    @property
    def name(self) -> str:
        """The name of its folder: a hash of its content."""
        return self.folder.name


def write_block_file(parent: Path, texts: DistinctTexts) -> BlockFile:
    """Write texts in blocks of about equal cost, longest texts first."""
    # Longest first: a block has texts of similar length, which pack well.
    blocks = divide(texts.costs.tolist())
    sizes = np.array([len(rows) for rows in blocks])
    # First text of each block, and each text's row in its block.
    starts = np.cumsum(sizes) - sizes
    rows = np.arange(sizes.sum()) - np.repeat(starts, sizes)
    positions = np.stack([np.repeat(np.arange(len(blocks)), sizes), rows], axis=1).astype(np.int32)
    # The same texts in the same blocks have the same name, so that vectors can be reused.
    content = hashlib.sha256(texts.digests.tobytes() + sizes.tobytes()).hexdigest()[:12]
    digests, positions = sort_by_digest(texts.digests, positions)
    file = BlockFile(
        # Named `cut-` since the first version; stores on disk depend on it.
        folder=parent / f"cut-{content}",
        digests=digests,
        positions=positions,
        costs=np.add.reduceat(texts.costs, starts),
    )
    with batch_writer(file.folder / _TEXTS, SCHEMA) as write:
        for block in blocks:
            write(texts.block(block))
    # Last: its presence means that the file of texts is whole.
    save_arrays(file.folder / _INDEX, digests=digests, places=positions, costs=file.costs)
    return file


def read_block_files(parent: Path) -> list[BlockFile]:
    """Read all whole block files, sorted by name; their texts stay on disk."""
    found = []
    # The index is written last: without it the file of texts may be half.
    for path in sorted(parent.glob(f"cut-*/{_INDEX}")):
        arrays = load_arrays(path, "digests", "places", "costs", fix=f"delete {path.parent}")
        found.append(
            BlockFile(
                folder=path.parent,
                digests=arrays["digests"],
                positions=arrays["places"],
                costs=arrays["costs"],
            )
        )
    return found


def divide(costs: Sequence[float]) -> list[range]:
    """Divide texts into consecutive blocks of about equal cost.

    A block is a 2048th of all texts, but no less than a useful forward.
    """
    target = max(sum(costs) / _NUM_BLOCKS, _MIN_BLOCK_COST)
    blocks, start, cost = [], 0, 0.0
    for row, own in enumerate(costs):
        # A text beyond the target gets a block to itself.
        if row > start and cost + own > target:
            blocks.append(range(start, row))
            start, cost = row, 0.0
        cost += own
    if start < len(costs):
        blocks.append(range(start, len(costs)))
    return blocks


def sort_by_digest(
    digests_N2: NDArray[np.uint64], positions_N2: NDArray[np.int32]
) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Sort both for `find_digests`: an index is sorted once, when it is written.

    Digests are stored column by column, in files too: a lookup searches the first column, and must
    not copy it.
    """
    # By the first 8 bytes, which tell all texts of a plan apart (see `DistinctTexts.of`).
    order_N = np.argsort(digests_N2[:, 0], kind="stable")
    return np.asfortranarray(digests_N2[order_N]), positions_N2[order_N]


def find_digests(known_N2: NDArray[np.uint64], wanted_M2: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return (M,) row of each wanted digest among the known ones, -1 for unknown digests.

    Args:
        known_N2: sorted by `sort_by_digest`.
        wanted_M2: in any order; each costs one binary search.
    """
    if len(known_N2) == 0:
        return np.full(len(wanted_M2), -1)
    # A digest beyond the last one has no row; it is compared with the last, and differs.
    at_M = np.searchsorted(known_N2[:, 0], wanted_M2[:, 0]).clip(max=len(known_N2) - 1)
    return np.where((known_N2[at_M] == wanted_M2).all(axis=1), at_M, -1)


def store_folder(config: EvaluateConfig, model: EvaluatedModel) -> Path:
    """Return the folder of a model's vectors; another export has another folder.

    Raises:
        UserError: there is no export.
    """
    return config.output_dir / "store" / f"{model.name}-{model_fingerprint(model)}"


def vectors_path(store: Path, file: str, block: int) -> Path:
    """Return the path of a block's vectors, (texts, D) float16.

    Args:
        store: of the model.
        file: name of the block file.
        block: its number there.
    """
    return store / file / f"block-{block:05d}.npy"
