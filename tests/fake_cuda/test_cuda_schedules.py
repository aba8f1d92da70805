"""A contrastive step on the pretended device: its gradients, and where the host waits for it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import ChunkConfig
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
)
from tests.fake_cuda.fake_cuda import CUDA, FakeCuda, Record, to_cuda

# How often the host may wait for the device in one step, with any number of chunks. Each wait
# empties the device's queue of work: raise this number only if there is no other way.
MAX_SYNCS = 14
# The only files that may make it wait: the loss and what all ranks agree on, never the model.
WAITING_FILES = ("loss/", "training/contrastive_step.py", "training/engine.py", "comm.py")
# Kernel launches of one layer of one chunk: forward without graph, forward and backward with.
MAX_LAYER_LAUNCHES = {"forward": 45, "both passes": 190}


@pytest.fixture(scope="module")
def batch() -> Any:
    lengths = np.random.default_rng(0).integers(2, 60, size=24)
    return make_batch(draw_texts(lengths, 300), 12, max_tokens=300, min_chunks=3)


@pytest.fixture(scope="module")
def oracle(qwen2: Path, batch: Any) -> tuple[Any, Gradients]:
    """The encoder on the CPU in fp32, and its gradients by plain autograd."""
    encoder = load(qwen2)
    plain_loss(encoder, batch)[0].backward()
    return encoder, take_gradients(encoder)


def step(
    encoder: Any, batch: Any, schedule: str, *, dtype: torch.dtype, boundaries: str = "device"
) -> tuple[Gradients, Record]:
    encoder = to_cuda(copy.deepcopy(encoder), dtype)
    config = step_config(schedule)
    config = dataclasses.replace(config, chunks=ChunkConfig(boundaries=boundaries, keep_graphs=0))
    with FakeCuda() as record:
        accumulate_gradients(PlainEngine(encoder), batch, config, device=CUDA)
    gradients: Any = take_gradients(encoder)
    return {name: gradient.inner.float() for name, gradient in gradients.items()}, record


CASES = [("plain", "device"), ("cache", "device"), ("sweep", "device"), ("sweep", "host")]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("schedule", "boundaries"), CASES)
def test_gradients_equal_plain_autograd_and_no_forward_or_backward_waits(
    schedule: str,
    boundaries: str,
    dtype: torch.dtype,
    limit: float,
    batch: Any,
    oracle: Any,
    on_fake_cuda: None,
) -> None:
    encoder, wanted = oracle
    ours, record = step(encoder, batch, schedule, dtype=dtype, boundaries=boundaries)

    assert gradient_error(ours, wanted) <= limit
    places = [place for place in record.syncs if not place.startswith(WAITING_FILES)]
    # Boundaries on the host are copied there without waiting.
    assert [place for place in places if "schedules" not in place] == []
    assert record.num_syncs - sum(record.syncs[place] for place in places) <= MAX_SYNCS
    assert ("_varlen_attn" in record.launches) == (dtype == torch.bfloat16)


def test_more_chunks_make_the_host_wait_no_more_often(oracle: Any, on_fake_cuda: None) -> None:
    lengths = np.random.default_rng(0).integers(2, 60, size=24)
    texts = draw_texts(lengths, 300)
    waits = [
        step(
            oracle[0],
            make_batch(texts, 12, max_tokens=tokens, min_chunks=2),
            "cache",
            dtype=torch.bfloat16,
        )[1].num_syncs
        for tokens in (400, 100)
    ]

    assert waits[0] == waits[1]


def test_a_layer_launches_no_more_kernels_than_written_down(
    tmp_path: Path, on_fake_cuda: None
) -> None:
    batch = make_batch(draw_texts(np.array([8, 9, 10, 11]), 300), 2, max_tokens=100)
    forward, both = [], []
    for num_layers in (2, 4):
        folder = tiny_qwen2(
            tmp_path / str(num_layers), hidden_size=64, num_layers=num_layers, vocab_size=300
        )
        encoder = to_cuda(load(folder), torch.bfloat16)
        chunk = batch.chunks[0]
        with FakeCuda() as record, torch.no_grad():
            ids = torch.from_numpy(chunk.input_ids).to("cuda")
            encoder(ids, torch.from_numpy(chunk.lengths))
        forward.append(record.num_launches)
        both.append(step(load(folder), batch, "cache", dtype=torch.bfloat16)[1].num_launches)

    assert (forward[1] - forward[0]) / 2 <= MAX_LAYER_LAUNCHES["forward"]
    assert (both[1] - both[0]) / 2 <= MAX_LAYER_LAUNCHES["both passes"]
