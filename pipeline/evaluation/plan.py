"""Every distinct text of all tasks, once, cut into blocks of equal cost for an array to embed.

    tasks --> distinct (role, instruction, length, text) --> longest first --> blocks --> plan/
                                                      element i of N embeds its blocks --> store/

Texts are sharded, not tasks: BRIGHT's Leetcode alone holds 41 % of that benchmark's tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import json
import multiprocessing
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.distinct import SCHEMA, DistinctTexts
from pipeline.evaluation.elements import list_elements
from pipeline.evaluation.guard import check_fit
from pipeline.evaluation.instructions import instruction_for
from pipeline.evaluation.keys import TextKey
from pipeline.evaluation.listing import Listing, Request, list_task
from pipeline.run_dir import atomic_path, write_json

_VERSION = 3
_TEXTS = "texts.arrow"
# Enough that 64 elements get 32 blocks each; a killed element loses at most one.
_NUM_BLOCKS = 2048
_MIN_BLOCK_COST = 32_768.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A written plan: how many texts there are and what each block costs.

    Attributes:
        num_texts: distinct ones; `num_occurrences` with the repetitions of tasks and lengths.
        occurrence_cost: what all occurrences would cost; the blocks' costs add up to less.
    """

    folder: Path
    num_texts: int
    num_occurrences: int
    occurrence_cost: float
    lengths: tuple[int, ...]
    block_costs: tuple[float, ...]

    def read_block(self, block: int) -> list[TextKey]:
        """The texts of a block, longest first; reads no other block."""
        with pa.memory_map(str(self.folder / _TEXTS)) as file:
            rows = pyarrow.ipc.open_file(file).get_batch(block).to_pylist()
        return [TextKey(**row) for row in rows]


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
        blocks = cut_blocks(distinct.costs.tolist())
        _write_texts(folder / _TEXTS, (distinct.block(rows) for rows in blocks))
    sizes = np.array([len(rows) for rows in blocks])
    places = np.stack(
        [
            np.repeat(np.arange(len(blocks)), sizes),
            np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes),
        ],
        axis=1,
    ).astype(np.int32)
    with atomic_path(folder / "index.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, digests=distinct.digests, places=places)
    sums = np.add.reduceat(distinct.costs, np.cumsum(sizes) - sizes)
    plan = Plan(
        folder=folder,
        num_texts=len(distinct.costs),
        num_occurrences=sum(len(listing.rows) for listing in listings),
        occurrence_cost=float(sum(listing.costs.sum() for listing in listings)),
        lengths=_all_lengths(config),
        block_costs=tuple(sums.tolist()),
    )
    # Last: its presence means that the plan is whole.
    write_json(folder / "plan.json", {"version": _VERSION, **_as_json(plan)})
    return plan


def read_plan(config: EvaluateConfig) -> Plan:
    """The plan of this config.

    Raises:
        UserError: there is none, or the tasks, lengths, instructions or snapshots have changed.
    """
    folder = plan_folder(config)
    if not (folder / "plan.json").is_file():
        raise UserError(
            f"{folder}: no plan for these tasks, lengths, instructions and snapshots",
            fix="run `diffembed evaluate plan` with this config",
        )
    tree = json.loads((folder / "plan.json").read_text())
    del tree["version"]
    tree["lengths"], tree["block_costs"] = tuple(tree["lengths"]), tuple(tree["block_costs"])
    return Plan(folder=folder, **tree)


def plan_folder(config: EvaluateConfig) -> Path:
    """Where the plan of these tasks, lengths, instructions and snapshots is."""
    requests = [dataclasses.astuple(request) for request in _requests(config)]
    inputs = [_VERSION, str(config.snapshots), requests]
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]
    return config.output_dir / "plan" / digest


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


def assign(costs: Sequence[float], num_elements: int) -> list[list[int]]:
    """Units of each element: dearest first, each to the element with the least so far.

    Graham's longest-processing-time rule (1969): at most 4/3 of the best possible maximum.
    """
    heap = [(0.0, element) for element in range(num_elements)]
    shares: list[list[int]] = [[] for _ in range(num_elements)]
    for unit in sorted(range(len(costs)), key=lambda unit: (-costs[unit], unit)):
        load, element = heapq.heappop(heap)
        shares[element].append(unit)
        heapq.heappush(heap, (load + costs[unit], element))
    return shares


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
    return [
        Request(task=task, instructions=tuple(sorted(own)), lengths=tuple(sorted(lengths[task])))
        for task, own in sorted(instructions.items())
    ]


def _list_tasks(config: EvaluateConfig, folder: Path, num_workers: int) -> list[Listing]:
    requests = _requests(config)
    work = functools.partial(
        list_task, snapshots=config.snapshots, all_lengths=_all_lengths(config), folder=folder
    )
    if num_workers == 1:
        return [work(request) for request in requests]
    # Spawned, because forking a process that has loaded torch may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(requests)), mp_context=context) as pool:
        return list(pool.map(work, requests))


def _write_texts(path: Path, blocks: Iterable[pa.RecordBatch]) -> None:
    """One Arrow file, one record batch per block."""
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pyarrow.ipc.new_file(file, SCHEMA) as writer,
    ):
        for block in blocks:
            writer.write_batch(block)


def _as_json(plan: Plan) -> dict[str, Any]:
    tree = dataclasses.asdict(plan)
    del tree["folder"]
    return tree
