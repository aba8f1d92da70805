"""Token prediction on the pretended device: gradients as on the CPU, no wait in any chunk."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.config import (
    DataConfig,
    MaskedDiffusionConfig,
    MntpConfig,
    ModelConfig,
    NextTokenConfig,
    ObjectiveConfig,
    TrainConfig,
)
from pipeline.data.batch import Chunk, GlobalBatch
from pipeline.data.text_loader import NOTHING
from pipeline.model.encoder import build_language_model
from pipeline.training import token_step
from pipeline.training.token_step import TokenPrediction
from tests.benchmarks.bench_support import PlainEngine, gradient_error, take_gradients
from tests.fake_cuda.fake_cuda import FakeCuda, to_cuda
from tests.fake_cuda.tracing import WatchedEngine

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


# Waits of a step: for the loss of all chunks.
MAX_SYNCS = 1
OBJECTIVES = {
    "next token": ("cache", ObjectiveConfig(next_token=NextTokenConfig())),
    "mntp": ("sweep", ObjectiveConfig(mntp=MntpConfig())),
    "masked diffusion": ("cache", ObjectiveConfig(masked_diffusion=MaskedDiffusionConfig())),
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language-model")
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
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_equal_those_of_the_cpu_and_chunks_do_not_wait(
    name: str, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, objective = OBJECTIVES[name]
    tokenizer = SimpleNamespace(mask_token_id=5, all_special_ids=[0], vocab_size=VOCABULARY)
    monkeypatch.setattr(token_step, "load_model_tokenizer", lambda _: tokenizer)
    attention: Any = "causal" if objective.next_token else "bidirectional"
    config = TrainConfig(
        output_dir=model_path,
        num_steps=1,
        model=ModelConfig(path=str(model_path), dtype="float32", attention=attention),
        objective=objective,
        data=DataConfig(path=model_path),
        schedule=schedule,  # type: ignore[arg-type]
    )
    data: Any = SimpleNamespace(tokenizer=tokenizer)
    model = build_language_model(config.model).train()
    on_device = to_cuda(copy.deepcopy(model), torch.bfloat16)
    values = TokenPrediction(config, data).accumulate(PlainEngine(model), batch_of(3))
    wanted = take_gradients(model)
    syncs = []
    for num_chunks in (3, 6):
        with FakeCuda() as record:
            engine = WatchedEngine(on_device, record)
            ours = TokenPrediction(config, data).accumulate(engine, batch_of(num_chunks))
        assert not record.hot_syncs, f"the host waits within {dict(record.hot_syncs)}"
        gradients: Any = take_gradients(on_device)
        found = {key: gradient.inner.float() for key, gradient in gradients.items()}
        assert ours["loss"] == pytest.approx(values["loss"], rel=1e-2)
        assert gradient_error(found, wanted) <= 3e-2
        syncs.append(record.num_syncs)

    # Nor does the head wait: the loss is summed on the device, and read after the last chunk.
    assert syncs[0] == syncs[1] <= MAX_SYNCS, dict(record.syncs)
