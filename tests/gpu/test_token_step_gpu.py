"""Token prediction on a GPU against whole rows of scores on the CPU in fp32."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.config import DataConfig, ModelConfig, NextTokenConfig, ObjectiveConfig, TrainConfig
from pipeline.data.batch import Chunk, GlobalBatch
from pipeline.data.text_loader import NOTHING
from pipeline.model.encoder import build_language_model
from pipeline.training.token_step import TokenPrediction
from tests.benchmarks.bench_support import PlainEngine, gradient_error, take_gradients, to_device

pytestmark = pytest.mark.gpu
VOCABULARY, ROWS, LENGTH = 500, 12, 40


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)], ids=["fp32", "bf16"]
)
def test_gradients_equal_those_of_the_cpu(tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
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
    )
    ids = np.random.default_rng(0).integers(0, VOCABULARY, size=(ROWS, LENGTH))
    oracle = build_language_model(config.model).train()
    model = to_device(copy.deepcopy(oracle), "cuda", dtype)
    flat = torch.from_numpy(ids.reshape(-1))
    states = oracle.hidden_states(flat, torch.full((ROWS,), LENGTH))
    scores = oracle.logits(states).view(ROWS, LENGTH, VOCABULARY)[:, :-1]
    loss = F.cross_entropy(scores.reshape(-1, VOCABULARY), torch.from_numpy(ids[:, 1:]).reshape(-1))
    loss.backward()
    chunks = tuple(
        Chunk(
            input_ids=ids[rows].reshape(-1),
            lengths=np.full(len(rows), LENGTH, dtype=np.int64),
            texts=rows,
        )
        for rows in np.array_split(np.arange(ROWS), 3)
    )
    batch = GlobalBatch(
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
    data = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=VOCABULARY))

    values = TokenPrediction(config, data).accumulate(PlainEngine(model), batch)  # type: ignore[arg-type]

    assert values["loss"] == pytest.approx(loss.item(), rel=limit)
    ours = {name: gradient.float().cpu() for name, gradient in take_gradients(model).items()}
    assert gradient_error(ours, take_gradients(oracle)) <= limit
