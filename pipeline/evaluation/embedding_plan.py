"""Cut the distinct texts of all tasks into blocks of equal cost.

output_dir/plan/cut-1a2b3c4d5e6f/{texts.arrow,index.npz}
output_dir/store/MODEL/cut-1a2b3c4d5e6f/block-00000.npy       its vectors

    tasks --> distinct (role, instruction, length, text) --> longest first --> blocks --> plan/
                                                      element i of N embeds its blocks --> store/

Texts are sharded, not tasks: BRIGHT's Leetcode alone holds 41 % of that benchmark's tokens. Texts
whose vectors an earlier plan has led to stay in its blocks: a task more costs its own texts only.
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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import EvaluateConfig, EvaluatedModel
from pipeline.data.batch import assign_by_cost
from pipeline.errors import UserError
from pipeline.evaluation.models import check_fit
from pipeline.evaluation.tasks import instruction_for, list_elements, tasks_of
from pipeline.evaluation.texts import SCHEMA, DistinctTexts, Listing, Request, TextKey, list_task
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

# Enough that 64 elements get 32 blocks each; a killed element loses at most one.
_NUM_BLOCKS = 2048
_MIN_BLOCK_COST = 32_768.0
_TEXTS = "texts.arrow"
_INDEX = "index.npz"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Texts cut into blocks; letters: N texts.

    Attributes:
        digests: (N, 2) what each text is known by, sorted for `find_digests`.
        places: (N, 2) its block, and its row there.
        costs: of each block, in tokens of a short text.
    """

    folder: Path
    digests: NDArray[np.uint64]
    places: NDArray[np.int32]
    costs: NDArray[np.float64]

    @property
    def name(self) -> str:
        """Of its folders; a hash of what it holds."""
        return self.folder.name


def write_cut(parent: Path, texts: DistinctTexts) -> Cut:
    """Cut texts into blocks of about equal cost, longest texts first."""
    blocks = cut_blocks(texts.costs.tolist())
    sizes = np.array([len(rows) for rows in blocks])
    starts = np.cumsum(sizes) - sizes
    rows = np.arange(sizes.sum()) - np.repeat(starts, sizes)
    places = np.stack([np.repeat(np.arange(len(blocks)), sizes), rows], axis=1).astype(np.int32)
    content = hashlib.sha256(texts.digests.tobytes() + sizes.tobytes()).hexdigest()[:12]
    digests, places = sort_by_digest(texts.digests, places)
    cut = Cut(
        folder=parent / f"cut-{content}",
        digests=digests,
        places=places,
        costs=np.add.reduceat(texts.costs, starts),
    )
    with batch_writer(cut.folder / _TEXTS, SCHEMA) as write:
        for block in blocks:
            write(texts.block(block))
    # Last: its presence means that the cut is whole.
    save_arrays(cut.folder / _INDEX, digests=cut.digests, places=cut.places, costs=cut.costs)
    return cut


def read_cuts(parent: Path) -> list[Cut]:
    """All whole cuts, in the order of their names."""
    found = []
    for path in sorted(parent.glob(f"cut-*/{_INDEX}")):
        arrays = load_arrays(path, "digests", "places", "costs", fix=f"delete {path.parent}")
        found.append(Cut(folder=path.parent, **arrays))
    return found


def read_block(folder: Path, block: int) -> list[TextKey]:
    """The texts of a block, longest first; reads no other block.

    Args:
        folder: the cut's.
    """
    fix = f"delete {folder} and run `diffembed evaluate plan` again"
    rows = read_batch(folder / _TEXTS, block, fix=fix).to_pylist()
    return [TextKey(**row) for row in rows]


def cut_blocks(costs: Sequence[float]) -> list[range]:
    """Consecutive texts of about equal cost: a 2048th of all, but no less than a useful forward."""
    target = max(sum(costs) / _NUM_BLOCKS, _MIN_BLOCK_COST)
    blocks, start, cost = [], 0, 0.0
    for place, own in enumerate(costs):
        if place > start and cost + own > target:
            blocks.append(range(start, place))
            start, cost = place, 0.0
        cost += own
    if start < len(costs):
        blocks.append(range(start, len(costs)))
    return blocks


