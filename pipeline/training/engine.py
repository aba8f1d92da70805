"""What a step of any objective works with: the engine, chunks on the device, random numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from pipeline import comm
from pipeline.data.batch import Chunk
from pipeline.errors import DiffembedError


class NonFiniteLossError(DiffembedError):
    """The global loss is infinite or not a number; raised on all ranks alike, before the update.

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
    """A chunk on the device."""

    number: int
    input_ids: torch.Tensor  # (T,)
    lengths: torch.Tensor  # (C,) in host memory
    instruction_tokens: torch.Tensor | None  # (C,) at the front of each row; None: no row has any
    packed: Any = None  # what the encoder's layers need beside hidden states (sweep only)


def to_tensors(number: int, chunk: Chunk, device: torch.device) -> TensorChunk:
    """Move one chunk to the device."""
    skipped = chunk.instruction_tokens
    return TensorChunk(
        number=number,
        input_ids=torch.from_numpy(chunk.input_ids).to(device, non_blocking=True),
        lengths=torch.from_numpy(chunk.lengths),
        instruction_tokens=None
        if skipped is None
        else torch.from_numpy(skipped).to(device, non_blocking=True),
    )


def seed_random(*numbers: int) -> None:
    """Make the random numbers that follow a function of, say, (seed, step, rank, chunk).

    A resumed run then draws the dropout masks of the uninterrupted one without any saved state,
    and every schedule draws the same.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) % 2**63)


def seed_of_chunks(seed: int, step: int) -> Callable[[int], None]:
    """What sets the random numbers of a chunk of this rank, given its number."""
    return lambda number: seed_random(seed, step, comm.rank(), number)
