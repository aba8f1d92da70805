"""Gathers: how much one sends at once, and what runs at the same time."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import comm
from pipeline.training.collectives import Gathering, buffer_bytes
from pipeline.training.contrastive_step import accumulate_gradients
from tests.benchmarks.bench_support import PlainEngine, draw_texts, load, make_batch, step_config

RANKS = 4
BOUND = buffer_bytes(RANKS)


class Parameter:
    """A bf16 parameter of a ZeRO-3 model that notes what is done with it.

    Args:
        log: of all events.
        name: of the parameter.
        size: of the whole parameter in bytes.
        copied: hpZ keeps a second copy of it.
    """

    def __init__(self, log: list[str], name: str, size: int, *, copied: bool = False) -> None:
        self.log, self.name = log, name
        self.ds_id, self.ds_persist = id(self), False
        self.ds_numel = size // 2
        self.ds_secondary_tensor = object() if copied else None
        self.ds_status = SimpleNamespace(name="NOT_AVAILABLE")

    def element_size(self) -> int:
        return 2

    def all_gather_coalesced(self, piece: list[Parameter]) -> Any:
        names = "+".join(p.name for p in piece)
        self.log.append(f"start {names}")
        for parameter in piece:
            parameter.ds_status = SimpleNamespace(name="INFLIGHT")

        def wait() -> None:
            self.log.append(f"wait {names}")
            for parameter in piece:
                parameter.ds_status = SimpleNamespace(name="AVAILABLE")

        return SimpleNamespace(wait=wait)

    def partition(self) -> None:
        self.log.append(f"release {self.name}")
        self.ds_status = SimpleNamespace(name="NOT_AVAILABLE")


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "world_size", lambda: RANKS)


def test_the_next_piece_is_on_its_way_while_one_is_copied_out() -> None:
    log: list[str] = []
    parameters = [Parameter(log, name, BOUND) for name in "abc"]
    with Gathering().hold(parameters):
        log.append("use")
    waits = ["start a", "start b", "wait a", "start c", "wait b", "wait c"]
    assert log == [*waits, "use", *(f"release {name}" for name in "abc")]


def test_small_parameters_share_calls_of_bounded_size_and_large_ones_have_their_own() -> None:
    """Several parameters need a buffer besides themselves; a single one is gathered in place."""
    log: list[str] = []
    sizes = {"a": BOUND // 2, "B": 5 * BOUND, "c": BOUND // 2, "d": 2, "E": BOUND, "f": BOUND // 2}
    with Gathering().hold([Parameter(log, name, size) for name, size in sizes.items()]):
        pass
    starts = [event.removeprefix("start ") for event in log if event.startswith("start")]
    assert sorted(starts) == ["B", "E", "a+c", "d+f"]


def test_copies_within_a_node_and_partitions_over_all_ranks_never_share_a_call() -> None:
    log: list[str] = []
    parameters = [Parameter(log, name, 2, copied=name in "bd") for name in "abcd"]
    with Gathering().hold(parameters):
        pass
    assert {event for event in log if event.startswith("start")} == {"start a+c", "start b+d"}


def test_what_was_prefetched_is_not_gathered_again_and_what_is_not_used_is_released() -> None:
    log: list[str] = []
    first, second = Parameter(log, "a", 2), Parameter(log, "b", 2)
    gathering = Gathering()
    with gathering.hold([first]):
        gathering.prefetch([first, second])
    assert log == ["start a", "wait a", "start b", "release a"]
    log.clear()
    with gathering.hold([second]):
        gathering.prefetch([first])
    gathering.discard([first, second])
    assert log == ["wait b", "start a", "release b", "wait a", "release a"]


def test_copies_within_a_node_are_not_prefetched() -> None:
    """Their communicator would overlap with that of the reduction."""
    log: list[str] = []
    Gathering().prefetch([Parameter(log, "a", 2), Parameter(log, "b", 2, copied=True)])
    assert log == ["start a"]


class Recording(PlainEngine):
    """Record the calls of a sweep to its engine, by the number of the layer."""

    def __init__(self, path: Path) -> None:
        super().__init__(load(path))
        self.log: list[str] = []
        self._layer_of = {
            id(p): n for n, layer in enumerate(self.encoder.layers) for p in layer.parameters()
        }

    def _note(self, what: str, parameters: list[torch.nn.Parameter]) -> None:
        layers = {self._layer_of.get(id(p)) for p in parameters}
        if layers and None not in layers:
            self.log.append(f"{what} {layers.pop()}")

    def hold(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[None]:
        @contextmanager
        def held() -> Any:
            self._note("hold", parameters)
            yield
            self._note("release", parameters)

        return held()

    def prefetch(self, parameters: list[torch.nn.Parameter]) -> None:
        self._note("prefetch", parameters)

    def reduce(self, parameters: list[torch.nn.Parameter]) -> None:
        self._note("reduce", parameters)


def test_a_sweep_gathers_a_layer_ahead_and_reduces_each_layer_when_it_is_complete(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    engine = Recording(model_path)
    texts = draw_texts(np.full(8, 5), 500)
    batch = make_batch(texts, 4, max_tokens=100, min_chunks=2)
    accumulate_gradients(engine, batch, step_config("sweep"), device=torch.device("cpu"))
    forward = ["prefetch 0", "hold 0", "prefetch 1", "release 0", "hold 1", "prefetch 2"]
    forward += ["release 1", "hold 2", "release 2"]
    backward = ["prefetch 2", "hold 2", "prefetch 1", "release 2", "reduce 2"]
    backward += ["hold 1", "prefetch 0", "release 1", "reduce 1", "hold 0", "release 0", "reduce 0"]
    assert engine.log == forward + backward
