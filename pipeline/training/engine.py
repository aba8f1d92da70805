"""The interface of an engine, chunks on the device, gradient sums, and agreement between ranks.

autograd adds into `.grad` in the parameter's type. In bfloat16 a sum keeps 8 bits: after a hundred
chunks most of what a chunk adds is lost, and more chunks would mean another gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from pipeline import comm
from pipeline.data.batch import Chunk, GlobalBatch
from pipeline.errors import DiffembedError


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


# A step that takes longer may be given up on request; then ranks agree about this often within it.
_LONG_STEP_SECONDS = 10.0
_SPACING_SECONDS = 5.0


class ChunkOutOfMemoryError(DiffembedError):
    """A chunk did not fit on some rank; raised on all ranks alike, the gradients are discarded."""


class StepGivenUpError(DiffembedError):
    """A rank was asked to stop; raised on all ranks alike, the gradients are discarded."""


class Agreement:
    """Decides within a step, for all ranks alike, whether it goes on.

    Every agreement is the same collective call, so that a rank which leaves its chunks for lack of
    memory meets the others at whichever place they have come to.

    Args:
        wants_to_stop: this rank's own view.
    """

    def __init__(self, wants_to_stop: Callable[[], bool] = lambda: False) -> None:
        self._wants_to_stop = wants_to_stop
        self._points = 0
        # How many points lie between two agreements. None before a step's duration is known: the
        # first step after a start is always finished, so that restarts make progress.
        self._spacing: int | None = None

    def begin_step(self) -> None:
        """Count the points of a new step."""
        self._points = 0

    def end_step(self, seconds: float) -> None:
        """Choose how often to agree in the next step.

        Args:
            seconds: of this step, the same number on all ranks.
        """
        per_point = seconds / max(self._points, 1)
        long = seconds > _LONG_STEP_SECONDS
        self._spacing = max(1, round(_SPACING_SECONDS / per_point)) if long else None

    def point(self) -> None:
        """A place that all ranks come to equally often: between chunks, or layers of a sweep.

        Raises:
            ChunkOutOfMemoryError: a rank has left its chunks.
            StepGivenUpError: a rank was asked to stop.
        """
        self._points += 1
        if self._spacing is not None and self._points % self._spacing == 0:
            self._agree(failed=False, stop=self._wants_to_stop())

    @contextmanager
    def out_of_memory_on_all_ranks(self) -> Iterator[None]:
        """Turn one rank's lack of memory into the same error on all, at the end of the block.

        Works because the block holds no other collective: the parameters are gathered before it,
        and the gradients are reduced after it. A rank that fails waits here for the others.

        Raises:
            ChunkOutOfMemoryError: some rank ran out of memory.
        """
        failed = False
        try:
            yield
        except torch.OutOfMemoryError:
            failed = True
            torch.cuda.empty_cache()
        # Not the place to stop: what little is left of the step would be lost.
        self._agree(failed=failed, stop=False)

    def _agree(self, *, failed: bool, stop: bool) -> None:
        any_failed, any_stop = comm.max_over_ranks(failed, stop)
        if any_failed:
            raise ChunkOutOfMemoryError("a chunk does not fit into memory")
        if any_stop:
            raise StepGivenUpError("asked to stop within a step")


class GradientSums:
    """Takes every gradient that autograd leaves in a low-precision parameter, while it is open.

    Costs 4 bytes per element of those parameters between `open` and `hand_back`.

    Args:
        parameters: the trainable parameters; those in fp32 are left to autograd.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._sums: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._is_open = False
        for parameter in parameters:
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def open(self) -> None:
        """Begin; every gradient is taken from now on."""
        self._is_open = True

    def _take(self, parameter: torch.Tensor) -> None:
        if not self._is_open or parameter.grad is None:
            return
        assert isinstance(parameter, torch.nn.Parameter)
        if parameter in self._sums:
            self._sums[parameter].add_(parameter.grad)
        else:
            self._sums[parameter] = parameter.grad.float()
        parameter.grad = None

    def discard(self) -> None:
        """Forget the sums."""
        self._is_open = False
        self._sums.clear()

    def hand_back(self) -> None:
        """Put each sum, rounded once, where autograd would have left it."""
        self._is_open = False
        while self._sums:
            parameter, total = self._sums.popitem()
            # A parameter that ZeRO-3 has partitioned has no shape, and takes no gradient of its
            # real one but through `data`.
            parameter.grad = torch.empty_like(parameter)
            parameter.grad.data = total.to(parameter.dtype)


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
