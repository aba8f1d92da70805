"""Ranks give a step up together, at the same place, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline import comm
from pipeline.training.engine import Agreement, ChunkOutOfMemoryError, StepGivenUpError
from tests.support import run_ranks

NUM_POINTS = 100


def pass_points(agreement: Agreement, before: Callable[[int], None] = lambda point: None) -> str:
    """Go through a step; where and how it ended."""
    point = 0
    agreement.begin_step()
    try:
        with agreement.out_of_memory_on_all_ranks():
            for point in range(NUM_POINTS):
                before(point)
                agreement.check()
    except (ChunkOutOfMemoryError, StepGivenUpError) as error:
        return f"{type(error).__name__} at {point}"
    return "whole"


def steps_of_a_rank() -> list[str]:
    rank, asked = comm.rank(), False
    agreement = Agreement(lambda: asked)

    def ask(point: int) -> None:
        nonlocal asked
        asked = asked or (rank == 1 and point == 20)

    def run_out_of_memory(point: int) -> None:
        if rank == 1 and point == 20:
            raise torch.OutOfMemoryError

    ends = [pass_points(agreement, ask)]  # the first step is always finished
    agreement.end_step(seconds=60)  # 0.6 s a point: an agreement after 8 of them
    asked = False
    ends.append(pass_points(agreement, ask))
    asked = False
    ends.append(pass_points(agreement, run_out_of_memory))
    ends.append(pass_points(agreement))
    agreement.end_step(seconds=9)
    ends.append(pass_points(agreement, ask))  # a short step is always finished
    # Ranks that had lost each other would hang here.
    assert comm.all_gather_object(rank) == [0, 1]
    return ends


def test_all_ranks_end_a_step_at_the_first_agreement_after_one_rank_wants_to() -> None:
    first, second = run_ranks(2, steps_of_a_rank)
    given_up = "StepGivenUpError at 23"
    assert first == ["whole", given_up, "ChunkOutOfMemoryError at 23", "whole", "whole"]
    assert second == ["whole", given_up, "ChunkOutOfMemoryError at 20", "whole", "whole"]
