"""P1: the cached step over the forward and backward it must contain. P2: and over its peers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_support import (
    TEMPERATURE,
    Cost,
    Figure,
    Gradients,
    PlainEngine,
    draw_texts,
    gradient_error,
    interleave,
    load,
    make_batch,
    minilm_path,
    plain_loss,
    ratio,
    retrieval_lengths,
    same_gradients,
    step_config,
    take_gradients,
)
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

from pipeline.config import TrainConfig
from pipeline.data.batch import GlobalBatch
from pipeline.model.encoder import Encoder
from pipeline.training.contrastive_step import accumulate_gradients

CPU = torch.device("cpu")
CHUNK_TOKENS = 2048
VOCAB_SIZE = 30_000
Features = dict[str, torch.Tensor]


def run_step(engine: PlainEngine, batch: GlobalBatch, config: TrainConfig) -> Gradients:
    """Our step as the trainer calls it, without the update."""
    accumulate_gradients(engine, batch, config, device=CPU)
    return take_gradients(engine.encoder.backbone)


def overhead(quick: bool) -> list[Figure]:
    """P1: 4/3 in theory; a kept graph spares its chunk the second forward."""
    engine = PlainEngine(load(minilm_path()))
    pairs = 8 if quick else 48
    texts = draw_texts(
        np.concatenate(retrieval_lengths(np.random.default_rng(0), pairs)), VOCAB_SIZE
    )
    num_chunks = 4
    tokens = sum(len(text) for text in texts)
    budget = -(-tokens // num_chunks) + 64
    batch = make_batch(texts, pairs, max_tokens=budget, min_chunks=num_chunks)
    loss, parts = plain_loss(engine.encoder, batch)
    gradients = list(torch.autograd.grad(loss, parts, retain_graph=True))
    loss.backward()
    wanted = take_gradients(engine.encoder.backbone)
    del loss, parts
    num_chunks = len(batch.chunks)
    kept = [0, 1, 2, 3, num_chunks]
    steps = {
        f"keep {k}": functools.partial(run_step, engine, batch, _keeping(k, num_chunks))
        for k in kept
    }
    costs, results = interleave(
        {
            "forward": functools.partial(_forward, engine.encoder, batch),
            "plain": functools.partial(_plain, engine.encoder, batch, gradients),
            **steps,
        },
        2 if quick else 4,
    )
    error = max(gradient_error(results[name], wanted) for name in ("plain", *steps))
    plain = costs["plain"]
    theory = 1 + costs["forward"].cpu / plain.cpu
    return [
        same_gradients(f"k = {', '.join(map(str, kept))} against one autograd graph", error, 1e-5),
        Figure(
            name=f"forward + backward of {num_chunks} chunks, {tokens:,} tokens",
            measured=f"{plain.cpu:.2f} s; with a second forward {theory:.3f}",
        ),
        ratio(costs["keep 0"], plain, "cached step / plain", 1.36),
        *(
            ratio(
                costs[f"keep {k}"],
                plain,
                f"... {k} of {num_chunks} graphs kept",
                (4 - k / num_chunks) / 3 * 1.03,
            )
            for k in kept[1:]
        ),
    ]


def _keeping(k: int, num_chunks: int) -> TrainConfig:
    return step_config("plain") if k == num_chunks else step_config(keep_graphs=k)


def _forward(encoder: Encoder, batch: GlobalBatch) -> Gradients:
    with torch.no_grad():
        for chunk in batch.chunks:
            encoder(torch.from_numpy(chunk.input_ids), torch.from_numpy(chunk.lengths))
    return {}


def _plain(encoder: Encoder, batch: GlobalBatch, gradients: list[torch.Tensor]) -> Gradients:
    """The least that any step must do: the loss costs nothing, one graph lives at a time."""
    for chunk, gradient in zip(batch.chunks, gradients, strict=True):
        rows = encoder(torch.from_numpy(chunk.input_ids), torch.from_numpy(chunk.lengths))
        rows.backward(gradient)
    return take_gradients(encoder.backbone)


def pad(texts: list[Any]) -> Features:
    """A collator's output: one rectangle and its mask."""
    width = max(len(text) for text in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.from_numpy(text)
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def grad_cache_step(
    embed: Callable[[Features], torch.Tensor], sides: list[Features], rows: int
) -> None:
    """Algorithm 1 of arXiv 2101.06983 as written there.

    Queries and documents apart; each padded once, then cut into sub-batches of `rows` rows. The
    representations are leaves of one autograd graph of the whole loss.
    """
    cut = [[dict(zip(side, part, strict=True)) for part in _rows_of(side, rows)] for side in sides]
    with torch.no_grad():
        cached = [torch.cat([embed(part) for part in parts]) for parts in cut]
    leaves = [rows_.requires_grad_() for rows_ in cached]
    scores = leaves[0] @ leaves[1].T / TEMPERATURE
    F.cross_entropy(scores, torch.arange(len(scores))).backward()
    for parts, leaf in zip(cut, leaves, strict=True):
        assert leaf.grad is not None
        for part, gradient in zip(parts, leaf.grad.split(rows), strict=True):
            (embed(part) * gradient).sum().backward()


def _rows_of(side: Features, rows: int) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(*(value.split(rows) for value in side.values()), strict=True))


