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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.elements import list_elements
from pipeline.evaluation.encoder import Role
from pipeline.evaluation.guard import check_fit
from pipeline.evaluation.instructions import instruction_for
from pipeline.run_dir import atomic_path, write_json

_VERSION = 1
_TEXTS = "texts.arrow"
_SCHEMA = pa.schema(
    [
        ("role", pa.string()),
        ("instruction", pa.string()),
        ("max_length", pa.int32()),
        ("text", pa.large_string()),
    ]
)
# Enough that 64 elements get 32 blocks each; a killed element loses at most one.
_NUM_BLOCKS = 2048
_MIN_BLOCK_COST = 32_768.0
# Characters of a token, at the dense end of what the benchmarks hold (mathematics 3.0, prose 4.3).
_BYTES_PER_TOKEN = 3.5
# Length at which attention costs as much as all else in a 7 B model with 28 layers of width 3584:
# 2 x parameters / (4 x layers x width).
_ATTENTION_TOKENS = 35_000
# What a template may add to a text, in bytes; tokens never outnumber bytes.
_TEMPLATE_BYTES = 128


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextKey:
    """What a vector depends on, beside the model."""

    role: Role
    instruction: str
    max_length: int
    text: str

    def digest(self) -> bytes:
        """16 bytes that stand for all four."""
        joined = f"{self.role}\0{self.instruction}\0{self.max_length}\0{self.text}"
        return hashlib.sha256(joined.encode()).digest()[:16]

    def cost(self) -> float:
        """Work to embed the text, in tokens of a short text."""
        size = len(self.instruction.encode()) + len(self.text.encode())
        tokens = min(size / _BYTES_PER_TOKEN + 1, self.max_length)
        return tokens * (1 + tokens / _ATTENTION_TOKENS)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A written plan: how many texts there are and what each block costs."""

    folder: Path
    num_texts: int
    num_occurrences: int
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
    keys: dict[bytes, TextKey] = {}
    num_occurrences = 0
    for key in _all_texts(config, num_workers):
        num_occurrences += 1
        keys.setdefault(key.digest(), key)
    # Ties by digest: the same texts give the same blocks, whatever the order of tasks.
    ordered = sorted((-key.cost(), digest) for digest, key in keys.items())
    blocks = cut_blocks([-cost for cost, _ in ordered])
    plan = Plan(
        folder=plan_folder(config),
        num_texts=len(ordered),
        num_occurrences=num_occurrences,
        lengths=_all_lengths(config),
        block_costs=tuple(-sum(ordered[row][0] for row in rows) for rows in blocks),
    )
    in_blocks = ([keys[ordered[row][1]] for row in rows] for rows in blocks)
    _write_texts(plan.folder / _TEXTS, in_blocks)
    places = np.array([(b, r) for b, rows in enumerate(blocks) for r in range(len(rows))], np.int32)
    digests = np.frombuffer(b"".join(digest for _, digest in ordered), np.uint64).reshape(-1, 2)
    if len(np.unique(digests[:, 0])) < len(digests):
        raise RuntimeError("two texts share the first 8 bytes of their digest")
    with atomic_path(plan.folder / "index.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, digests=digests, places=places)
    # Last: its presence means that the plan is whole.
    write_json(plan.folder / "plan.json", {"version": _VERSION, **_as_json(plan)})
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
    inputs = [
        _VERSION,
        str(config.snapshots),
        [
            (element.task, element.max_length, instruction_for(element.task, config.instructions))
            for element in list_elements(config)
            if element.model == config.models[0]
        ],
    ]
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


def effective_length(instruction: str, text: str, wanted: int, lengths: Sequence[int]) -> int:
    """The smallest length at which a text that is not cut at `wanted` is not cut either.

    A text that fits 512 tokens has the same vector at 32768, so both lengths share it. Tokens are
    bounded by bytes: no tokenizer is asked.
    """
    size = len(instruction.encode()) + len(text.encode()) + _TEMPLATE_BYTES
    return min((length for length in lengths if size <= length < wanted), default=wanted)


def _all_lengths(config: EvaluateConfig) -> tuple[int, ...]:
    return tuple(sorted({element.max_length for element in list_elements(config)}))


def _all_texts(config: EvaluateConfig, num_workers: int) -> Iterator[TextKey]:
    """Every text of every task at every length, with repetitions."""
    lengths = _all_lengths(config)
    wanted: dict[str, list[int]] = {}
    for element in list_elements(config):
        if element.model == config.models[0]:
            wanted.setdefault(element.task, []).append(element.max_length)
    for task, texts in zip(wanted, _load_tasks(config, list(wanted), num_workers), strict=True):
        instruction = instruction_for(task, config.instructions)
        for role, text in texts:
            own = instruction if role == "query" else ""
            for length in wanted[task]:
                yield TextKey(
                    role=role,
                    instruction=own,
                    max_length=effective_length(own, text, length, lengths),
                    text=text,
                )


def _load_tasks(
    config: EvaluateConfig, tasks: Sequence[str], num_workers: int
) -> Iterator[list[tuple[Role, str]]]:
    """Texts of each task, in the order of tasks."""
    # Here, not at the top: reading a plan must not load mteb.
    from pipeline.evaluation.snapshots import task_texts

    load = functools.partial(task_texts, snapshots=config.snapshots)
    if num_workers == 1:
        yield from map(load, tasks)
        return
    # Spawned, because forking a process that has loaded torch may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(tasks)), mp_context=context) as pool:
        yield from pool.map(load, tasks)


def _write_texts(path: Path, blocks: Iterable[Sequence[TextKey]]) -> None:
    """One Arrow file, one record batch per block."""
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pyarrow.ipc.new_file(file, _SCHEMA) as writer,
    ):
        for keys in blocks:
            columns = {name: [getattr(key, name) for key in keys] for name in _SCHEMA.names}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=_SCHEMA))


def _as_json(plan: Plan) -> dict[str, Any]:
    tree = dataclasses.asdict(plan)
    del tree["folder"]
    return tree
