"""What a run optimises, behind one interface: batch in, gradients in the engine, numbers out."""

from __future__ import annotations

from typing import Any, Protocol

from pipeline import comm
from pipeline.config import TrainConfig
from pipeline.data.batch import GlobalBatch
from pipeline.data.relevance import num_negatives
from pipeline.data.shards import Dataset
from pipeline.training.agreement import Agreement
from pipeline.training.engine import Engine
from pipeline.training.step import accumulate_gradients
from pipeline.training.temperature import Temperature
from pipeline.training.token_prediction import TokenPrediction


class Objective(Protocol):
    """The part of a training step that depends on what is learned."""

    def accumulate(
        self, engine: Engine, batch: GlobalBatch, agreement: Agreement | None = None
    ) -> dict[str, float]:
        """Leave the reduced gradients of a batch in the engine; returns `loss` and its companions.

        Raises:
            NonFiniteLossError: on all ranks; no gradient was accumulated.
            ChunkOutOfMemoryError: on all ranks; no gradient was accumulated.
            StepGivenUpError: on all ranks; no gradient was accumulated.
        """

    def update(self, lr: float) -> None:
        """Update what the objective itself learns, after the engine's update."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers that `load_state_dict` takes back."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""


def make_objective(config: TrainConfig, dataset: Dataset) -> Objective:
    """The objective of a run.

    Raises:
        UserError: tokens are to be hidden, but nothing says by which one.
    """
    if config.objective is None:
        return Contrastive(config)
    return TokenPrediction(config, dataset)


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
