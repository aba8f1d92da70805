"""Encoding on the pretended device: the host waits once, for all vectors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from pipeline.config import Template
from pipeline.model.load_export import LoadedExport
from pipeline.model_limits import ModelLimits
from tests.benchmarks.bench_support import draw_texts, load
from tests.fake_cuda.fake_cuda import FakeCuda, to_cuda
from tests.fake_cuda.tracing import watch


def test_vectors_are_read_once_for_any_number_of_forwards(qwen2: Path) -> None:
    ids = [text.tolist() for text in draw_texts(np.array([3, 17, 1, 9, 25, 12]), 300)]
    model = LoadedExport(
        encoder=load(qwen2),
        tokenizer=None,
        template=Template(),
        similarity="cosine",
        max_length=64,
        num_dimensions=64,
        max_tokens=200,
        limits=ModelLimits(path=str(qwen2)),
    )
    wanted = model.encode_tokens(ids, [0] * len(ids))
    encoder = to_cuda(load(qwen2), torch.bfloat16)
    for max_tokens in (200, 30):
        on_device = dataclasses.replace(model, encoder=encoder, max_tokens=max_tokens)
        with FakeCuda() as record:
            watch(encoder, record)
            vectors = on_device.encode_tokens(ids, [0] * len(ids))
            num_forwards = record.launches["_varlen_attn"] / 2  # layers

        assert not record.hot_syncs, f"the host waits within {dict(record.hot_syncs)}"
        assert record.num_syncs == 1, dict(record.syncs)
        assert (vectors * wanted).sum(1).min() > 0.99
        assert num_forwards == (1 if max_tokens == 200 else 3)
