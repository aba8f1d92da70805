"""One optimizer step of contrastive training.

    this rank's chunks                c_1      ...      c_n      texts of the global batch, packed
    pass 1     embed, no graph      (C_1, E)          (C_n, E)   schedules
    rows       concatenate              (R, E)                   in the order of the chunks
    select     queries (B, E), documents (K, E)                  dummy rows belong to neither
    teacher    its vectors of the same texts, where the loss reads them
    loss       contrastive_loss  <---- all ranks ---->           gradients (B, E), (K, E)
    scatter    gradients of all rows    (R, E)                   zero in dummy rows
    split                           (C_1, E)          (C_n, E)
    pass 2     embed again, with graph and the same dropout; backward of sum(embedding * gradient)
    update     one reduction over ranks, one clip, one AdamW step; then the temperature

The result equals the gradient of one batch without chunks: the loss sees every text of every rank
at once, and a chunk's backward only needs the loss's gradient by its own embeddings.

After Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(arXiv 2101.06983), algorithm 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import comm
from pipeline.config import LossConfig, OptimizerConfig, TrainConfig
from pipeline.data.batch import GlobalBatch, Ragged, num_negatives
from pipeline.loss.contrastive import contrastive_loss
from pipeline.loss.targets import LossOutput, RaggedIndex, Targets
from pipeline.training.checkpoints import MOMENTS, PROJECTION, Stateful, equal_share
from pipeline.training.engine import (
    Agreement,
    ChunkOutOfMemoryError,
    Engine,
    NonFiniteLossError,
    StepGivenUpError,
    TensorChunk,
    on_device,
    seed_of_chunks,
    to_tensors,
)
from pipeline.training.schedules import (
    embed_chunks,
    encoder_stages,
    make_sweep,
    outside_of_layers,
    replay_chunks,
)


class Temperature:
    """A scalar that every rank updates in the same way: its gradient is the global loss's.

    Learned as its logarithm (Radford et al., arXiv 2103.00020, section 2.5), without weight decay.
    ZeRO never sees it: one number needs no sharding, and all ranks compute the same update.

    Args:
        config: the initial value, and whether it is learned.
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
        """Apply d(loss) / d(temperature); does nothing when the temperature is fixed."""
        if not self._learned:
            return
        assert gradient is not None, "the loss was not asked for the gradient"
        # d(loss) / d(log t) = d(loss) / dt * t
        self._log.grad = torch.tensor(gradient * self.value, dtype=torch.float64)
        self._adam.param_groups[0]["lr"] = lr
        self._adam.step()

    def state_dict(self) -> dict[str, float]:
        """Return plain numbers from which `load_state_dict` restores everything."""
        if not self._learned:
            return {}
        # Empty before the first update.
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


