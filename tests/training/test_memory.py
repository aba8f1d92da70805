"""A rank that runs out of memory makes all ranks continue with smaller chunks."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import TrainConfig, load_config
from pipeline.data.batch import GlobalBatch
from pipeline.data.loader import Loader
from pipeline.data.shards import Dataset
from pipeline.errors import DiffembedError
from pipeline.training.engine import ChunkOutOfMemoryError
from pipeline.training.trainer import Training
from tests.support import launch_ranks

WORKER = Path(__file__).with_name("memory_worker.py")


def test_a_step_that_one_rank_ends_ends_for_all_and_leaves_no_gradient_behind(
    model_path: Path,
) -> None:
    """Without memory once, and asked to stop twice: in a cached step and in a sweep."""
    output = launch_ranks(2, WORKER, str(model_path))
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(results) == 6
    for result in results:
        assert result["raised"] == 2 * 3, result
        assert result["error"] <= 1e-5, result


@pytest.fixture(scope="module")
def full_devices(
    recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Return the ends of runs in which rank 1's device is full, by part of the step."""
    worker = WORKER.with_name("full_device_worker.py")
    output = launch_ranks(1, worker, str(recipe), str(tmp_path_factory.mktemp("parts")))
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {result["part"]: result for result in results}


@pytest.mark.parametrize(
    "part", ["hold", "loss", "reduction", "update", "save", "layer of a sweep"]
)
def test_a_full_device_ends_all_ranks_with_one_line(
    full_devices: dict[str, dict[str, Any]], part: str
) -> None:
    """The other rank waits in a call that notices nothing, as under NCCL."""
    result = full_devices[part]
    assert result["codes"] == [1, 1], result
    lines = [[line for line in said if "memory" in line] for said in result["said"]]
    assert lines[0] == lines[1] != []
    (line,) = lines[0]
    at_fault = 0 if part == "update" else 1
    assert line.startswith(
        f"rank {at_fault}: MachineError: CUDA out of memory. Tried to allocate 2.00 GiB"
    )
    assert " | fix: " in line
    assert not any("Traceback" in said for said in result["said"][0] + result["said"][1])


@pytest.mark.parametrize("part", ["forward of a sweep", "backward of a sweep", "head of a sweep"])
def test_chunks_that_do_not_fit_on_one_rank_are_halved_on_all(
    full_devices: dict[str, dict[str, Any]], part: str
) -> None:
    result = full_devices[part]
    assert result["codes"] == [0, 0], result
    assert "a chunk does not fit into memory" in result["printed"]
    assert "continuing with" in result["printed"]
    if part != "head of a sweep":  # another objective
        assert result["losses"] == pytest.approx(full_devices["save"]["losses"], rel=1e-5)


class SmallDevice(Training):
    """A training whose steps only record their chunks, and fail above a number of tokens."""

    def __init__(self, config: TrainConfig, limit: int) -> None:
        self.config, self.limit = config, limit
        self.sizes: list[int] = []
        self.graph: weakref.ref[torch.Tensor] | None = None  # of the step before

    def step(self, batch: GlobalBatch) -> dict[str, float]:
        assert self.graph is None or self.graph() is None, "the step before holds memory"
        self.sizes.append(max(len(chunk.input_ids) for chunk in batch.chunks))
        if self.sizes[-1] > self.limit:
            graph = torch.ones(3, requires_grad=True) * 2
            self.graph = weakref.ref(graph)
            cycle: list[object] = [graph]
            cycle.append(cycle)  # as a GPU's graphs were seen: only collecting garbage frees it
            raise ChunkOutOfMemoryError("a chunk does not fit into memory")
        return {"texts": sum(int((chunk.texts >= 0).sum()) for chunk in batch.chunks)}


def make_loader(config: TrainConfig) -> Loader:
    return Loader(
        Dataset.open(config.data.path),
        config.data,
        max_chunk_tokens=config.chunks.max_tokens,
        seed=config.seed,
    )


@pytest.fixture
def config(recipe: Path) -> TrainConfig:
    return load_config(TrainConfig, recipe, ("schedule=cache", "chunks.min_chunks=1"))


def test_the_token_budget_is_halved_until_a_chunk_fits_and_stays(config: TrainConfig) -> None:
    training, loader = SmallDevice(config, limit=90), make_loader(config)
    values: dict[str, Any] = training._fitting_step(loader.batch(0), loader)
    assert values["texts"] == 8 + 16  # the same queries and documents, in more chunks
    assert training.sizes[0] > 90 >= training.sizes[-1]
    assert loader.max_chunk_tokens <= 100
    training._fitting_step(loader.batch(1), loader)
    assert len(training.sizes) == 4  # the next step fits at once


def test_a_text_that_alone_does_not_fit_ends_the_run_with_a_reason(config: TrainConfig) -> None:
    training, loader = SmallDevice(config, limit=2), make_loader(config)
    with pytest.raises(DiffembedError, match="set schedule to cache or sweep"):
        training._fitting_step(loader.batch(0), loader)