def sort_by_digest(
    digests_N2: NDArray[np.uint64], places_N2: NDArray[np.int32]
) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Both in the order that `find_digests` needs: an index is sorted once, when it is written.

    The digests lie column by column, in files too, so that a lookup searches the first as it is.
    """
    order_N = np.argsort(digests_N2[:, 0], kind="stable")
    return np.asfortranarray(digests_N2[order_N]), places_N2[order_N]


def find_digests(known_N2: NDArray[np.uint64], wanted_M2: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(M,) row of each wanted digest among the known ones, -1 where it is none of them.

    Args:
        known_N2: as `sort_by_digest` leaves them; M binary searches, whatever N is.
    """
    if len(known_N2) == 0:
        return np.full(len(wanted_M2), -1)
    at_M = np.searchsorted(known_N2[:, 0], wanted_M2[:, 0]).clip(max=len(known_N2) - 1)
    return np.where((known_N2[at_M] == wanted_M2).all(axis=1), at_M, -1)


def store_folder(config: EvaluateConfig, model: EvaluatedModel) -> Path:
    """Where a model's vectors are; another export has another folder.

    Raises:
        UserError: there is no export.
    """
    return config.output_dir / "store" / f"{model.name}-{model_fingerprint(model)}"


def block_path(store: Path, cut: str, block: int) -> Path:
    """Vectors of a cut's block, (texts, D) float16.

    Args:
        store: the model's.
    """
    return store / cut / f"block-{block:05d}.npy"


_VERSION = 4
_PLAN = "plan.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A written plan: how many texts there are and what each block costs.

    Attributes:
        num_texts: distinct ones; `num_occurrences` with the repetitions of tasks and lengths.
        occurrence_cost: what all occurrences would cost; the blocks' costs add up to less.
        blocks: the cut of each block and its number there.
        block_costs: in the same order.
    """

    folder: Path
    num_texts: int
    num_occurrences: int
    occurrence_cost: float
    lengths: tuple[int, ...]
    blocks: tuple[tuple[str, int], ...]
    block_costs: tuple[float, ...]

    def read_block(self, block: int) -> list[TextKey]:
        """The texts of a block, longest first; reads no other block."""
        cut, number = self.blocks[block]
        return read_block(self.folder.parent / cut, number)

    def block_path(self, store: Path, block: int) -> Path:
        """A block's vectors in a model's store."""
        return block_path(store, *self.blocks[block])


def write_plan(config: EvaluateConfig, *, num_workers: int = 1) -> Plan:
    """List, cut and write what the config's tasks need; loads every task's data once.

    Args:
        num_workers: processes that load tasks side by side; the plan does not depend on it.

    Raises:
        UserError: a task's data are missing or incomplete, or a text cannot fit the GPU.
    """
    check_fit(config)
    folder = plan_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the plan, not in /tmp: the texts of all tasks may be larger than a node's memory.
    with tempfile.TemporaryDirectory(prefix=".texts-", dir=folder) as scratch:
        listings = _list_tasks(config, Path(scratch), num_workers)
        distinct = DistinctTexts.of(listings)
        cuts = read_cuts(folder.parent)
        earlier = read_plan(config) if (folder / _PLAN).is_file() else None
        own = frozenset(earlier.blocks) if earlier else frozenset()
        places_N3 = _held_places(config, cuts, own, distinct.digests)
        new_N = places_N3[:, 0] < 0
        if new_N.any():
            cuts.append(write_cut(folder.parent, distinct.only(new_N)))
            at = find_digests(cuts[-1].digests, distinct.digests[new_N])
            places_N3[new_N, 0] = len(cuts) - 1
            places_N3[new_N, 1:] = cuts[-1].places[at]
    used_B2, block_N = np.unique(places_N3[:, :2], axis=0, return_inverse=True)
    plan = Plan(
        folder=folder,
        num_texts=len(distinct.costs),
        num_occurrences=sum(len(listing.rows) for listing in listings),
        occurrence_cost=float(sum(listing.costs.sum() for listing in listings)),
        lengths=_all_lengths(config),
        blocks=tuple((cuts[cut].name, int(block)) for cut, block in used_B2),
        block_costs=tuple(float(cuts[cut].costs[block]) for cut, block in used_B2),
    )
    if plan != earlier:
        # Its index must not be read with the blocks of another plan.
        (folder / _PLAN).unlink(missing_ok=True)
    places_N2 = np.stack([block_N.reshape(-1), places_N3[:, 2]], axis=1).astype(np.int32)
    digests_N2, places_N2 = sort_by_digest(distinct.digests, places_N2)
    save_arrays(folder / "index.npz", digests=digests_N2, places=places_N2)
    # Last: its presence means that the plan is whole.
    write_sealed(folder / _PLAN, {"version": _VERSION, **_as_json(plan)})
    return plan


def _held_places(
    config: EvaluateConfig,
    cuts: Sequence[Cut],
    own: Set[tuple[str, int]],
    digests_N2: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """(N, 3) cut, block and row of texts that are in usable blocks; -1 for all others.

    Usable is a block that every model has embedded, or that this very plan has had before (`own`).
    Any other might cost more than it saves: blocks mix tasks, those that nobody asks for any more
    among them.
    """
    places_N3 = np.full((len(digests_N2), 3), -1)
    for number, cut in enumerate(cuts):
        embedded = _embedded_blocks(config, cut)
        usable = np.array([b in embedded or (cut.name, b) in own for b in range(len(cut.costs))])
        at_N = find_digests(cut.digests, digests_N2)
        chosen_N = (places_N3[:, 0] < 0) & (at_N >= 0) & usable[cut.places[at_N, 0]]
        places_N3[chosen_N, 0] = number
        places_N3[chosen_N, 1:] = cut.places[at_N[chosen_N]]
    return places_N3


def _embedded_blocks(config: EvaluateConfig, cut: Cut) -> set[int]:
    """Blocks of which every model's vectors are there."""
    try:
        stores = [store_folder(config, model) for model in config.models]
    except UserError:
        return set()  # a plan may be made before its exports
    return {
        block
        for block in range(len(cut.costs))
        if all(block_path(store, cut.name, block).is_file() for store in stores)
    }


