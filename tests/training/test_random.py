"""Chance in training is a function of where it is drawn, and nowhere the same."""

from __future__ import annotations

import itertools

import torch

from pipeline.training.engine import seed_of_chunks, seed_random


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
