"""One optimizer step: global batch in, exact gradient of the global mean loss out.

    pass 1   every chunk -> embeddings, no graph          (grad_cache or layer_sweep)
    loss     over all queries and documents of all ranks  (contrastive_loss), gradient per vector
    pass 2   every chunk again, with graph, same dropout  -> backward
    update   one reduction, one clip, one AdamW step

After Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(arXiv 2101.06983), algorithm 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from pipeline import comm
from pipeline.config import TrainConfig
from pipeline.data.batch import Chunk, GlobalBatch, Ragged
from pipeline.errors import DiffembedError
from pipeline.loss import grad_cache
from pipeline.loss.contrastive import LossOutput, RaggedIndex, Targets, contrastive_loss
from pipeline.training.agreement import (
    Agreement,
    ChunkOutOfMemoryError,
    StepGivenUpError,
)
from pipeline.training.layer_sweep import LayerSweep


class NonFiniteLossError(DiffembedError):
    """The global loss is infinite or not a number; raised on all ranks alike, before pass 2.

    Args:
        loss: what it is.
        texts: indices of this rank's texts whose embedding is not finite.
    """

    def __init__(self, loss: float, texts: list[int]) -> None:
        super().__init__(f"loss is {loss}")
        self.texts = texts


class Engine(Protocol):
    """What a step needs of an engine."""

    @property
    def encoder(self) -> Any:
        """The encoder itself."""

    def embed(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        instruction_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embed one packed chunk: (T,) ids and (C,) lengths to (C, E)."""

    def hold(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[None]:
        """Context in which these parameters are gathered."""

    def accumulation(self) -> AbstractContextManager[None]:
        """Context of all backwards of one optimizer step."""

    def backward(self, surrogate: torch.Tensor) -> None:
        """Accumulate gradients, to be averaged over ranks."""

    def discard(self) -> None:
        """Forget what an accumulation gathered before an exception ended it."""


@dataclasses.dataclass(kw_only=True, slots=True)
class TensorChunk:
    """A chunk on the device, and where its rows belong."""

    number: int
    input_ids: torch.Tensor  # (T,)
    lengths: torch.Tensor  # (C,)
    texts: torch.Tensor  # (C,) global text index; -1 in a dummy row
    instruction_tokens: torch.Tensor | None  # (C,) at the front of each row; None: no row has any
    packed: Any = None  # what the encoder's layers need beside hidden states (sweep only)


def to_tensors(number: int, chunk: Chunk, device: torch.device) -> TensorChunk:
    """Move one chunk to the device."""
    skipped = chunk.instruction_tokens
    return TensorChunk(
        number=number,
        input_ids=torch.from_numpy(chunk.input_ids).to(device, non_blocking=True),
        lengths=torch.from_numpy(chunk.lengths).to(device, non_blocking=True),
        texts=torch.from_numpy(chunk.texts).to(device, non_blocking=True),
        instruction_tokens=None
        if skipped is None
        else torch.from_numpy(skipped).to(device, non_blocking=True),
    )


def accumulate_gradients(
    engine: Engine,
    batch: GlobalBatch,
    config: TrainConfig,
    *,
    device: torch.device,
    temperature: float | None = None,
    agreement: Agreement | None = None,
) -> LossOutput:
    """Both passes and the loss; afterwards the engine holds the reduced gradients.

    Args:
        engine: embeds chunks and takes backwards.
        batch: this rank's part of the global batch; all ranks have the same number of chunks.
        config: schedule, loss and seed.
        device: where the chunks go.
        temperature: the present value of a learned temperature.
        agreement: whether the step is to be given up.

    Raises:
        NonFiniteLossError: on all ranks; no gradient was accumulated.
        ChunkOutOfMemoryError: on all ranks; no gradient was accumulated (not in a sweep).
        StepGivenUpError: on all ranks; no gradient was accumulated.
    """
    agreement = agreement or Agreement()
    agreement.begin_step()
    chunks = [to_tensors(number, chunk, device) for number, chunk in enumerate(batch.chunks)]

    def seed(number: int) -> None:
        seed_random(config.seed, batch.step, comm.rank(), number)

    run = _sweep if config.schedule == "sweep" else _cache
    try:
        return run(engine, chunks, batch, config, seed, temperature, agreement)
    except (ChunkOutOfMemoryError, StepGivenUpError):
        engine.discard()
        raise


def _sweep(
    engine: Engine,
    chunks: list[TensorChunk],
    batch: GlobalBatch,
    config: TrainConfig,
    seed: Callable[[int], None],
    temperature: float | None,
    agreement: Agreement,
) -> LossOutput:
    """Layer by layer."""
    sweep = make_sweep(engine, encoder_stages(engine.encoder), config, seed, agreement)
    # Few but for the table, which DeepSpeed would gather again for every chunk.
    with engine.hold(outside_of_layers(engine.encoder)):
        output, gradients = _loss(sweep.forward(chunks), chunks, batch, config, temperature)
        with engine.accumulation():
            sweep.backward(chunks, gradients, engine.backward)
    return output


def make_sweep(
    engine: Engine,
    stages: list[Callable[[Any, Any], torch.Tensor]],
    config: TrainConfig,
    seed: Callable[[int], None],
    agreement: Agreement,
) -> LayerSweep[Any]:
    """The two sweeps of a step over its chunks.

    Args:
        engine: gathers what a stage needs: its layer; `outside_of_layers` is held throughout.
        stages: embedding, each layer, and what follows them.
        config: where the inputs of the layers wait.
        seed: sets the random numbers of a chunk.
        agreement: asked before each stage.
    """
    owned = [[], *([*layer.parameters()] for layer in engine.encoder.layers), []]

    def hold(stage: int) -> AbstractContextManager[None]:
        agreement.point()
        return engine.hold(owned[stage])

    return LayerSweep(stages, hold=hold, seed=seed, on_host=config.chunks.boundaries == "host")


def _cache(
    engine: Engine,
    chunks: list[TensorChunk],
    batch: GlobalBatch,
    config: TrainConfig,
    seed: Callable[[int], None],
    temperature: float | None,
    agreement: Agreement,
) -> LossOutput:
    """Chunk by chunk; `plain` is the case that all graphs are kept."""

    def embed(chunk: TensorChunk) -> torch.Tensor:
        agreement.point()
        seed(chunk.number)
        return engine.embed(chunk.input_ids, chunk.lengths, chunk.instruction_tokens)

    def backward(surrogate: torch.Tensor) -> None:
        agreement.point()
        engine.backward(surrogate)

    keep = len(chunks) if config.schedule == "plain" else config.chunks.keep_graphs
    assert isinstance(keep, int), "auto is resolved before training"
    # One gather serves both passes of all chunks; where that does not fit, `sweep` does.
    with engine.hold(list(engine.encoder.parameters())):
        with agreement.out_of_memory_on_all_ranks():
            cached = grad_cache.embed_chunks(chunks, embed, keep_graphs=keep)
        output, gradients = _loss(cached.embeddings, chunks, batch, config, temperature)
        with engine.accumulation(), agreement.out_of_memory_on_all_ranks():
            grad_cache.replay_chunks(chunks, cached, gradients, embed, backward)
    return output


def encoder_stages(encoder: Any) -> list[Callable[[TensorChunk, Any], torch.Tensor]]:
    """An encoder cut into the stages of a sweep: embedding, each layer, pooling."""

    def embed(chunk: TensorChunk, _: None) -> torch.Tensor:
        hidden, chunk.packed = encoder.embed(
            chunk.input_ids, chunk.lengths, chunk.instruction_tokens
        )
        return hidden  # type: ignore[no-any-return]

    def layer(index: int) -> Callable[[TensorChunk, torch.Tensor], torch.Tensor]:
        return lambda chunk, hidden: encoder.run_layer(index, hidden, chunk.packed)

    def finish(chunk: TensorChunk, hidden: torch.Tensor) -> torch.Tensor:
        return encoder.finish(hidden, chunk.packed)  # type: ignore[no-any-return]

    return [embed, *(layer(index) for index in range(len(encoder.layers))), finish]


def outside_of_layers(encoder: Any) -> list[torch.nn.Parameter]:
    """Token embedding, final norm, and a head if there is one."""
    inside = {id(parameter) for parameter in encoder.layers.parameters()}
    return [parameter for parameter in encoder.parameters() if id(parameter) not in inside]


def _loss(
    embeddings: list[torch.Tensor] | tuple[torch.Tensor, ...],
    chunks: list[TensorChunk],
    batch: GlobalBatch,
    config: TrainConfig,
    temperature: float | None,
) -> tuple[LossOutput, tuple[torch.Tensor, ...]]:
    """The global loss, and the gradient that each chunk's embeddings begin their backward with."""
    rows = torch.cat(list(embeddings))  # (R, E) rows of this rank, dummies included
    texts = torch.cat([chunk.texts for chunk in chunks])  # (R,)
    is_query = (texts >= 0) & (texts < batch.num_queries)
    is_document = texts >= batch.num_queries
    targets = _targets(batch, texts[is_query], texts[is_document] - batch.num_queries)
    output = contrastive_loss(
        rows[is_query], rows[is_document], targets, config=config.loss, temperature=temperature
    )
    if not math.isfinite(output.loss.item()):
        broken = ~torch.isfinite(rows).all(dim=1)
        raise NonFiniteLossError(output.loss.item(), texts[broken].tolist())
    gradients = torch.zeros_like(rows)  # stays zero in dummy rows
    # The engine averages over ranks, each of which holds only its own rows' share of the sum.
    gradients[is_query] = output.query_grad * comm.world_size()
    gradients[is_document] = output.document_grad * comm.world_size()
    return output, torch.split(gradients, [len(chunk.texts) for chunk in chunks])


def _targets(batch: GlobalBatch, queries: torch.Tensor, documents: torch.Tensor) -> Targets:
    return Targets(
        num_queries=batch.num_queries,
        num_documents=batch.num_documents,
        query_index=queries,
        document_index=documents,
        positives=_ragged(batch.positives, queries.device),
        negatives=_ragged(batch.negatives, queries.device),
        masked=_ragged(batch.masked, queries.device),
        teacher_positives=_scores(batch.positive_scores, queries.device),
        teacher_negatives=_scores(batch.negative_scores, queries.device),
    )


def _ragged(ragged: Ragged, device: torch.device) -> RaggedIndex:
    return RaggedIndex(
        offsets=torch.from_numpy(ragged.offsets).to(device),
        values=torch.from_numpy(ragged.values).to(device),
    )


def _scores(ragged: Ragged | None, device: torch.device) -> torch.Tensor | None:
    return None if ragged is None else torch.from_numpy(ragged.values).to(device)


def seed_random(*numbers: int) -> None:
    """Make the random numbers that follow a function of, say, (seed, step, rank, chunk).

    A resumed run then draws the dropout masks of the uninterrupted one without any saved state,
    and every schedule draws the same.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) % 2**63)
