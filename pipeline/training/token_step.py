"""One optimizer step of token prediction: the exact gradient of the mean over the global batch.

    hide      tokens of every chunk, a function of seed, step and text   (data.text_loader.predict)
    agree     on the denominator of the mean, summed over ranks
    chunk     tokens (T,) -> hidden states (P, D) of the predictions
    head      in tiles: (R, D) -> scores (R, V) -> loss, backward to (R, D)
    backward  of sum(hidden * gradient), through the layers
    update    one reduction, one clip, one AdamW step

Shapes: T tokens and P predictions of a chunk, R of them in a tile, D width, V vocabulary. The
(P, V) scores never exist at once: each tile's graph is gone after its backward.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import comm
from pipeline.config import ObjectiveConfig, TrainConfig
from pipeline.data.batch import Chunk, GlobalBatch
from pipeline.data.shards import Dataset
from pipeline.data.text_loader import Prediction, Vocabulary, predict
from pipeline.loss.tiles import TOKEN_TILE_BYTES
from pipeline.model.encoder import LanguageModel, find_mask_token, predicts_shifted
from pipeline.tokenizer import load_model_tokenizer
from pipeline.training.checkpoints import Stateful
from pipeline.training.engine import (
    Agreement,
    ChunkOutOfMemoryError,
    Engine,
    NonFiniteLossError,
    StepGivenUpError,
    TensorChunk,
    on_device,
    seed_of_chunks,
)
from pipeline.training.schedules import (
    LayerSweep,
    encoder_stages,
    make_sweep,
    outside_of_layers,
    untied_head,
)

# Scores and their gradient in bfloat16, and in float32 the scores, their logarithm, and the
# gradient: 2 + 2 + 4 + 4 + 4.
_BYTES_PER_SCORE = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenSums:
    """Sums over the predictions of a chunk, and the gradient by the hidden states that made them.

    Attributes:
        loss: float64 sum of weight * cross-entropy.
        correct: how many predictions of positive weight gave the highest score to their label.
        gradient: (P, D) gradient of `loss` by the hidden states.
    """

    loss: Tensor
    correct: Tensor
    gradient: Tensor


def tile_rows(vocabulary: int, device: str) -> int:
    """Return the number of predictions whose scores fit into the memory of a tile."""
    return max(1, TOKEN_TILE_BYTES[device] // (_BYTES_PER_SCORE * vocabulary))


def cross_entropy_in_tiles(
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    scores: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], None],
    rows: int,
) -> TokenSums:
    """Score, compare and run backward through the head, tile by tile.

    Args:
        hidden: (P, D) hidden states; no gradient enters their graph.
        labels: (P,) tokens to predict.
        weights: (P,) factor on each prediction's cross-entropy.
        scores: (R, D) hidden states to (R, V) float32 scores.
        backward: takes a scalar and accumulates its gradients, the head's included.
        rows: predictions of a tile.
    """
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    # One tensor for all tiles: small tensors that outlive a tile would fragment the memory between
    # the tiles' large ones.
    gradient = torch.empty_like(hidden)
    tiles = [torch.split(x, rows) for x in (hidden.detach(), labels, weights, gradient)]
    for part, label, weight, out in zip(*tiles, strict=True):  # (R, D), (R,), (R,), (R, D)
        leaf = part.requires_grad_()
        with torch.enable_grad():
            score_RV = scores(leaf)
            losses = F.cross_entropy(score_RV, label, reduction="none")
            # A prediction that does not count is left out of the sum even where it is infinite.
            weighted = torch.where(weight > 0, losses * weight, 0.0)
            backward(weighted.sum())
        loss += weighted.detach().double().sum()
        correct += ((score_RV.argmax(dim=1) == label) & (weight > 0)).sum()
        assert leaf.grad is not None
        out.copy_(leaf.grad)
        leaf.grad = None
    return TokenSums(loss=loss, correct=correct, gradient=gradient)


class TokenPrediction:
    """MNTP, masked diffusion or next-token prediction; has no parameters except the model's.

    Raises:
        UserError: the objective hides tokens, but no mask token is known.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        assert config.objective is not None
        self._config, self._objective = config, config.objective
        self._shift = _is_shifted(config, config.objective)
        self._vocabulary = _vocabulary(config, config.objective, dataset)

    def accumulate(
        self, engine: Engine, batch: GlobalBatch, agreement: Agreement | None = None
    ) -> dict[str, float]:
        """See `Objective.accumulate`."""
        agreement = agreement or Agreement()
        agreement.begin_step()
        # A function of (seed, step, text): a resumed run hides the same tokens.
        predictions = [
            predict(
                chunk,
                self._objective,
                self._vocabulary,
                text_ids=batch.example_ids,
                shift=self._shift,
                seed=self._config.seed,
                step=batch.step,
            )
            for chunk in batch.chunks
        ]
        total, predicted = comm.sum_over_ranks(
            sum(prediction.total for prediction in predictions),
            sum(float((prediction.weights > 0).sum()) for prediction in predictions),
        )
        # The engine averages over ranks, each of which holds only its own share of the sum. No
        # token at all may be hidden: the loss is then 0, not a nan.
        scale = comm.world_size() / max(total, 1.0)
        try:
            loss, correct = self._run(engine, batch, predictions, scale, agreement)
        except (ChunkOutOfMemoryError, NonFiniteLossError, StepGivenUpError):
            engine.discard()
            raise
        return {
            "loss": loss,
            "accuracy": correct / max(predicted, 1.0),
            "predicted": predicted,
        }

    def update(self, lr: float) -> None:
        """Do nothing: only the model learns."""

    def join_state(self, engine: Stateful) -> Stateful:
        """Return the engine: the objective has no tensors."""
        return engine

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the choice of hidden tokens is a function of seed and step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""

    def _run(
        self,
        engine: Engine,
        batch: GlobalBatch,
        predictions: list[Prediction],
        scale: float,
        agreement: Agreement,
    ) -> tuple[float, float]:
        """Run all chunks; return the global loss and the number of correct predictions."""
        chunks = [
            _to_tensors(number, chunk, predictions[number], scale)
            for number, chunk in enumerate(batch.chunks)
        ]
        seed = seed_of_chunks(self._config.seed, batch.step)
        if self._config.schedule == "sweep":
            # Pooling is replaced: the states of the predictions take the place of embeddings.
            stages = [*encoder_stages(engine.encoder)[:-1], _predicting_states(engine.encoder)]
            sweep = make_sweep(engine, stages, self._config, seed, agreement)
            return _sweep(engine, chunks, sweep, agreement)
        return _chunk_by_chunk(engine, chunks, seed, agreement)


