"""P5: packed rows against padded ones, random and sorted by length, through the same model."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bench_support import (
    Figure,
    Gradients,
    draw_texts,
    gradient_error,
    interleave,
    load,
    make_batch,
    ratio,
    retrieval_lengths,
    same_gradients,
    take_gradients,
    tiny_qwen2,
)
from numpy.typing import NDArray
from transformers import Qwen2Config, Qwen2Model

from pipeline.data.batch import GlobalBatch
from pipeline.model.encoder import Encoder

ROWS = 32
Texts = list[NDArray[np.int64]]


def throughput(quick: bool) -> list[Figure]:
    """P5: real tokens per second of forward and backward, for as many forwards in each layout."""
    count = 64 if quick else 256
    _, lengths = retrieval_lengths(np.random.default_rng(0), count)
    texts = draw_texts(lengths, 1000)
    weights = torch.randn(count, 128, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_qwen2(Path(folder), hidden_size=128, num_layers=4, vocab_size=1000)
        encoder = load(path)
        config = Qwen2Config.from_pretrained(path)
        config.is_causal = False
        padded = Qwen2Model.from_pretrained(path, config=config, attn_implementation="sdpa").eval()
    num_chunks = -(-count // ROWS)
    budget = -(-sum(lengths.tolist()) // num_chunks) + ROWS
    batch = make_batch(texts, count // 2, max_tokens=budget, min_chunks=num_chunks)
    by_length = np.argsort(lengths, kind="stable")
    works = {
        "packed": functools.partial(_packed, encoder, batch, weights),
        "random padding": functools.partial(_padded, padded, texts, np.arange(count), weights),
        "length-sorted padding": functools.partial(_padded, padded, texts, by_length, weights),
    }
    costs, results = interleave(works, 2 if quick else 3)
    error = max(gradient_error(result, results["random padding"]) for result in results.values())
    rates = ", ".join(f"{name} {batch.tokens / cost.cpu:,.0f}" for name, cost in costs.items())
    return [
        same_gradients("the three layouts", error, 1e-5),
        Figure(
            name=f"{count} texts, {batch.tokens:,} tokens, {len(batch.chunks)} forwards: tokens/s",
            measured=rates,
        ),
        ratio(
            costs["random padding"], costs["packed"], "packed / random padding", 2.0, at_least=True
        ),
        ratio(
            costs["length-sorted padding"],
            costs["packed"],
            "packed / length-sorted padding",
            1.3,
            at_least=True,
        ),
    ]


def _packed(encoder: Encoder, batch: GlobalBatch, weights: torch.Tensor) -> Gradients:
    for chunk in batch.chunks:
        rows = encoder(torch.from_numpy(chunk.input_ids), torch.from_numpy(chunk.lengths))
        (rows * weights[chunk.texts]).sum().backward()
    return take_gradients(encoder.backbone)


def _padded(
    model: torch.nn.Module, texts: Texts, order: NDArray[np.int64], weights: torch.Tensor
) -> Gradients:
    """Rectangles of equal numbers of rows, masked, mean over real tokens."""
    for numbers in np.split(order, range(ROWS, len(order), ROWS)):
        width = max(len(texts[number]) for number in numbers)
        ids = torch.zeros(len(numbers), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, number in enumerate(numbers):
            ids[row, : len(texts[number])] = torch.from_numpy(texts[number])
            mask[row, : len(texts[number])] = 1
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = mask.unsqueeze(-1)
        rows = F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)
        (rows * weights[numbers]).sum().backward()
    return take_gradients(model)
