"""Token prediction on the pretended device: gradients as on the CPU, no wait in any chunk."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.config import DataConfig, ModelConfig, NextTokenConfig, ObjectiveConfig, TrainConfig
from pipeline.data.batch import Chunk, GlobalBatch
from pipeline.data.text_loader import NOTHING
from pipeline.model.encoder import build_language_model
from pipeline.training.token_step import TokenPrediction, cross_entropy_in_tiles
from tests.benchmarks.bench_support import PlainEngine, gradient_error, take_gradients
from tests.fake_cuda.fake_cuda import FakeCuda, to_cuda

VOCABULARY, ROWS, LENGTH = 300, 12, 20


def batch_of(num_chunks: int) -> GlobalBatch:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, size=(ROWS, LENGTH))
    chunks = tuple(
        Chunk(
            input_ids=ids[rows].reshape(-1),
            lengths=np.full(len(rows), LENGTH, dtype=np.int64),
            texts=rows,
        )
        for rows in np.array_split(np.arange(ROWS), num_chunks)
    )
    return GlobalBatch(
        step=0,
        num_queries=0,
        num_documents=ROWS,
        chunks=chunks,
        positives=NOTHING,
        negatives=NOTHING,
        masked=NOTHING,
        example_ids=np.arange(ROWS),
        tokens=ids.size,
    )


@pytest.mark.parametrize("schedule", ["cache", "sweep"])
def test_gradients_equal_those_of_the_cpu_and_chunks_do_not_wait(
    schedule: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).save_pretrained(tmp_path)
    config = TrainConfig(
        output_dir=tmp_path,
        num_steps=1,
        model=ModelConfig(path=str(tmp_path), dtype="float32", attention="causal"),
        objective=ObjectiveConfig(next_token=NextTokenConfig()),
        data=DataConfig(path=tmp_path),
        schedule=schedule,
    )
    data: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=VOCABULARY))
    model = build_language_model(config.model).train()
    on_device = to_cuda(copy.deepcopy(model), torch.bfloat16)
    values = TokenPrediction(config, data).accumulate(PlainEngine(model), batch_of(3))
    wanted = take_gradients(model)
    request.getfixturevalue("on_fake_cuda")
    syncs = []
    for num_chunks in (3, 6):
        with FakeCuda() as record:
            ours = TokenPrediction(config, data).accumulate(
                PlainEngine(on_device), batch_of(num_chunks)
            )
        gradients: Any = take_gradients(on_device)
        found = {name: gradient.inner.float() for name, gradient in gradients.items()}
        assert ours["loss"] == pytest.approx(values["loss"], rel=1e-2)
        assert gradient_error(found, wanted) <= 3e-2
        assert not [place for place in record.syncs if place.startswith(("model/", "loss/"))]
        # Nor the loss: it is summed on the device, and read once after the last chunk.
        lines, first = inspect.getsourcelines(cross_entropy_in_tiles)
        tiles = {f"training/token_step.py:{first + number}:" for number in range(len(lines))}
        assert not [place for place in record.syncs if place.partition(" ")[0] in tiles]
        syncs.append(record.num_syncs)

    assert syncs[0] == syncs[1] <= 6, dict(record.syncs)