class Contrastive:
    """InfoNCE over the global batch, with its learned numbers, if any (an `Objective`)."""

    def __init__(self, config: TrainConfig, *, teacher_width: int | None = None) -> None:
        """Prepare the temperature.

        Args:
            config: the run.
            teacher_width: of the teacher's vectors in the data; None if there are none.
        """
        self._config, self._teacher_width = config, teacher_width
        self._temperature = Temperature(config.loss, config.optimizer)
        self._temperature_grad: float | None = None
        # Made once the model's width is known.
        self._projection: Projection | None = None
        self._projection_grad: torch.Tensor | None = None

    def accumulate(
        self, engine: Engine, batch: GlobalBatch, agreement: Agreement | None = None
    ) -> dict[str, float]:
        """Leave the reduced gradients of a batch in the engine; return the step's numbers."""
        value = self._temperature.value
        output = accumulate_gradients(
            engine,
            batch,
            self._config,
            device=comm.device(),
            temperature=value if self._config.loss.learn_temperature else None,
            projection=None if self._projection is None else self._projection.weight,
            agreement=agreement,
        )
        self._temperature_grad = output.temperature_grad
        self._projection_grad = output.projection_grad
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
        """Update temperature and projection."""
        self._temperature.step(self._temperature_grad, lr)
        if self._projection is not None and self._projection_grad is not None:
            self._projection.step(self._projection_grad, lr)
            self._projection_grad = None

    def join_state(self, engine: Any) -> Stateful:
        """Return the engine as checkpoints see it: with the projection, which is made here."""
        # Data without vectors are refused later, by `LossConfig.require_fit`.
        if self._config.loss.projection is not None and self._teacher_width is not None:
            self._projection = Projection(
                self._config,
                width=engine.encoder.num_dimensions,
                teacher_width=self._teacher_width,
                device=comm.device(),
            )
            return WithProjection(engine, self._projection)
        return engine  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        """Return the temperature's state."""
        return {"temperature": self._temperature.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with a temperature."""
        self._temperature.load_state_dict(state["temperature"])


def accumulate_gradients(
    engine: Engine,
    batch: GlobalBatch,
    config: TrainConfig,
    *,
    device: torch.device,
    temperature: float | None = None,
    projection: torch.Tensor | None = None,
    agreement: Agreement | None = None,
) -> LossOutput:
    """Run both passes and the loss; afterwards the engine holds the reduced gradients.

    Args:
        engine: embeds chunks and takes backwards.
        batch: this rank's part of the global batch; all ranks have the same number of chunks.
        config: schedule, loss and seed.
        device: where the chunks go.
        temperature: the current value of a learned temperature.
        projection: the current matrix of `loss.projection`.
        agreement: decides whether the step is given up; by default it never is.

    Raises:
        NonFiniteLossError: on all ranks; no gradient was accumulated.
        ChunkOutOfMemoryError: on all ranks; no gradient was accumulated.
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
        projection=projection,
        agreement=agreement,
    )
    try:
        return step.layer_by_layer() if config.schedule == "sweep" else step.chunk_by_chunk()
    except (ChunkOutOfMemoryError, StepGivenUpError):
        engine.discard()
        raise


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """Arguments of `accumulate_gradients`, and the two ways through the passes."""

    engine: Engine
    batch: GlobalBatch
    chunks: list[TensorChunk]
    config: TrainConfig
    temperature: float | None
    projection: torch.Tensor | None
    agreement: Agreement

    def chunk_by_chunk(self) -> LossOutput:
        """Schedule `cache`, and `plain`, which is the case that all graphs are kept."""
        engine, chunks, agreement = self.engine, self.chunks, self.agreement
        keep = len(chunks) if self.config.schedule == "plain" else self.config.chunks.keep_graphs
        assert isinstance(keep, int), "auto is resolved before training"
        # One gather serves both passes of all chunks; where that does not fit, `sweep` does.
        with engine.hold(list(engine.encoder.parameters())):
            cached = agreement.on_all_ranks(
                partial(embed_chunks, chunks, self._embed, keep_graphs=keep)
            )
            output, gradients = self._loss(cached.embeddings)
            with engine.accumulation():
                agreement.on_all_ranks(
                    partial(replay_chunks, chunks, cached, gradients, self._embed, self._backward)
                )
        return output

    def layer_by_layer(self) -> LossOutput:
        """Schedule `sweep`."""
        engine, chunks = self.engine, self.chunks
        stages = encoder_stages(engine.encoder)
        sweep = make_sweep(engine, stages, self.config, self._seed, self.agreement)
        # The token table is most of it, which DeepSpeed would gather again for every chunk.
        with engine.hold(outside_of_layers(engine.encoder)):
            output, gradients = self._loss(sweep.forward(chunks))
            with engine.accumulation():
                sweep.backward(chunks, gradients, engine.backward)
        return output

    def _embed(self, chunk: TensorChunk) -> torch.Tensor:
        self.agreement.check()
        self._seed(chunk.number)
        return self.engine.embed(chunk.input_ids, chunk.lengths, chunk.instruction_tokens)

    def _backward(self, surrogate: torch.Tensor) -> None:
        self.agreement.check()
        self.engine.backward(surrogate)

    @property
    def _seed(self) -> Callable[[int], None]:
        return seed_of_chunks(self.config.seed, self.batch.step)

    def _loss(
        self, embeddings: Sequence[torch.Tensor]
    ) -> tuple[LossOutput, tuple[torch.Tensor, ...]]:
        """Compute the global loss and its gradient by each chunk's embeddings."""
        batch = self.batch
        rows = torch.cat(list(embeddings))  # n x (C, E) -> (R, E), dummy rows included
        # On the host: selecting rows by a mask on a GPU would wait for it to count them.
        texts = np.concatenate([chunk.texts for chunk in batch.chunks])  # (R,)
        # A text's number: first queries, then documents; -1 for a dummy row.
        is_document = texts >= batch.num_queries
        sides = [np.flatnonzero(chosen) for chosen in ((texts >= 0) & ~is_document, is_document)]
        queries, documents = (on_device(side, rows.device) for side in sides)
        texts_R = on_device(texts, rows.device)
        output = contrastive_loss(
            rows[queries],  # (R, E) -> (B, E)
            rows[documents],  # (R, E) -> (K, E)
            _targets(
                batch,
                texts_R[queries],
                texts_R[documents] - batch.num_queries,
                _teacher_rows(batch, sides, rows.device),
            ),
            config=self.config.loss,
            temperature=self.temperature,
            projection=self.projection,
        )
        if not math.isfinite(output.loss.item()):
            broken = ~torch.isfinite(rows).all(dim=1)
            raise NonFiniteLossError(output.loss.item(), texts_R[broken].tolist())
        gradients = torch.zeros_like(rows)  # stays zero in dummy rows
        # The engine averages over ranks, each of which holds only its own rows' share of the sum.
        gradients[queries] = output.query_grad * comm.world_size()
        gradients[documents] = output.document_grad * comm.world_size()
        # (R, E) -> n x (C, E)
        return output, torch.split(gradients, [len(chunk.texts) for chunk in batch.chunks])


