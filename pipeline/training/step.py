"""One optimizer step: global batch in, exact gradient of the global mean loss out.

    pass 1   every chunk -> embeddings, no graph          (grad_cache.embed_chunks)
    loss     over all queries and documents of all ranks  (contrastive_loss), gradient per vector
    pass 2   every chunk again, with graph, same dropout  (grad_cache.replay_chunks) -> backward
    update   one reduction, one clip, one AdamW step

After Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(arXiv 2101.06983), algorithm 1.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch

from pipeline.config import LossConfig
from pipeline.data.batch import Chunk, GlobalBatch, Ragged
from pipeline.loss import grad_cache
from pipeline.loss.contrastive import LossOutput, RaggedIndex, Targets, contrastive_loss


class Engine(Protocol):
    """What a step needs of an engine."""

    def embed(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Embed one packed chunk: (T,) ids and (C,) lengths to (C, E)."""

    def accumulation(self) -> AbstractContextManager[None]:
        """Context of all backwards of one optimizer step."""

    def backward(self, surrogate: torch.Tensor) -> None:
        """Accumulate gradients."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorChunk:
    """A chunk on the device, and where its rows belong."""

    input_ids: torch.Tensor  # (T,)
    lengths: torch.Tensor  # (C,)
    texts: torch.Tensor  # (C,) global text index; -1 in a dummy row


def to_tensors(chunk: Chunk, device: torch.device) -> TensorChunk:
    """Move one chunk to the device."""
    return TensorChunk(
        input_ids=torch.from_numpy(chunk.input_ids).to(device, non_blocking=True),
        lengths=torch.from_numpy(chunk.lengths).to(device, non_blocking=True),
        texts=torch.from_numpy(chunk.texts).to(device, non_blocking=True),
    )


def accumulate_gradients(
    engine: Engine, batch: GlobalBatch, config: LossConfig, *, device: torch.device
) -> LossOutput:
    """Both passes and the loss; afterwards the engine holds the reduced gradients.

    Args:
        engine: embeds chunks and takes backwards.
        batch: this rank's part of the global batch; all ranks have the same number of chunks.
        config: the loss.
        device: where the chunks go.
    """
    chunks = [to_tensors(chunk, device) for chunk in batch.chunks]

    def embed(chunk: TensorChunk) -> torch.Tensor:
        return engine.embed(chunk.input_ids, chunk.lengths)

    cached = grad_cache.embed_chunks(chunks, embed)
    embeddings = torch.cat(cached.embeddings)  # (R, E) rows of this rank, dummies included
    texts = torch.cat([chunk.texts for chunk in chunks])  # (R,)
    is_query = (texts >= 0) & (texts < batch.num_queries)
    is_document = texts >= batch.num_queries
    output = contrastive_loss(
        embeddings[is_query],
        embeddings[is_document],
        _targets(batch, texts[is_query], texts[is_document] - batch.num_queries, device),
        config=config,
    )
    gradients = torch.zeros_like(embeddings)  # stays zero in dummy rows
    gradients[is_query] = output.query_grad
    gradients[is_document] = output.document_grad
    rows = [chunk.texts.shape[0] for chunk in chunks]
    with engine.accumulation():
        grad_cache.replay_chunks(chunks, cached, gradients.split(rows), embed, engine.backward)
    return output


def _targets(
    batch: GlobalBatch, queries: torch.Tensor, documents: torch.Tensor, device: torch.device
) -> Targets:
    return Targets(
        num_queries=batch.num_queries,
        num_documents=batch.num_documents,
        query_index=queries,
        document_index=documents,
        positives=_ragged(batch.positives, device),
        negatives=_ragged(batch.negatives, device),
        masked=_ragged(batch.masked, device),
    )


def _ragged(ragged: Ragged, device: torch.device) -> RaggedIndex:
    return RaggedIndex(
        offsets=torch.from_numpy(ragged.offsets).to(device),
        values=torch.from_numpy(ragged.values).to(device),
    )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make every random number of a step a function of (seed, step, rank).

    A resumed run then draws the dropout masks of the uninterrupted one without any saved state.
    """
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) % 2**63)
