"""Ranks give a step up together or not at all; chance is a function of where it is drawn."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch

from pipeline import comm
from pipeline.training.engine import (
    Agreement,
    ChunkOutOfMemoryError,
    StepGivenUpError,
    seed_of_chunks,
    seed_random,
)
from tests.support import run_ranks

NUM_CHECKS = 100


def pass_checks(agreement: Agreement, before: Callable[[int], None] = lambda check: None) -> str:
    """Go through a step; where and how it ended."""
    check = 0

    def run_checks() -> None:
        nonlocal check
        for check in range(NUM_CHECKS):
            before(check)
            agreement.check()

    agreement.begin_step()
    try:
        agreement.on_all_ranks(run_checks)
    except (ChunkOutOfMemoryError, StepGivenUpError) as error:
        return f"{type(error).__name__} at {check}"
    return "whole"


def steps_of_a_rank() -> list[str]:
    rank, asked = comm.rank(), False
    agreement = Agreement(lambda: asked)

    def ask(check: int) -> None:
        nonlocal asked
        asked = asked or (rank == 1 and check == 20)

    def run_out_of_memory(check: int) -> None:
        if rank == 1 and check == 20:
            raise torch.OutOfMemoryError

    ends = [pass_checks(agreement, ask)]  # the first step is always finished
    agreement.end_step(seconds=60)  # 0.6 s a check: an agreement after 8 of them
    asked = False
    ends.append(pass_checks(agreement, ask))
    asked = False
    ends.append(pass_checks(agreement, run_out_of_memory))
    ends.append(pass_checks(agreement))
    agreement.end_step(seconds=9)
    ends.append(pass_checks(agreement, ask))  # a short step is always finished
    # Ranks that had lost each other would hang here.
    assert comm.all_gather_object(rank) == [0, 1]
    return ends


def test_all_ranks_end_a_step_at_the_first_agreement_after_one_rank_wants_to() -> None:
    first, second = run_ranks(2, steps_of_a_rank)
    given_up = "StepGivenUpError at 23"
    assert first == ["whole", given_up, "ChunkOutOfMemoryError at 23", "whole", "whole"]
    assert second == ["whole", given_up, "ChunkOutOfMemoryError at 20", "whole", "whole"]


def test_only_a_lack_of_device_memory_ends_work_without_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comm, "max_over_ranks", lambda *numbers: numbers)

    def fail(error: Exception) -> None:
        raise error

    # cuBLAS and the driver raise plain RuntimeErrors.
    for text in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when", "CUDA error: out of memory"):
        agreement = Agreement()
        with pytest.raises(ChunkOutOfMemoryError):
            agreement.on_all_ranks(partial(fail, RuntimeError(text)))
    agreement = Agreement()
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        agreement.on_all_ranks(partial(fail, RuntimeError("a bug")))
    assert not agreement.has_failed


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_tensors_of_work_that_did_not_fit_are_freed_before_ranks_agree(
    in_a_cycle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU was seen to keep the graph of a failed chunk until Python collected its garbage."""
    graphs: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def work() -> None:
        graph = torch.ones(3, requires_grad=True) * 2
        graphs.append(weakref.ref(graph))
        if in_a_cycle:
            cycle: list[object] = [graph]
            cycle.append(cycle)
        raise torch.OutOfMemoryError

    def agree(*numbers: float) -> tuple[float, ...]:
        alive.extend(graph() is not None for graph in graphs)
        return numbers

    monkeypatch.setattr(comm, "max_over_ranks", agree)
    agreement = Agreement()
    agreement.begin_step()
    gc.disable()
    try:
        with pytest.raises(ChunkOutOfMemoryError):
            agreement.on_all_ranks(work)
    finally:
        gc.enable()

    assert alive == [False]


def test_no_two_chunks_of_any_rank_step_or_run_draw_the_same_masks() -> None:
    drawn = set()
    places = list(itertools.product(range(3), range(3), range(3), range(4)))
    for place in places:  # seed, step, rank, chunk
        seed_random(*place)
        first = torch.randint(2**40, (2,)).tolist()
        seed_random(*place)
        assert torch.randint(2**40, (2,)).tolist() == first
        drawn.add(tuple(first))
    assert len(drawn) == len(places)


def test_a_chunk_has_other_masks_in_every_step_and_the_same_in_both_passes() -> None:
    drawn = []
    for step in (0, 1, 1, 2):
        seed_of_chunks(42, step)(5)
        drawn.append(torch.rand(4).tolist())
    assert drawn[1] == drawn[2]
    assert len(set(map(tuple, drawn))) == 3