def _teacher_rows(
    batch: GlobalBatch, sides: Sequence[NDArray[np.int64]], device: torch.device
) -> list[torch.Tensor | None]:
    """Move a teacher's vectors of this rank's queries and documents to the device.

    Args:
        batch: its chunks hold them row by row, dummies included.
        sides: rows of the queries, and of the documents.
        device: where they go.
    """
    rows = [chunk.teacher for chunk in batch.chunks if chunk.teacher is not None]
    if not rows:
        return [None, None]
    teacher_RW = np.concatenate(rows)
    return [on_device(teacher_RW[side], device) for side in sides]


def _targets(
    batch: GlobalBatch,
    queries: torch.Tensor,
    documents: torch.Tensor,
    teacher: Sequence[torch.Tensor | None],
) -> Targets:
    """Move a batch's relevance to the device, with the global indices of this rank's rows."""
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
        teacher_query=teacher[0],
        teacher_document=teacher[1],
    )


def _ragged(ragged: Ragged, device: torch.device) -> RaggedIndex:
    return RaggedIndex(
        offsets=on_device(ragged.offsets, device), values=on_device(ragged.values, device)
    )


def _scores(ragged: Ragged | None, device: torch.device) -> torch.Tensor | None:
    return None if ragged is None else on_device(ragged.values, device)


# Any number that no other draw from the run's seed uses: those must not give the same values.
_PURPOSE = 0x9E3779B9


