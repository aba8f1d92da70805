"""Vectors of a plan's texts: written block by block by an array, read by the scoring job."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.comm import World
from pipeline.config import EvaluateConfig, EvaluatedModel, Template
from pipeline.errors import UserError
from pipeline.evaluation.elements import Element, list_elements, model_fingerprint
from pipeline.evaluation.encoder import EvaluatedEncoder, LoadEncoder, revision
from pipeline.evaluation.keys import TextKey, byte_sizes, digests, effective_lengths
from pipeline.evaluation.plan import Plan, assign, read_plan
from pipeline.evaluation.texts import Role
from pipeline.run_dir import atomic_path, write_json

_FORMAT = "float16"


def store_folder(config: EvaluateConfig, model: EvaluatedModel, plan: Plan) -> Path:
    """Where a model's vectors of a plan are; another export has another folder."""
    name = f"{model.name}-{model_fingerprint(model)}"
    return config.output_dir / "store" / name / plan.folder.name


def block_path(folder: Path, block: int) -> Path:
    """Vectors of a block, (texts, D) float16."""
    return folder / f"block-{block:05d}.npy"


def missing_blocks(config: EvaluateConfig, model: EvaluatedModel, plan: Plan) -> list[int]:
    """Blocks of a model that nobody has embedded yet."""
    folder = store_folder(config, model, plan)
    return [b for b in range(len(plan.block_costs)) if not block_path(folder, b).is_file()]


def embed_element(
    config: EvaluateConfig,
    index: int,
    num_elements: int,
    *,
    load: LoadEncoder,
    world: World | None = None,
) -> int:
    """Embed one array element's share of all models' blocks; blocks on disk are left alone.

    Args:
        index: the array's task number, from 0.
        num_elements: length of the array; it may differ from one submission to the next.
        load: how to load a model at a length.
        world: this process among those of the element (one per GPU); the share is cut further.

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
        blocks = [block for owner, block in share if owner == model]
        written += _embed_blocks(config, model, plan, blocks, load)
    return written


def _embed_blocks(
    config: EvaluateConfig,
    model: EvaluatedModel,
    plan: Plan,
    blocks: Sequence[int],
    load: LoadEncoder,
) -> int:
    folder = store_folder(config, model, plan)
    todo = [block for block in blocks if not block_path(folder, block).is_file()]
    if not todo:
        return 0
    # Any element of the model will do: the length is set per text.
    first = next(element for element in list_elements(config) if element.model == model)
    encoders = {first.max_length: load(config, first)}
    _write_description(folder, encoders[first.max_length])
    started = time.monotonic()
    for done, block in enumerate(todo, start=1):
        keys = plan.read_block(block)
        for length in {key.max_length for key in keys} - encoders.keys():
            encoders[length] = load(config, dataclasses.replace(first, max_length=length))
        vectors = embed_keys(keys, encoders)
        with atomic_path(block_path(folder, block)) as temporary, temporary.open("wb") as file:
            np.save(file, vectors)
        pace = (time.monotonic() - started) / done
        print(
            f"{model.name}: block {done}/{len(todo)}, {len(keys)} texts, "
            f"{pace * (len(todo) - done):.0f} s left",
            flush=True,
        )
    return len(todo)


def embed_keys(keys: Sequence[TextKey], encoders: dict[int, EvaluatedEncoder]) -> np.ndarray:
    """(N,) texts -> (N, D) float16, each at its own length and with its own instruction."""
    groups: dict[tuple[Role, str, int], list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault((key.role, key.instruction, key.max_length), []).append(row)
    width = next(iter(encoders.values())).num_dimensions
    vectors_ND = np.empty((len(keys), width), dtype=_FORMAT)
    for (role, instruction, length), rows in groups.items():
        texts = [keys[row].text for row in rows]
        vectors_ND[rows] = encoders[length].embedder.embed(role, instruction, texts)
    return vectors_ND


def _write_description(folder: Path, encoder: EvaluatedEncoder) -> None:
    """What the scoring job reports; the same from every element."""
    write_json(
        folder / "model.json",
        {
            "query": encoder.template.query,
            "document": encoder.template.document,
            "num_dimensions": encoder.num_dimensions,
            "precision": f"{encoder.precision}, stored as {_FORMAT}",
        },
    )


class StoredEmbedder:
    """Looks vectors up; blocks are memory-mapped, so only what a task needs is read.

    Args:
        plan: the plan the store was made from.
        folder: the model's store.
        max_length: length that the task is scored at.
    """

    def __init__(self, plan: Plan, folder: Path, max_length: int) -> None:
        self._plan = plan
        self._folder = folder
        self._max_length = max_length
        with np.load(plan.folder / "index.npz") as index:
            words, places = index["digests"], index["places"]
        order = np.argsort(words[:, 0], kind="stable")
        self._first, self._second = words[order, 0], words[order, 1]
        self._places = places[order]
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
        found = np.searchsorted(self._first, words_N2[:, 0]).clip(max=len(self._first) - 1)
        known = (self._first[found] == words_N2[:, 0]) & (self._second[found] == words_N2[:, 1])
        if not known.all():
            example = texts[int(np.flatnonzero(~known)[0])][:60]
            raise UserError(
                f"{self._plan.folder}: {(~known).sum()} of {len(texts)} {role} texts are not in "
                f"the plan, the first: {example!r}",
                fix="run `diffembed evaluate plan` again; the data have changed",
            )
        return found

    def _block(self, block: int) -> np.ndarray:
        if block not in self._blocks:
            self._blocks[block] = np.load(block_path(self._folder, block), mmap_mode="r")
        return self._blocks[block]


def load_stored(config: EvaluateConfig, element: Element) -> EvaluatedEncoder:
    """A model whose vectors come from the store; needs no GPU.

    Raises:
        UserError: blocks are missing.
    """
    plan = read_plan(config)
    missing = missing_blocks(config, element.model, plan)
    if missing:
        raise UserError(
            f"{element.model.name}: {len(missing)} of {len(plan.block_costs)} blocks are not "
            "embedded",
            fix="run the `diffembed evaluate embed` array again; it does only what is missing",
        )
    folder = store_folder(config, element.model, plan)
    description = json.loads((folder / "model.json").read_text())
    return EvaluatedEncoder(
        embedder=StoredEmbedder(plan, folder, element.max_length),
        template=Template(query=description["query"], document=description["document"]),
        name=element.model.name,
        revision=revision(element),
        max_length=element.max_length,
        num_dimensions=description["num_dimensions"],
        precision=description["precision"],
    )
