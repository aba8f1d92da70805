"""A forward hands all its work to the GPU at once.

The meta device stands in for one: whatever would wait for a GPU (`item`, `nonzero`, counting) has
no data to read there and raises.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from pipeline.config import ModelConfig, Pooling
from pipeline.model.encoder import build_encoder

LENGTHS = [3, 1, 5]


@pytest.mark.parametrize("pool_instruction", [True, False])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_forward_and_backward_never_wait(
    starter: Path, attention: str, pooling: Pooling, pool_instruction: bool
) -> None:
    config = ModelConfig(
        path=str(starter), attention=attention, pooling=pooling, pool_instruction=pool_instruction
    )
    encoder = build_encoder(config, meta=True)
    input_ids = torch.zeros(sum(LENGTHS), dtype=torch.long, device="meta")
    instruction_tokens = torch.zeros(len(LENGTHS), dtype=torch.long, device="meta")
    vectors = encoder(input_ids, torch.tensor(LENGTHS), instruction_tokens)
    assert vectors.shape == (len(LENGTHS), encoder.num_dimensions)
    vectors.sum().backward()
    assert all(p.grad is not None for p in encoder.layers.parameters())


def test_lengths_on_the_device_would_be_waited_for(starter: Path) -> None:
    encoder = build_encoder(ModelConfig(path=str(starter)), meta=True)
    input_ids = torch.zeros(sum(LENGTHS), dtype=torch.long, device="meta")
    with pytest.raises(RuntimeError, match="no data"):
        encoder(input_ids, torch.tensor(LENGTHS, device="meta"))