class Projection:
    """A trained (E, W) matrix from the model's vectors to a teacher's: `loss.projection`.

    Every rank keeps it whole and makes the same updates from the same gradients, so ZeRO never sees
    it, and it works with every stage, schedule and adapter, at 16 bytes per element on each rank.
    It is no part of the model: an export leaves it out, and so does the gradient norm of a step,
    which clipping reads. A checkpoint holds it next to the model's tensors (`WithProjection`).

    Args:
        config: `loss.projection`, AdamW's hyper-parameters, and the seed of the first values.
        width: E, of the model's vectors.
        teacher_width: W, of the teacher's.
        device: where it is kept.
    """

    def __init__(
        self, config: TrainConfig, *, width: int, teacher_width: int, device: torch.device
    ) -> None:
        assert config.loss.projection is not None
        optimizer = config.optimizer
        # By numpy, whose draws are the same on every kind of processor.
        drawn = np.random.default_rng([config.seed, _PURPOSE]).standard_normal(
            (width, teacher_width)
        )
        weight = torch.from_numpy((drawn / width**0.5).astype(np.float32))
        self.weight = torch.nn.Parameter(weight.to(device))
        # Its rate is this share of the model's.
        self._rate = config.loss.projection.lr / optimizer.lr
        self._adam = torch.optim.AdamW(
            [self.weight],
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )

    def step(self, gradient: torch.Tensor, lr: float) -> None:
        """Apply d(loss) / d(weight), given the model's learning rate."""
        self.weight.grad = gradient
        self._adam.param_groups[0]["lr"] = lr * self._rate
        self._adam.step()
        self.weight.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of weight and moments; the moments are zeros before the first update."""
        moments = self._adam.state.get(self.weight, {})
        weight = self.weight.detach()
        return {
            "weight": weight.clone(),
            **{
                key: moments[key].clone() if key in moments else torch.zeros_like(weight)
                for key in MOMENTS
            },
        }

    def restore(self, state: dict[str, torch.Tensor], optimizer_steps: int) -> None:
        """Continue with weight and moments, as after `optimizer_steps` updates."""
        with torch.no_grad():
            self.weight.copy_(state["weight"])
        moments = {key: state[key] for key in MOMENTS}
        # In host memory, where an AdamW that is not fused keeps its count.
        self._adam.state[self.weight] = {"step": torch.tensor(float(optimizer_steps)), **moments}


class WithProjection:
    """An engine's state and a projection's, as one (`checkpoints.Stateful`)."""

    def __init__(self, engine: Stateful, projection: Projection) -> None:
        self._engine, self._projection = engine, projection
        self._steps = 0
        self._restored: dict[str, torch.Tensor] = {}

    @property
    def parameter_names(self) -> list[str]:
        """The engine's, and the projection's at the end."""
        return [*self._engine.parameter_names, PROJECTION]

    @property
    def optimizer_steps(self) -> int:
        """The engine's: both are updated in the same steps."""
        return self._engine.optimizer_steps

    def share_state(self, name: str) -> dict[str, torch.Tensor]:
        """Return this rank's flat elements of a parameter's state, by key, on its device."""
        if name != PROJECTION:
            return self._engine.share_state(name)
        share = self.share_of(name)
        return {
            key: value.flatten()[share.start : share.stop]
            for key, value in self._projection.state().items()
        }

    def prepare_restore(self, optimizer_steps: int) -> None:
        """Allocate state to restore into."""
        self._steps = optimizer_steps
        self._restored = {
            key: torch.zeros_like(value) for key, value in self._projection.state().items()
        }
        self._engine.prepare_restore(optimizer_steps)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole parameter."""
        if name == PROJECTION:
            return tuple(self._projection.weight.shape)
        return self._engine.shape_of(name)

    def share_of(self, name: str) -> range:
        """Return the flat elements that this rank saves; of the projection an equal share."""
        if name != PROJECTION:
            return self._engine.share_of(name)
        size = self._projection.weight.numel()
        return equal_share(size, rank=comm.rank(), share=-(-size // comm.world_size()))

    def restore_state(self, name: str, share: dict[str, torch.Tensor]) -> None:
        """Restore this rank's elements of a parameter's state."""
        if name != PROJECTION:
            self._engine.restore_state(name, share)
            return
        here = self.share_of(name)
        for key, values in share.items():
            self._restored[key].view(-1)[here.start : here.stop] = values

    def finish_restore(self) -> None:
        """Use the restored state from now on; a collective call."""
        # Zeros outside of a rank's share: their sum is the whole.
        whole = {key: comm.all_reduce_(value) for key, value in self._restored.items()}
        self._projection.restore(whole, self._steps)
        self._restored = {}
        self._engine.finish_restore()
