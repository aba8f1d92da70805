from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers.models import Pooling

from pipeline.config import POOLINGS
from pipeline.model.attention import PackedRows
from pipeline.model.encoder import pool

LENGTHS = [3, 1, 5]


def test_every_pooling_equals_a_loop_over_rows() -> None:
    hidden = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    rows = PackedRows.of(torch.tensor(LENGTHS), causal=False)
    for how, of_row in {
        "mean": lambda row: row.sum(0) / len(row),
        "weighted_mean": lambda row: (
            sum((i + 1) * vector for i, vector in enumerate(row)) / sum(range(1, len(row) + 1))
        ),
        "last_token": lambda row: row[-1],
        "first_token": lambda row: row[0],
    }.items():
        wanted = torch.stack([of_row(row) for row in hidden.split(LENGTHS)])
        torch.testing.assert_close(pool(hidden, rows, how), wanted)


@pytest.mark.parametrize("how", ["mean", "weighted_mean", "last_token", "first_token"])
def test_a_pooling_without_instructions_equals_sentence_transformers(how: Any) -> None:
    hidden = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    skipped = [2, 0, 3]
    rows = PackedRows.of(torch.tensor(LENGTHS), causal=False, not_pooled=torch.tensor(skipped))
    (mode,) = (mode for mode, pooling in POOLINGS.items() if pooling == how)
    theirs = Pooling(4, mode, include_prompt=False)
    wanted = [
        theirs(
            {
                "token_embeddings": row[None],
                "attention_mask": torch.ones(1, len(row), dtype=torch.int64),
                "prompt_length": count,
            }
        )["sentence_embedding"]
        for row, count in zip(hidden.split(LENGTHS), skipped, strict=True)
    ]
    torch.testing.assert_close(pool(hidden, rows, how), torch.cat(wanted))


def test_pooling_of_bf16_states_is_summed_in_fp32() -> None:
    hidden = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    rows = PackedRows.of(torch.tensor([4096]), causal=False)
    assert pool(hidden, rows, "mean").item() == 1.0  # a bf16 sum would stop at 256


def test_positions_restart_in_every_row() -> None:
    rows = PackedRows.of(torch.tensor(LENGTHS), causal=True)
    assert rows.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert rows.boundaries.tolist() == [0, 3, 4, 9]
    assert rows.longest == 5
