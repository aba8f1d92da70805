"""Embeds a plan's blocks: an array's share, by one process or by one per GPU of the node.

share of element i --> processes take block after block --> store/, each block by rename
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.comm import World
from pipeline.config import EvaluateConfig, EvaluatedModel
from pipeline.data.crew import Alone
from pipeline.errors import UserError
from pipeline.evaluation.blocks.cuts import store_folder
from pipeline.evaluation.blocks.keys import TextKey, require_short
from pipeline.evaluation.blocks.plan import Plan, assign, read_plan
from pipeline.evaluation.blocks.store import FORMAT, StoredModel, read_description
from pipeline.evaluation.models.encoder import EvaluatedEncoder, LoadEncoder
from pipeline.evaluation.models.finite import require_finite
from pipeline.evaluation.tasks.elements import list_elements
from pipeline.evaluation.tasks.texts import Role
from pipeline.files import write_sealed
from pipeline.sealed import save_vectors


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
    with contextlib.closing(Alone(num_processes)) as crew:
        # The dearest come first, and whoever is free takes the next.
        for done, _ in enumerate(crew.each(writer.write, todo), start=1):
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
