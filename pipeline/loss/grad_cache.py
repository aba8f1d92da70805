"""Cache gradients: embed everything without graphs, then replay each chunk with its gradient.

    pass 1   chunk -> embedding, no graph; the state of the random generators is kept
    (loss)   gradient of the loss by every embedding
    pass 2   generators restored, chunk -> the same embedding with graph -> backward of
             sum(embedding * gradient), whose gradient by the parameters is the loss's

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(arXiv 2101.06983), section 3. `embed` and `backward` are arguments: no engine is known here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

ChunkT = TypeVar("ChunkT")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RandomState:
    """The generators a forward may draw from: the CPU's, and the current GPU's if it is in use."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def capture(cls) -> RandomState:
        """Copy the present state of the generators."""
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state() if in_use else None)

    def restore(self) -> None:
        """Restore the generators."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CachedChunks:
    """Embeddings for the loss and state for pass 2, both left by pass 1; one entry per chunk."""

    embeddings: tuple[Tensor, ...]  # (C, E) each, without graph
    random_states: tuple[RandomState, ...]
    graphs: tuple[Tensor | None, ...]  # the same embeddings with graph, where it was kept


def embed_chunks(
    chunks: Sequence[ChunkT], embed: Callable[[ChunkT], Tensor], *, keep_graphs: int = 0
) -> CachedChunks:
    """Pass 1: embed all chunks, in order.

    Args:
        chunks: the arguments of `embed`.
        embed: chunk -> (C, E) embeddings.
        keep_graphs: number of last chunks that keep their graph for pass 2, which then skips
            their second forward: of 4 units of work (2 forwards, a backward of 2), k of C chunks
            save k / C. With all of them this is no caching at all.
    """
    embeddings, states, graphs = [], [], []
    for number, chunk in enumerate(chunks):
        keep = number >= len(chunks) - keep_graphs
        states.append(RandomState.capture())
        with torch.set_grad_enabled(keep):
            embedding = embed(chunk)
        embeddings.append(embedding.detach())
        graphs.append(embedding if keep else None)
    return CachedChunks(
        embeddings=tuple(embeddings), random_states=tuple(states), graphs=tuple(graphs)
    )


def replay_chunks(
    chunks: Sequence[ChunkT],
    cached: CachedChunks,
    gradients: Sequence[Tensor],
    embed: Callable[[ChunkT], Tensor],
    backward: Callable[[Tensor], None],
    *,
    check: bool = False,
) -> None:
    """Pass 2: run one backward per chunk, so that parameters get the gradient of the loss.

    Args:
        chunks: as given to `embed_chunks`.
        cached: what `embed_chunks` returned for them.
        gradients: (C, E) gradient of the loss by each chunk's embeddings.
        embed: as given to `embed_chunks`.
        backward: takes the scalar; called once per chunk, also where the gradient is zero, so
            that ranks whose collectives run inside it stay together.
        check: compare each embedding with pass 1 before using it.

    Raises:
        RuntimeError: `check` found an embedding that differs: `embed` is not a function of the
            chunk, the parameters and the generators, and the gradients would be wrong.
    """
    graphs, after = list(cached.graphs), RandomState.capture()
    # Last chunk first: kept graphs are used up before new ones are made.
    for number in reversed(range(len(chunks))):
        first, gradient = cached.embeddings[number], gradients[number]
        with torch.enable_grad():
            embedding, graphs[number] = graphs[number], None
            if embedding is None:
                cached.random_states[number].restore()
                embedding = embed(chunks[number])
            if check and not torch.equal(embedding.detach(), first):
                worst = float((embedding.detach() - first).abs().max())
                raise RuntimeError(
                    f"chunk {number}: pass 2 differs from pass 1 by {worst:.3g} in an embedding"
                )
            surrogate = (embedding * gradient).sum()  # (C, E) -> ()
        backward(surrogate)
    # The next draw sees the generators as if there had been no second pass.
    after.restore()
