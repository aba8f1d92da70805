"""Every family of models on the pretended device: forward and backward, without a wait."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import LoraConfig, ModelConfig
from pipeline.model.encoder import build_encoder
from tests.fake_cuda.fake_cuda import CudaTensor, FakeCuda, to_cuda
from tests.model.model_support import CASES, DECODERS, LENGTHS, save_model

POOLINGS = ("mean", "weighted_mean", "last_token", "first_token")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{name}, {POOLINGS[number % 4]}": (name, {"pooling": POOLINGS[number % 4]})
        for number, name in enumerate(CASES)
    },
    **{f"{name}, causal": (name, {"attention": "causal"}) for name in DECODERS[:4]},
    "LoRA": ("qwen2", {"lora": LoraConfig(rank=4)}),
    "checkpointing": ("qwen2", {"gradient_checkpointing": True}),
    "attention dropout": ("qwen2", {"attention_dropout": 0.1}),
}
IDS = torch.randint(3, 200, (int(LENGTHS.sum()),), generator=torch.Generator().manual_seed(1))
SKIPPED = torch.tensor([1, 3, 0, 2])  # an instruction's tokens at the front of each row


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_computes_on_one_device_and_never_waits(variant: str, tmp_path: Path) -> None:
    name, changes = VARIANTS[variant]
    folder = save_model(CASES[name][0], tmp_path)
    config = ModelConfig(path=str(folder), dtype="float32", pool_instruction=False, **changes)
    encoder = build_encoder(config)
    with torch.no_grad():
        wanted = encoder(IDS, LENGTHS, SKIPPED)
    device_encoder = to_cuda(copy.deepcopy(encoder), torch.bfloat16)
    device_encoder.train("pooling" not in changes and "attention" not in changes)
    with FakeCuda() as record:
        out: Any = device_encoder(CudaTensor(IDS), LENGTHS, CudaTensor(SKIPPED))
        (out * torch.ones(out.shape, device="cuda")).sum().backward()

    assert record.num_syncs == 0, dict(record.syncs)
    assert all(
        isinstance(parameter.grad, CudaTensor)
        for parameter in device_encoder.parameters()
        if parameter.grad is not None
    )
    if not device_encoder.training:
        cosine = torch.nn.functional.cosine_similarity(out.detach().inner.float(), wanted)
        assert cosine.min() > 0.99
