"""Vectors of a plan's texts: where their blocks are, and how the scoring job reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config import EvaluateConfig, EvaluatedModel, Template
from pipeline.errors import UserError
from pipeline.evaluation.blocks.cuts import find_digests, store_folder
from pipeline.evaluation.blocks.keys import byte_sizes, digests, effective_lengths
from pipeline.evaluation.blocks.plan import Plan, read_plan
from pipeline.evaluation.models.encoder import EvaluatedEncoder, revision
from pipeline.evaluation.tasks.elements import Element
from pipeline.evaluation.tasks.texts import Role
from pipeline.files import read_record
from pipeline.sealed import load_arrays, map_vectors

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
