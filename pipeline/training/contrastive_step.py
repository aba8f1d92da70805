"""One optimizer step of contrastive training.

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
from typing import Any

import numpy as np
import torch

from pipeline import comm
from pipeline.config import LossConfig, OptimizerConfig, TrainConfig
from pipeline.data.batch import GlobalBatch, Ragged
from pipeline.data.order import num_negatives
from pipeline.loss import grad_cache
from pipeline.loss.contrastive import contrastive_loss
from pipeline.loss.targets import LossOutput, RaggedIndex, Targets
from pipeline.training.engine import (
    Agreement,
    ChunkOutOfMemoryError,
    Engine,
    NonFiniteLossError,
    StepGivenUpError,
    TensorChunk,
    seed_of_chunks,
    to_tensors,
)
from pipeline.training.layer_sweep import encoder_stages, make_sweep, outside_of_layers


class Temperature:
    """A scalar that every rank updates alike: its gradient is that of the global loss.

    Learned as its logarithm (Radford et al., arXiv 2103.00020, section 2.5), without weight decay.

    Args:
        config: where it starts, and whether it is learned.
        optimizer: AdamW's hyper-parameters.
    """

    def __init__(self, config: LossConfig, optimizer: OptimizerConfig) -> None:
        self._learned = config.learn_temperature
        self._fixed = config.temperature
        log = torch.tensor(math.log(config.temperature), dtype=torch.float64)
        self._log = torch.nn.Parameter(log)
        self._adam = torch.optim.Adam([self._log], betas=optimizer.betas, eps=optimizer.eps)

    @property
    def value(self) -> float:
        """The temperature of the next step."""
        return math.exp(self._log.item()) if self._learned else self._fixed

    def step(self, gradient: float | None, lr: float) -> None:
        """Take d(loss) / d(temperature); does nothing when the temperature is fixed."""
        if not self._learned:
            return
        assert gradient is not None, "the loss was not asked for the gradient"
        self._log.grad = torch.tensor(gradient * self.value, dtype=torch.float64)
        self._adam.param_groups[0]["lr"] = lr
        self._adam.step()

    def state_dict(self) -> dict[str, float]:
        """Plain numbers that `load_state_dict` takes back without loss."""
        if not self._learned:
            return {}
        moments = self._adam.state.get(self._log, {})
        return {"log": self._log.item(), **{k: float(v) for k, v in moments.items()}}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict`."""
        if not self._learned or not state:
            return
        with torch.no_grad():
            self._log.fill_(state["log"])
        if "step" in state:
            self._adam.state[self._log] = {
                "step": torch.tensor(state["step"]),
                "exp_avg": torch.tensor(state["exp_avg"], dtype=torch.float64),
                "exp_avg_sq": torch.tensor(state["exp_avg_sq"], dtype=torch.float64),
            }


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
    step = _Step(
        engine=engine,
        batch=batch,
        chunks=[to_tensors(number, chunk, device) for number, chunk in enumerate(batch.chunks)],
        config=config,
        temperature=temperature,
        agreement=agreement,
    )
    try:
        return step.layer_by_layer() if config.schedule == "sweep" else step.chunk_by_chunk()
    except (ChunkOutOfMemoryError, StepGivenUpError):
        engine.discard()
        raise


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """One global batch on its way through the engine; see `accumulate_gradients`."""

    engine: Engine
    batch: GlobalBatch
    chunks: list[TensorChunk]
    config: TrainConfig
    temperature: float | None
    agreement: Agreement

    def layer_by_layer(self) -> LossOutput:
        """Schedule `sweep`."""
        engine, chunks = self.engine, self.chunks
        stages = encoder_stages(engine.encoder)
        sweep = make_sweep(engine, stages, self.config, self._seed, self.agreement)
        # Few but for the table, which DeepSpeed would gather again for every chunk.
        with engine.hold(outside_of_layers(engine.encoder)):
            output, gradients = self._loss(sweep.forward(chunks))
            with engine.accumulation():
                sweep.backward(chunks, gradients, engine.backward)
        return output

    def chunk_by_chunk(self) -> LossOutput:
        """Schedule `cache`, and `plain`, which is the case that all graphs are kept."""
        engine, chunks, agreement = self.engine, self.chunks, self.agreement
        keep = len(chunks) if self.config.schedule == "plain" else self.config.chunks.keep_graphs
        assert isinstance(keep, int), "auto is resolved before training"
        # One gather serves both passes of all chunks; where that does not fit, `sweep` does.
        with engine.hold(list(engine.encoder.parameters())):
            with agreement.out_of_memory_on_all_ranks():
                cached = grad_cache.embed_chunks(chunks, self._embed, keep_graphs=keep)
            output, gradients = self._loss(cached.embeddings)
            with engine.accumulation(), agreement.out_of_memory_on_all_ranks():
                grad_cache.replay_chunks(chunks, cached, gradients, self._embed, self._backward)
        return output

    @property
    def _seed(self) -> Callable[[int], None]:
        return seed_of_chunks(self.config.seed, self.batch.step)

    def _embed(self, chunk: TensorChunk) -> torch.Tensor:
        self.agreement.point()
        self._seed(chunk.number)
        return self.engine.embed(chunk.input_ids, chunk.lengths, chunk.instruction_tokens)

    def _backward(self, surrogate: torch.Tensor) -> None:
        self.agreement.point()
        self.engine.backward(surrogate)

    def _loss(
        self, embeddings: list[torch.Tensor] | tuple[torch.Tensor, ...]
    ) -> tuple[LossOutput, tuple[torch.Tensor, ...]]:
        """The global loss, and the gradient that each chunk's vectors begin their backward with."""
        batch = self.batch
        rows = torch.cat(list(embeddings))  # (R, E) rows of this rank, dummies included
        # On the host: to select rows by a mask on a GPU is to wait for it to count them.
        texts = np.concatenate([chunk.texts for chunk in batch.chunks])  # (R,)
        is_document = texts >= batch.num_queries
        queries, documents = (
            torch.from_numpy(np.flatnonzero(chosen)).to(rows.device, non_blocking=True)
            for chosen in ((texts >= 0) & ~is_document, is_document)
        )
        texts_R = torch.from_numpy(texts).to(rows.device, non_blocking=True)
        output = contrastive_loss(
            rows[queries],
            rows[documents],
            _targets(batch, texts_R[queries], texts_R[documents] - batch.num_queries),
            config=self.config.loss,
            temperature=self.temperature,
        )
        if not math.isfinite(output.loss.item()):
            broken = ~torch.isfinite(rows).all(dim=1)
            raise NonFiniteLossError(output.loss.item(), texts_R[broken].tolist())
        gradients = torch.zeros_like(rows)  # stays zero in dummy rows
        # The engine averages over ranks, each of which holds only its own rows' share of the sum.
        gradients[queries] = output.query_grad * comm.world_size()
        gradients[documents] = output.document_grad * comm.world_size()
        return output, torch.split(gradients, [len(chunk.texts) for chunk in batch.chunks])


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


class Contrastive:
    """InfoNCE over the global batch, with a temperature that may be learned."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._temperature = Temperature(config.loss, config.optimizer)
        self._gradient: float | None = None

    def accumulate(
        self, engine: Engine, batch: GlobalBatch, agreement: Agreement | None = None
    ) -> dict[str, float]:
        """See `Objective`."""
        value = self._temperature.value
        output = accumulate_gradients(
            engine,
            batch,
            self._config,
            device=comm.device(),
            temperature=value if self._config.loss.learn_temperature else None,
            agreement=agreement,
        )
        self._gradient = output.temperature_grad
        negatives = num_negatives(
            positives=batch.positives,
            negatives=batch.negatives,
            masked=batch.masked,
            num_documents=batch.num_documents,
            own=self._config.loss.negatives == "own",
        )
        return {
            "loss": float(output.loss),
            **output.metrics,
            "temperature": value,
            "queries_without_negatives": int((negatives == 0).sum()),
        }

    def update(self, lr: float) -> None:
        """Update the temperature."""
        self._temperature.step(self._gradient, lr)

    def state_dict(self) -> dict[str, Any]:
        """The temperature's state."""
        return {"temperature": self._temperature.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with a temperature."""
        self._temperature.load_state_dict(state["temperature"])
