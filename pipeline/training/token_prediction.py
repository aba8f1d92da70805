"""One optimizer step of token prediction: the exact gradient of the mean over the global batch.

hide     tokens of every chunk, a function of seed, step and text   (data.masking)
agree    the denominator of the mean, summed over ranks
chunk    tokens -> hidden states -> scores of the vocabulary in tiles -> backward, one by one
update   one reduction, one clip, one AdamW step
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pipeline import comm
from pipeline.config import ObjectiveConfig, TrainConfig
from pipeline.data.batch import GlobalBatch
from pipeline.data.masking import Prediction, Vocabulary, predict
from pipeline.data.shards import Dataset
from pipeline.loss.tokens import TokenSums, cross_entropy_in_tiles, tile_rows
from pipeline.model.language import LanguageModel, find_mask_token, predicts_shifted
from pipeline.tokenizer import load_tokenizer
from pipeline.training.agreement import Agreement, ChunkOutOfMemoryError, StepGivenUpError
from pipeline.training.step import Engine, NonFiniteLossError, seed_random


class TokenPrediction:
    """MNTP, masked diffusion or next-token prediction; learns nothing beside the model.

    Raises:
        UserError: tokens are to be hidden, but nothing says by which one.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        assert config.objective is not None
        self._objective, self._seed = config.objective, config.seed
        self._shift = _is_shifted(config, config.objective)
        self._vocabulary = _vocabulary(config, config.objective, dataset)

    def accumulate(
        self, engine: Engine, batch: GlobalBatch, agreement: Agreement | None = None
    ) -> dict[str, float]:
        """Leave the reduced gradients of a batch in the engine; returns the step's numbers.

        Raises:
            NonFiniteLossError: on all ranks; no gradient was accumulated.
            ChunkOutOfMemoryError: on all ranks; no gradient was accumulated.
            StepGivenUpError: on all ranks; no gradient was accumulated.
        """
        agreement = agreement or Agreement()
        agreement.begin_step()
        predictions = [
            predict(
                chunk,
                self._objective,
                self._vocabulary,
                text_ids=batch.example_ids,
                shift=self._shift,
                seed=self._seed,
                step=batch.step,
            )
            for chunk in batch.chunks
        ]
        total, predicted = _sum_over_ranks(
            sum(prediction.total for prediction in predictions),
            sum(float((prediction.weights > 0).sum()) for prediction in predictions),
        )
        # The engine averages over ranks, each of which holds only its own share of the sum.
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
        """Nothing to update."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep: what is hidden is a function of seed and step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def _run(
        self,
        engine: Engine,
        batch: GlobalBatch,
        predictions: list[Prediction],
        scale: float,
        agreement: Agreement,
    ) -> tuple[float, float]:
        """All chunks forward and back; returns the global loss, and predictions that are right."""
        loss = torch.zeros((), dtype=torch.float64, device=comm.device())
        correct = torch.zeros_like(loss)
        with engine.hold(list(engine.encoder.parameters())), engine.accumulation():
            with agreement.out_of_memory_on_all_ranks():
                for number, prediction in enumerate(predictions):
                    agreement.point()
                    seed_random(self._seed, batch.step, comm.rank(), number)
                    sums = _backward(engine, prediction, batch.chunks[number].lengths, scale)
                    loss += sums.loss
                    correct += sums.correct
            # Before the reduction, so that a batch that is left out leaves nothing behind.
            mean, right = _sum_over_ranks(float(loss) / comm.world_size(), float(correct))
            if not math.isfinite(mean):
                raise NonFiniteLossError(mean, [])
        return mean, right


def _backward(engine: Engine, prediction: Prediction, lengths: Any, scale: float) -> TokenSums:
    """One chunk forward and back."""
    model: LanguageModel = engine.encoder
    device = comm.device()

    def tensor(array: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    with torch.enable_grad():
        states = model.hidden_states(tensor(prediction.input_ids), tensor(lengths))
        hidden = states[tensor(prediction.states)]
    sums = cross_entropy_in_tiles(
        hidden,
        tensor(prediction.labels),
        tensor(prediction.weights * scale).float(),
        scores=model.logits,
        backward=engine.backward,
        rows=tile_rows(model.lm_head.out_features, device.type),
    )
    engine.backward((hidden * sums.gradient).sum())
    return sums


def _sum_over_ranks(*values: float) -> list[float]:
    sums = torch.tensor(values, dtype=torch.float64, device=comm.device())
    found: list[float] = comm.all_reduce_(sums).tolist()
    return found


def _is_shifted(config: TrainConfig, objective: ObjectiveConfig) -> bool:
    diffusion = objective.masked_diffusion
    if diffusion is None:
        return True
    return predicts_shifted(config.model) if diffusion.shift is None else diffusion.shift


def _vocabulary(config: TrainConfig, objective: ObjectiveConfig, dataset: Dataset) -> Vocabulary:
    size = dataset.tokenizer.vocab_size
    masked = objective.mntp or objective.masked_diffusion
    if masked is None:
        return Vocabulary(size=size, mask=-1)
    tokenizer = load_tokenizer(config.model.path)
    return Vocabulary(
        size=size,
        mask=find_mask_token(config.model, tokenizer, masked.mask_token),
        special=frozenset(tokenizer.all_special_ids),
    )
