"""An encoder cut into stages, so that a step can go layer by layer over all of its chunks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from pipeline.config import TrainConfig
from pipeline.training.agreement import Agreement
from pipeline.training.engine import Engine, TensorChunk
from pipeline.training.layer_sweep import LayerSweep


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
