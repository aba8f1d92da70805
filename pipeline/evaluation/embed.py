"""Embed the blocks of a plan, and look stored vectors up.

embed_element: share of element i --> processes take block after block --> BlockWriter.write
                                                                           store/MODEL/
load_stored:   EvaluatedEncoder whose embedder is a VectorStore  <--------- read
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config import EvaluateConfig, EvaluatedModel, Role, Template
from pipeline.data.batch import assign_by_cost
from pipeline.errors import UserError
from pipeline.evaluation.distinct_texts import (
    PlannedText,
    byte_sizes,
    digests,
    effective_lengths,
    require_short,
)
from pipeline.evaluation.embedding_plan import (
    EmbeddingPlan,
    find_digests,
    read_plan,
    store_folder,
)
from pipeline.evaluation.models import EvaluatedEncoder, LoadEncoder, require_finite, revision
from pipeline.evaluation.tasks import Element, list_elements
from pipeline.files import load_arrays, map_vectors, read_record, save_vectors, write_sealed
from pipeline.workers import LocalWorkers

# Of stored vectors: half the size of float32.
FORMAT = "float16"
_METADATA = "model.json"


def embed_element(
    config: EvaluateConfig,
    index: int,
    num_elements: int,
    *,
    load: LoadEncoder,
    rank: int = 0,
    world_size: int = 1,
    num_processes: int = 1,
) -> int:
    """Embed one array element's share of all models' blocks; blocks on disk are skipped.

    Args:
        index: the array's task number, from 0.
        num_elements: length of the array; it may differ from one submission to the next.
        load: loads a model at a length; for several processes a function of a module.
        rank: of this process among the element's, one per GPU, which divide its share further.
        world_size: number of these processes.
        num_processes: processes that this one starts, which take its blocks in turn.

    Returns:
        The number of embedded blocks.
    """
    # The array and this call may have been started with different lengths.
    if not 0 <= index < num_elements:
        raise UserError(f"element {index}", allowed=f"0 to {num_elements - 1}")
    plan = read_plan(config)
    # Every element computes the same assignment; blocks of all models count as one list.
    costs = np.tile(plan.block_costs, len(config.models))
    owners = assign_by_cost(costs, num_elements * world_size)
    by_cost = np.argsort(-costs, kind="stable")
    # Most expensive first within the share.
    share = by_cost[owners[by_cost] == index * world_size + rank]
    # (model, block) of each unit.
    models, blocks = np.divmod(share, len(plan.block_costs))
    written = 0
    for number, model in enumerate(config.models):
        store = store_folder(config, model)
        own = blocks[models == number].tolist()
        # Another submission may have embedded them, with another number of elements.
        todo = [block for block in own if not plan.vectors_path(store, block).is_file()]
        if todo:
            _embed_blocks(BlockWriter(config, model, plan, load), todo, num_processes)
        written += len(todo)
    return written


def _embed_blocks(writer: BlockWriter, todo: Sequence[int], num_processes: int) -> None:
    started = time.monotonic()
    # A command that scores afterwards has it already, and its next children will need it.
    imports = [name for name in ("mteb",) if name in sys.modules]
    with contextlib.closing(LocalWorkers(num_processes, imports=imports)) as workers:
        # Most expensive first: processes that are free at the end wait for cheap blocks only.
        for done, _ in enumerate(workers.each(writer.write, todo), start=1):
            # Blocks become cheaper: the estimate is an upper bound.
            pace = (time.monotonic() - started) / done
            print(
                f"{writer.model.name}: block {done}/{len(todo)}, "
                f"{pace * (len(todo) - done):.0f} s left",
                flush=True,
            )


class BlockWriter:
    """Embed blocks of one model; loads it at the first block.

    Args:
        load: loads the model at a length.
    """

    def __init__(
        self, config: EvaluateConfig, model: EvaluatedModel, plan: EmbeddingPlan, load: LoadEncoder
    ) -> None:
        self.config, self.model, self._plan, self._load = config, model, plan, load
        self._store = store_folder(config, model)
        # Any element of the model serves: the length is set per text.
        self._element = next(each for each in list_elements(config) if each.model == model)
        # Empty in child processes: each block unpickles a new writer. The export itself stays
        # loaded in the child, see `models.load_encoder`.
        self._encoders: dict[int, EvaluatedEncoder] = {}

    def write(self, block: int) -> None:
        """Embed a block and put it into the store."""
        texts = self._plan.read_block(block)
        for length in {text.max_length for text in texts} - self._encoders.keys():
            element = dataclasses.replace(self._element, max_length=length)
            self._encoders[length] = self._load(self.config, element)
            _write_metadata(self._store, self._encoders[length])
        vectors_ND = embed_planned(texts, self._encoders)
        save_vectors(self._plan.vectors_path(self._store, block), vectors_ND)


def embed_planned(
    texts: Sequence[PlannedText], encoders: dict[int, EvaluatedEncoder]
) -> np.ndarray:
    """(N,) texts -> (N, D) float16, each at its own length and with its own instruction."""
    # One call per role, instruction and length, because these decide template and cut.
    groups: dict[tuple[Role, str, int], list[int]] = {}
    for row, text in enumerate(texts):
        groups.setdefault((text.role, text.instruction, text.max_length), []).append(row)
    width = next(iter(encoders.values())).num_dimensions
    vectors_ND = np.empty((len(texts), width), dtype=FORMAT)
    for (role, instruction, length), rows in groups.items():
        strings = [texts[row].text for row in rows]
        # Values beyond float16 become infinite without a warning; `require_finite` refuses them.
        with np.errstate(over="ignore"):
            vectors_ND[rows] = encoders[length].embedder.embed(role, instruction, strings)
    require_finite(
        vectors_ND,
        [text.text for text in texts],
        source=f"vectors stored as {FORMAT}",
        fix="score this model with `diffembed evaluate run`, which stores none",
    )
    return vectors_ND


def load_stored(config: EvaluateConfig, element: Element) -> EvaluatedEncoder:
    """Return a model whose vectors come from the store; needs no GPU.

    Raises:
        UserError: blocks are missing.
    """
    plan = read_plan(config)
    # All blocks, also of other tasks: a partial store means that an array element failed.
    missing = missing_blocks(config, element.model, plan)
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise UserError(
            f"{element.model.name}: {len(missing)} of {len(plan.block_costs)} blocks are not "
            f"embedded: {shown}",
            fix="see the logs of the array's elements; submit the evaluation again, or run "
            "`diffembed evaluate embed`: only missing blocks are embedded",
            docs="trouble.md#missing-blocks",
        )
    store = store_folder(config, element.model)
    metadata = read_metadata(store)
    return EvaluatedEncoder(
        embedder=VectorStore(plan, store, element.max_length),
        template=Template(query=metadata.query, document=metadata.document),
        name=element.model.name,
        revision=revision(element),
        max_length=element.max_length,
        num_dimensions=metadata.num_dimensions,
        precision=metadata.precision,
    )


def missing_blocks(config: EvaluateConfig, model: EvaluatedModel, plan: EmbeddingPlan) -> list[int]:
    """Return the blocks that a model has not embedded yet."""
    store = store_folder(config, model)
    return [b for b in range(len(plan.blocks)) if not plan.vectors_path(store, b).is_file()]


class VectorStore:
    """Look vectors up; satisfies `models.Embedder`.

    Blocks are memory-mapped, so that only the vectors of a task are read. A lookup is by digest:
    a text that has changed since the plan was made is refused, and never gets another's vector.

    Args:
        plan: the plan that the store was made from.
        store: folder of the model's vectors.
        max_length: length that the task is scored at.
    """

    def __init__(self, plan: EmbeddingPlan, store: Path, max_length: int) -> None:
        self._plan = plan
        self._store = store
        self._max_length = max_length
        fix = f"delete {plan.folder} and run `diffembed evaluate plan` again"
        index = load_arrays(plan.folder / "index.npz", "digests", "places", fix=fix)
        self._digests, self._positions = index["digests"], index["places"]
        # Opened when a text needs them, and kept open.
        self._blocks: dict[int, np.ndarray] = {}

    def embed(self, role: Role, instruction: str, texts: Sequence[str]) -> np.ndarray:
        """(N,) texts of one role and instruction -> (N, D) float32.

        Raises:
            UserError: a text is not in the plan; the data have changed since it was made.
        """
        block_N, row_N = self._positions[self._find(role, instruction, texts)].T
        # The width is the store's; float32, because scores are sums of many products.
        vectors_ND = np.empty((len(texts), self._block(int(block_N[0])).shape[1]), np.float32)
        for block in np.unique(block_N):
            chosen = block_N == block
            vectors_ND[chosen] = self._block(int(block))[row_N[chosen]]
        return vectors_ND

    def _find(self, role: Role, instruction: str, texts: Sequence[str]) -> np.ndarray:
        column = pa.array(texts, type=pa.large_string())
        lengths_N = effective_lengths(
            instruction, byte_sizes(column), self._max_length, self._plan.lengths
        )
        found = find_digests(self._digests, digests(role, instruction, column, lengths_N))
        # A text that has changed has no vector: a similar one must not take its place.
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
            path = self._plan.vectors_path(self._store, block)
            fix = f"delete {path} and run `diffembed evaluate embed` again"
            vectors_ND = map_vectors(path, fix=fix)
            # The index knows the number of vectors in a whole block.
            num_rows = int(self._positions[self._positions[:, 0] == block, 1].max()) + 1
            if len(vectors_ND) < num_rows:
                raise UserError(
                    f"{path}: damaged ({len(vectors_ND)} vectors, the plan has {num_rows})", fix=fix
                )
            self._blocks[block] = vectors_ND
        return self._blocks[block]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoreMetadata:
    """The model of a store's vectors, as far as scoring needs it: `model.json`."""

    query: str
    document: str
    num_dimensions: int
    precision: str


def read_metadata(store: Path) -> StoreMetadata:
    """Read the metadata of a store.

    Raises:
        UserError: it is missing or damaged.
    """
    fix = f"delete {store} and run `diffembed evaluate embed` again"
    return read_record(store / _METADATA, StoreMetadata, fix=fix)


def _write_metadata(store: Path, encoder: EvaluatedEncoder) -> None:
    """Write the metadata of a store; the same from every element and at every length.

    Raises:
        UserError: the store has vectors of another precision, or the template is too long.
    """
    require_short(encoder.template, model=encoder.name)
    metadata = StoreMetadata(
        query=encoder.template.query,
        document=encoder.template.document,
        num_dimensions=encoder.num_dimensions,
        precision=f"{encoder.precision}, stored as {FORMAT}",
    )
    earlier = read_metadata(store) if (store / _METADATA).is_file() else metadata
    if earlier.precision != metadata.precision:
        raise UserError(
            f"{store}: vectors in {earlier.precision}; this machine computes in "
            f"{encoder.precision}",
            fix="give the model a precision in the config, or continue on machines of one kind",
        )
    write_sealed(store / _METADATA, dataclasses.asdict(metadata))
