"""The cached step on a GPU against one autograd graph of the same weights on the CPU in fp32."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.training.contrastive_step import accumulate_gradients
from tests.benchmarks.bench_support import (
    Gradients,
    PlainEngine,
    draw_texts,
    gradient_error,
    load,
    make_batch,
    plain_loss,
    step_config,
    take_gradients,
    tiny_qwen2,
    to_device,
)

pytestmark = pytest.mark.gpu
VOCAB_SIZE, PAIRS = 500, 16


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return tiny_qwen2(path, hidden_size=128, num_layers=3, vocab_size=VOCAB_SIZE)


def gradients(path: Path, schedule: str, dtype: torch.dtype) -> tuple[Gradients, Gradients]:
    """Of the step on the GPU, and of the oracle on the CPU."""
    lengths = np.random.default_rng(0).integers(2, 90, size=2 * PAIRS)
    texts = draw_texts(lengths, VOCAB_SIZE)
    batch = make_batch(texts, PAIRS, max_tokens=600, min_chunks=3)
    oracle = load(path)
    encoder = to_device(copy.deepcopy(oracle), "cuda", dtype)
    plain_loss(oracle, batch)[0].backward()
    engine = PlainEngine(encoder)
    accumulate_gradients(engine, batch, step_config(schedule), device=torch.device("cuda"))
    ours = {name: g.float().cpu() for name, g in take_gradients(encoder).items()}
    return ours, take_gradients(oracle)


@pytest.mark.parametrize("schedule", ["plain", "cache", "sweep"])
def test_gradients_equal_those_of_the_cpu_in_fp32(model_path: Path, schedule: str) -> None:
    ours, wanted = gradients(model_path, schedule, torch.float32)

    assert gradient_error(ours, wanted) <= 1e-4


@pytest.mark.parametrize("schedule", ["cache", "sweep"])
def test_bf16_gradients_through_the_packed_kernel_point_the_same_way(
    model_path: Path, schedule: str
) -> None:
    ours, wanted = gradients(model_path, schedule, torch.bfloat16)

    flat = [torch.cat([g[name].flatten() for name in wanted]) for g in (ours, wanted)]
    assert torch.cosine_similarity(*flat, dim=0) >= 0.98
