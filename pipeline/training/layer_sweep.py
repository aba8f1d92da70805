"""The schedule `sweep`: every chunk passes a layer before the next layer is gathered.

    forward    for each stage: gather it; for each chunk: keep the input, run without graph; release
    loss       gradient per embedding
    backward   for each stage, last first: gather it; for each chunk: run again with graph from the
               kept input, backward, keep the input's gradient; release

ZeRO-3 therefore gathers every parameter twice per optimizer step, for any number of chunks, and
holds one stage at a time. The price is the inputs of all stages of all chunks (the boundary store),
which may lie in host memory. It needs as many FLOPs as gradient caching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch

from pipeline.config import TrainConfig
from pipeline.loss.grad_cache import RandomState
from pipeline.training.engine import Agreement, Engine, TensorChunk

ChunkT = TypeVar("ChunkT")
Stage = Callable[[ChunkT, "torch.Tensor | None"], torch.Tensor]


class BoundaryStore:
    """Inputs of stages by (stage, chunk), on their device or in host memory.

    Args:
        on_host: keep them in pinned host memory while they are not needed.
    """

    def __init__(self, *, on_host: bool) -> None:
        self._on_host = on_host
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        self._device = torch.device("cpu")

    def put(self, stage: int, chunk: int, hidden: torch.Tensor) -> None:
        """Keep the input of a stage for a chunk."""
        self._device = hidden.device
        if self._on_host and hidden.is_cuda:
            # Pinned, so that the copy runs while the next chunk is computed.
            pinned = torch.empty_like(hidden, device="cpu", pin_memory=True)
            hidden = pinned.copy_(hidden, non_blocking=True)
        self._kept[stage, chunk] = hidden

    def take(self, stage: int, chunk: int) -> torch.Tensor:
        """Return an input, once."""
        return self._kept.pop((stage, chunk)).to(self._device, non_blocking=True)


class LayerSweep(Generic[ChunkT]):
    """One optimizer step's two sweeps over the same chunks.

    Args:
        stages: each maps (chunk, hidden) to hidden; the first gets no hidden, the last returns the
            embeddings. Between stages hidden states are the only thing passed on.
        hold: context in which a stage's parameters are gathered, by the stage's number.
        seed: sets the random generators for a chunk, by its number, so that dropout masks do not
            depend on the schedule.
        on_host: keep boundaries in host memory.
    """

    def __init__(
        self,
        stages: Sequence[Stage[ChunkT]],
        *,
        hold: Callable[[int], AbstractContextManager[None]],
        seed: Callable[[int], None],
        on_host: bool = False,
    ) -> None:
        self._stages = stages
        self._hold = hold
        self._seed = seed
        self.store = BoundaryStore(on_host=on_host)
        self._states: dict[tuple[int, int], RandomState] = {}

    @torch.no_grad()
    def forward(self, chunks: Sequence[ChunkT]) -> list[torch.Tensor]:
        """Embed all chunks: a list of (C, E) without graph."""
        hiddens: list[torch.Tensor | None] = [None] * len(chunks)
        streams: list[RandomState] = []
        for number in range(len(chunks)):
            self._seed(number)
            streams.append(RandomState.capture())
        # Each chunk has its own stream of random numbers, continued from stage to stage, as it
        # would be if the chunk passed all stages at once.
        for index, stage in enumerate(self._stages):
            # Gathered once for all chunks: the point of this schedule.
            with self._hold(index):
                for number, chunk in enumerate(chunks):
                    hidden = hiddens[number]
                    if hidden is not None:
                        self.store.put(index, number, hidden)
                    self._states[index, number] = streams[number]
                    streams[number].restore()
                    hiddens[number] = stage(chunk, hidden)
                    streams[number] = RandomState.capture()
        return [hidden for hidden in hiddens if hidden is not None]

    def backward(
        self,
        chunks: Sequence[ChunkT],
        gradients: Sequence[torch.Tensor],
        backward: Callable[[torch.Tensor], None],
    ) -> None:
        """Accumulate parameter gradients.

        Args:
            chunks: as given to `forward`.
            gradients: (C, E) gradient by each chunk's embeddings.
            backward: takes a scalar and accumulates its gradients.
        """
        upper = list(gradients)  # by the output of the stage that comes next
        for index in reversed(range(len(self._stages))):
            with self._hold(index):
                for number, chunk in enumerate(chunks):
                    gradient = upper[number]
                    # By this stage's input, hence by the output of the stage below.
                    upper[number] = self._backward_one(index, number, chunk, gradient, backward)

    def _backward_one(
        self,
        index: int,
        number: int,
        chunk: ChunkT,
        gradient: torch.Tensor,
        backward: Callable[[torch.Tensor], None],
    ) -> torch.Tensor:
        """Run one stage of one chunk again; return the gradient by its input."""
        hidden = None
        if index > 0:
            hidden = self.store.take(index, number).detach().requires_grad_()
        # The dropout masks of the forward.
        self._states.pop((index, number)).restore()
        with torch.enable_grad():
            out = self._stages[index](chunk, hidden)
            # Not at the first stage of a frozen token table.
            if out.requires_grad:
                backward((out * gradient).sum())
        if hidden is None or hidden.grad is None:
            return gradient
        return hidden.grad


def make_sweep(
    engine: Engine,
    stages: list[Callable[[Any, Any], torch.Tensor]],
    config: TrainConfig,
    seed: Callable[[int], None],
    agreement: Agreement,
) -> LayerSweep[Any]:
    """Prepare the two sweeps of a step over its chunks.

    Args:
        engine: gathers each stage's layer; `outside_of_layers` is held throughout.
        stages: embedding, each layer, and the last one after them.
        config: keeps the inputs of the layers on the device or the host.
        seed: seeds torch for a chunk.
        agreement: checked before each stage.
    """
    # The first and the last stage use parameters that are held throughout.
    owned = [[], *([*layer.parameters()] for layer in engine.encoder.layers), []]

    def hold(stage: int) -> AbstractContextManager[None]:
        agreement.check()
        return engine.hold(owned[stage])

    return LayerSweep(stages, hold=hold, seed=seed, on_host=config.chunks.boundaries == "host")


def encoder_stages(encoder: Any) -> list[Callable[[TensorChunk, Any], torch.Tensor]]:
    """Cut an encoder into the stages of a sweep: embedding, each layer, pooling."""

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
    """Return the parameters of token embedding, final norm, and a head if there is one."""
    inside = {id(parameter) for parameter in encoder.layers.parameters()}
    return [parameter for parameter in encoder.parameters() if id(parameter) not in inside]