def read_plan(config: EvaluateConfig) -> Plan:
    """The plan of this config.

    Raises:
        UserError: there is none, or the tasks, lengths, instructions or snapshots have changed.
    """
    folder = plan_folder(config)
    if not (folder / _PLAN).is_file():
        raise UserError(
            f"{folder}: no plan for these tasks, lengths, instructions and snapshots",
            fix="run `diffembed evaluate plan` with this config",
        )
    fix = f"delete {folder} and run `diffembed evaluate plan` again"
    tree = unseal(read_json(folder / _PLAN, fix=fix), folder / _PLAN, fix=fix)
    tree = {**tree, "folder": str(folder)} if isinstance(tree, dict) else tree
    return check_kind(tree, Plan, where=str(folder / _PLAN), fix=fix)


def plan_folder(config: EvaluateConfig) -> Path:
    """Where the plan of these tasks, lengths, instructions and snapshots is."""
    requests = [
        [r.task, r.instructions, r.lengths, *([str(r.own.path), r.own.split] if r.own else [])]
        for r in _requests(config)
    ]
    inputs = [_VERSION, str(config.snapshots), requests]
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]
    return config.output_dir / "plan" / digest


def assign(costs: Sequence[float], num_elements: int) -> list[list[int]]:
    """Return the units of each element, most expensive first; see `assign_by_cost`."""
    cost_U = np.array(costs, dtype=np.float64)
    element_U = assign_by_cost(cost_U, num_elements)
    order_U = np.argsort(-cost_U, kind="stable")
    return [order_U[element_U[order_U] == element].tolist() for element in range(num_elements)]


def _all_lengths(config: EvaluateConfig) -> tuple[int, ...]:
    return tuple(sorted({element.max_length for element in list_elements(config)}))


def _requests(config: EvaluateConfig) -> list[Request]:
    """What to list of each task; models that word a task differently share its documents."""
    instructions: dict[str, dict[str, None]] = {}
    lengths: dict[str, dict[int, None]] = {}
    for element in list_elements(config):
        wording = instruction_for(element.task, element.model, config)
        instructions.setdefault(element.task, {})[wording] = None
        lengths.setdefault(element.task, {})[element.max_length] = None
    tasks = tasks_of(config)
    return [
        Request(
            task=task,
            instructions=tuple(sorted(wordings)),
            lengths=tuple(sorted(lengths[task])),
            own=tasks[task],
        )
        for task, wordings in sorted(instructions.items())
    ]


def _list_tasks(config: EvaluateConfig, folder: Path, num_workers: int) -> list[Listing]:
    requests = _requests(config)
    work = functools.partial(
        list_task, snapshots=config.snapshots, all_lengths=_all_lengths(config), folder=folder
    )
    with contextlib.closing(LocalWorkers(min(num_workers, len(requests)))) as workers:
        listed = dict(workers.each(work, requests))
    return [listed[request] for request in requests]


def _as_json(plan: Plan) -> dict[str, Any]:
    tree = dataclasses.asdict(plan)
    del tree["folder"]
    return tree