@dataclasses.dataclass(kw_only=True, slots=True)
class _TokenChunk(TensorChunk):
    """A chunk on the device, and its predictions."""

    states: torch.Tensor  # (P,) positions of the hidden states that predict
    labels: torch.Tensor  # (P,)
    weights: torch.Tensor  # (P,) float32


def _to_tensors(number: int, chunk: Chunk, prediction: Prediction, scale: float) -> _TokenChunk:
    device = comm.device()
    return _TokenChunk(
        number=number,
        input_ids=on_device(prediction.input_ids, device),
        lengths=torch.from_numpy(chunk.lengths),
        instruction_tokens=None,
        states=on_device(prediction.states, device),
        labels=on_device(prediction.labels, device),
        weights=on_device(prediction.weights * scale, device).float(),
    )


def _chunk_by_chunk(
    engine: Engine, chunks: list[_TokenChunk], seed: Callable[[int], None], agreement: Agreement
) -> tuple[float, float]:
    """Run chunk after chunk: each graph is gone before the next forward, so nothing is cached."""
    model: LanguageModel = engine.encoder

    def run_chunks() -> list[tuple[torch.Tensor, torch.Tensor]]:
        sums = []
        for chunk in chunks:
            agreement.check()
            seed(chunk.number)
            with torch.enable_grad():
                hidden = model.hidden_states(chunk.input_ids, chunk.lengths)[chunk.states]
            found = _through_the_head(engine, hidden, chunk)
            # Continues below the head: the gradient of this scalar by `hidden` is the loss's.
            engine.backward((hidden * found.gradient).sum())
            sums.append((found.loss, found.correct))
        return sums

    with engine.hold(list(model.parameters())), engine.accumulation():
        # Agreed before the reduction, so that a batch that is left out leaves nothing behind.
        return _agreed(agreement.on_all_ranks(run_chunks))


def _sweep(
    engine: Engine,
    chunks: list[_TokenChunk],
    sweep: LayerSweep[_TokenChunk],
    agreement: Agreement,
) -> tuple[float, float]:
    """Run layer by layer; the hidden states that predict replace the embeddings."""
    with engine.hold(outside_of_layers(engine.encoder)):
        states = sweep.forward(chunks)
        with engine.accumulation():
            found = agreement.on_all_ranks(
                lambda: [
                    _through_the_head(engine, hidden, chunk)
                    for hidden, chunk in zip(states, chunks, strict=True)
                ]
            )
            numbers = _agreed([(sums.loss, sums.correct) for sums in found])
            # Complete already, unless it is the token table, whose gradient the embedding adds to.
            engine.reduce(untied_head(engine.encoder))
            sweep.backward(chunks, [sums.gradient for sums in found], engine.backward)
    return numbers


def _predicting_states(model: LanguageModel) -> Callable[[_TokenChunk, torch.Tensor], torch.Tensor]:
    """Return the last stage of a sweep: final norm, and only the states that predict."""
    return lambda chunk, hidden: model.family.finish(model.model, hidden)[0, chunk.states]


def _through_the_head(engine: Engine, hidden: torch.Tensor, chunk: _TokenChunk) -> TokenSums:
    model: LanguageModel = engine.encoder
    return cross_entropy_in_tiles(
        hidden,
        chunk.labels,
        chunk.weights,
        scores=model.logits,
        backward=engine.backward,
        rows=tile_rows(model.lm_head.out_features, hidden.device.type),
    )


def _agreed(sums: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """Sum loss and correct predictions over all chunks of all ranks.

    Raises:
        NonFiniteLossError: on all ranks.
    """
    totals = [torch.stack(numbers).sum().double() for numbers in zip(*sums, strict=True)]
    losses, correct = torch.stack(totals).tolist()  # read together: each reading waits for a GPU
    # Without the factor world size, which the weights carry (see `accumulate`).
    mean, right = comm.sum_over_ranks(losses / comm.world_size(), correct)
    if not math.isfinite(mean):
        raise NonFiniteLossError(mean, [])
    return mean, right


def _is_shifted(config: TrainConfig, objective: ObjectiveConfig) -> bool:
    diffusion = objective.masked_diffusion
    if diffusion is None:
        return True
    return predicts_shifted(config.model) if diffusion.shift is None else diffusion.shift


def _vocabulary(config: TrainConfig, objective: ObjectiveConfig, dataset: Dataset) -> Vocabulary:
    size = dataset.tokenizer.vocab_size
    masked = objective.mntp or objective.masked_diffusion
    if masked is None:
        return Vocabulary(size=size, mask=-1)  # next-token prediction hides nothing
    tokenizer = load_model_tokenizer(config.model.path)
    return Vocabulary(
        size=size,
        mask=find_mask_token(config.model, tokenizer, masked.mask_token),
        special=frozenset(tokenizer.all_special_ids),
    )