def against_peers(quick: bool) -> list[Figure]:
    """P2: the same weights and tokens through sentence-transformers and the published algorithm."""
    figures = []
    for pairs in (8,) if quick else (48, 128):
        figures += _against_peers(pairs, repeats=1 if quick else 2)
    return figures


def _against_peers(pairs: int, *, repeats: int) -> list[Figure]:
    queries, documents = retrieval_lengths(np.random.default_rng(pairs), pairs)
    texts = draw_texts(np.concatenate([queries, documents]), VOCAB_SIZE)
    engine = PlainEngine(load(minilm_path()))
    batch = make_batch(texts, pairs, max_tokens=CHUNK_TOKENS)
    peer = SentenceTransformer(str(minilm_path()), device="cpu").eval()
    backbone = peer[0].auto_model
    sides = [pad(texts[:pairs]), pad(texts[pairs:])]

    def embed(features: Features) -> torch.Tensor:
        vectors: torch.Tensor = peer(dict(features))["sentence_embedding"]
        return vectors

    def cached_loss(**mode: int) -> Gradients:
        loss = CachedMultipleNegativesRankingLoss(peer, scale=1 / TEMPERATURE, **mode)
        loss([dict(side) for side in sides], None).backward()
        return take_gradients(backbone)

    def published() -> Gradients:
        grad_cache_step(embed, sides, 16)
        return take_gradients(backbone)

    ours: dict[str, Callable[[], Gradients]] = {
        "ours": functools.partial(run_step, engine, batch, step_config()),
        "ours, 1 graph kept": functools.partial(
            run_step, engine, batch, step_config(keep_graphs=1)
        ),
    }
    peers: dict[str, Callable[[], Gradients]] = {
        "sentence-transformers, 16 rows": functools.partial(cached_loss, mini_batch_size=16),
        "sentence-transformers, 32 rows (default)": functools.partial(
            cached_loss, mini_batch_size=32
        ),
        f"sentence-transformers, {CHUNK_TOKENS} tokens": functools.partial(
            cached_loss, mini_batch_num_tokens=CHUNK_TOKENS
        ),
        "GradCache as published, 16 rows": published,
    }
    costs, results = interleave({**ours, **peers}, repeats)
    wanted = results["GradCache as published, 16 rows"]
    error = max(gradient_error(result, wanted) for result in results.values())
    name = f"{pairs} pairs, {batch.tokens:,} tokens"
    return [
        same_gradients(f"{name}, all six against GradCache", error, 1e-4),
        Figure(
            name=f"{name}: our step",
            measured=f"{costs['ours'].cpu:.2f} s in {len(batch.chunks)} chunks",
        ),
        *(_against(costs, peer_name) for peer_name in peers),
    ]


def _against(costs: dict[str, Cost], peer: str) -> Figure:
    line = ratio(costs["ours"], costs[peer], f"ours / {peer}", 0.4 if "GradCache" in peer else 0.5)
    kept = costs["ours, 1 graph kept"].cpu / costs[peer].cpu
    return Figure(
        name=line.name,
        asked=line.asked,
        measured=f"{line.measured}; 1 graph kept {kept:.3f}",
        ok=line.ok,
    )
