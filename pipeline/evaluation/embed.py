"""Embed the blocks of a plan, and look vectors up.

share of element i --> processes take block after block --> store/, each block by rename
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config import EvaluateConfig, EvaluatedModel, Template
from pipeline.errors import UserError
from pipeline.evaluation.datasets import Role
from pipeline.evaluation.embedding_plan import Plan, assign, find_digests, read_plan, store_folder
from pipeline.evaluation.models import EvaluatedEncoder, LoadEncoder, require_finite, revision
from pipeline.evaluation.tasks import Element, list_elements
from pipeline.evaluation.texts import TextKey, byte_sizes, digests, effective_lengths, require_short
from pipeline.files import load_arrays, map_vectors, read_record, save_vectors, write_sealed
from pipeline.launch import World
from pipeline.workers import LocalWorkers

FORMAT = "float16"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoredModel:
    """What a store says about the model of its vectors."""

    query: str
    document: str
    num_dimensions: int
    precision: str


def missing_blocks(config: EvaluateConfig, model: EvaluatedModel, plan: Plan) -> list[int]:
    """Blocks of a model that nobody has embedded yet."""
    store = store_folder(config, model)
    return [b for b in range(len(plan.blocks)) if not plan.block_path(store, b).is_file()]


class StoredEmbedder:
    """Looks vectors up; blocks are memory-mapped, so only what a task needs is read.

    Args:
        plan: the plan the store was made from.
        store: the model's.
        max_length: length that the task is scored at.
    """

    def __init__(self, plan: Plan, store: Path, max_length: int) -> None:
        self._plan = plan
        self._store = store
        self._max_length = max_length
        fix = f"delete {plan.folder} and run `diffembed evaluate plan` again"
        index = load_arrays(plan.folder / "index.npz", "digests", "places", fix=fix)
        self._digests, self._places = index["digests"], index["places"]
        self._blocks: dict[int, np.ndarray] = {}

    def embed(self, role: Role, instruction: str, texts: Sequence[str]) -> np.ndarray:
        """(N,) texts of one role and instruction -> (N, D) float32.

        Raises:
            UserError: a text is not in the plan; the data have changed since it was made.
        """
        places_N2 = self._places[self._find(role, instruction, texts)]
        rows_ND = np.empty((len(texts), self._block(int(places_N2[0, 0])).shape[1]), np.float32)
        for block in np.unique(places_N2[:, 0]):
            chosen = places_N2[:, 0] == block
            rows_ND[chosen] = self._block(int(block))[places_N2[chosen, 1]]
        return rows_ND

    def _find(self, role: Role, instruction: str, texts: Sequence[str]) -> np.ndarray:
        column = pa.array(texts, type=pa.large_string())
        lengths_N = effective_lengths(
            instruction, byte_sizes(column), self._max_length, self._plan.lengths
        )
        words_N2 = digests(role, instruction, column, lengths_N)
        found = find_digests(self._digests, words_N2)
        unknown = found < 0
        if unknown.any():
            example = texts[int(np.flatnonzero(unknown)[0])][:60]
            raise UserError(
                f"{self._plan.folder}: {unknown.sum()} of {len(texts)} {role} texts are not in "
                f"the plan, the first: {example!r}",
                fix="run `diffembed evaluate plan` again; the data have changed",
            )
        return found

    def _block(self, block: int) -> np.ndarray:
        if block not in self._blocks:
            path = self._plan.block_path(self._store, block)
            fix = f"delete {path} and run `diffembed evaluate embed` again"
            vectors_ND = map_vectors(path, fix=fix)
            num_rows = int(self._places[self._places[:, 0] == block, 1].max()) + 1
            if len(vectors_ND) < num_rows:
                raise UserError(
                    f"{path}: damaged ({len(vectors_ND)} vectors, the plan has {num_rows})", fix=fix
                )
            self._blocks[block] = vectors_ND
        return self._blocks[block]


def read_description(store: Path) -> StoredModel:
    """What `embed` noted of the model whose vectors are stored.

    Raises:
        UserError: it is missing or damaged.
    """
    fix = f"delete {store} and run `diffembed evaluate embed` again"
    return read_record(store / "model.json", StoredModel, fix=fix)


def load_stored(config: EvaluateConfig, element: Element) -> EvaluatedEncoder:
    """A model whose vectors come from the store; needs no GPU.

    Raises:
        UserError: blocks are missing.
    """
    plan = read_plan(config)
    missing = missing_blocks(config, element.model, plan)
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise UserError(
            f"{element.model.name}: {len(missing)} of {len(plan.block_costs)} blocks are not "
            f"embedded: {shown}",
            fix="the logs of the array's elements say why; submit the evaluation again, or run "
            "`diffembed evaluate embed`: only what is missing is done",
        )
    store = store_folder(config, element.model)
    description = read_description(store)
    return EvaluatedEncoder(
        embedder=StoredEmbedder(plan, store, element.max_length),
        template=Template(query=description.query, document=description.document),
        name=element.model.name,
        revision=revision(element),
        max_length=element.max_length,
        num_dimensions=description.num_dimensions,
        precision=description.precision,
    )


def embed_element(
    config: EvaluateConfig,
    index: int,
    num_elements: int,
    *,
    load: LoadEncoder,
    world: World | None = None,
    num_processes: int = 1,
) -> int:
    """Embed one array element's share of all models' blocks; blocks on disk are left alone.

    Args:
        index: the array's task number, from 0.
        num_elements: length of the array; it may differ from one submission to the next.
        load: how to load a model at a length; for several processes a function of a module.
        world: this process among those of the element (one per GPU); the share is cut further.
        num_processes: processes that this one starts, which take its blocks in turn.

    Returns:
        How many blocks were embedded.
    """
    if not 0 <= index < num_elements:
        raise UserError(f"element {index}", allowed=f"0 to {num_elements - 1}")
    world = world or World()
    plan = read_plan(config)
    units = [(model, block) for model in config.models for block in range(len(plan.block_costs))]
    shares = assign(
        [plan.block_costs[block] for _, block in units], num_elements * world.world_size
    )
    share = [units[unit] for unit in shares[index * world.world_size + world.rank]]
    written = 0
    for model in config.models:
        store = store_folder(config, model)
        own = [block for owner, block in share if owner == model]
        todo = [block for block in own if not plan.block_path(store, block).is_file()]
        if todo:
            _embed_blocks(BlockWriter(config, model, plan, load), todo, num_processes)
        written += len(todo)
    return written


def _embed_blocks(writer: BlockWriter, todo: Sequence[int], num_processes: int) -> None:
    started = time.monotonic()
    with contextlib.closing(LocalWorkers(num_processes)) as workers:
        # Most expensive first: whichever process is free takes the next one.
        for done, _ in enumerate(workers.each(writer.write, todo), start=1):
            pace = (time.monotonic() - started) / done
            print(
                f"{writer.model.name}: block {done}/{len(todo)}, "
                f"{pace * (len(todo) - done):.0f} s left",
                flush=True,
            )


class BlockWriter:
    """Embeds blocks of one model; loads it at the first block.

    Args:
        load: how to load the model at a length.
    """

    def __init__(
        self, config: EvaluateConfig, model: EvaluatedModel, plan: Plan, load: LoadEncoder
    ) -> None:
        self.config, self.model, self._plan, self._load = config, model, plan, load
        self._store = store_folder(config, model)
        # Any element of the model will do: the length is set per text.
        self._element = next(each for each in list_elements(config) if each.model == model)
        self._encoders: dict[int, EvaluatedEncoder] = {}

    def write(self, block: int) -> None:
        """Embed a block and put it into the store."""
        keys = self._plan.read_block(block)
        for length in {key.max_length for key in keys} - self._encoders.keys():
            element = dataclasses.replace(self._element, max_length=length)
            self._encoders[length] = self._load(self.config, element)
            _describe(self._store, self._encoders[length])
        save_vectors(self._plan.block_path(self._store, block), embed_keys(keys, self._encoders))


def embed_keys(keys: Sequence[TextKey], encoders: dict[int, EvaluatedEncoder]) -> np.ndarray:
    """(N,) texts -> (N, D) float16, each at its own length and with its own instruction."""
    groups: dict[tuple[Role, str, int], list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault((key.role, key.instruction, key.max_length), []).append(row)
    width = next(iter(encoders.values())).num_dimensions
    vectors_ND = np.empty((len(keys), width), dtype=FORMAT)
    for (role, instruction, length), rows in groups.items():
        texts = [keys[row].text for row in rows]
        with np.errstate(over="ignore"):
            vectors_ND[rows] = encoders[length].embedder.embed(role, instruction, texts)
    require_finite(
        vectors_ND,
        [key.text for key in keys],
        source=f"vectors stored as {FORMAT}",
        fix="score this model with `diffembed evaluate run`, which stores none",
    )
    return vectors_ND


def _describe(folder: Path, encoder: EvaluatedEncoder) -> None:
    """Write what the scoring job reports; the same from every element and at every length.

    Raises:
        UserError: the store was begun at another precision, or the template is too long.
    """
    require_short(encoder.template, model=encoder.name)
    description = StoredModel(
        query=encoder.template.query,
        document=encoder.template.document,
        num_dimensions=encoder.num_dimensions,
        precision=f"{encoder.precision}, stored as {FORMAT}",
    )
    begun = read_description(folder) if (folder / "model.json").is_file() else description
    if begun.precision != description.precision:
        raise UserError(
            f"{folder}: vectors in {begun.precision}; this machine computes in {encoder.precision}",
            fix="give the model a precision in the config, or continue on machines of one kind",
        )
    write_sealed(folder / "model.json", dataclasses.asdict(description))
