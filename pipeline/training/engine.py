"""Contracts of a step: objective, engine, optimizer, chunk, random seeds, agreement of ranks.

trainer --batch--> Objective.accumulate --chunks--> Engine.embed, Engine.backward
   |                      |                              |
 AdamW at its      Agreement.check                 seeded by (seed, step, rank, chunk)
 learning_rate
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import comm
from pipeline.config import OptimizerConfig
from pipeline.data.batch import Chunk, GlobalBatch
from pipeline.errors import DiffembedError, is_out_of_device_memory

if TYPE_CHECKING:
    from pipeline.training.checkpoints import Stateful


Found = TypeVar("Found")


class Objective(Protocol):
    """The part of a training step that depends on the task: a loss, and its state if any."""

    def accumulate(
        self, engine: Engine, batch: GlobalBatch, agreement: Agreement | None = None
    ) -> dict[str, float]:
        """Leave the reduced gradients of a batch in the engine; return `loss` and its companions.

        Raises:
            NonFiniteLossError: on all ranks; no gradient was accumulated.
            ChunkOutOfMemoryError: on all ranks; no gradient was accumulated.
            StepGivenUpError: on all ranks; no gradient was accumulated.
        """

    def update(self, lr: float) -> None:
        """Update the objective's own parameters, after the engine's update."""

    def join_state(self, engine: Stateful) -> Stateful:
        """Return the engine as checkpoints see it, with the objective's own tensors if any."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers from which `load_state_dict` continues."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""


class Engine(Protocol):
    """The part of an engine that a step uses."""

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

    def prefetch(self, parameters: list[torch.nn.Parameter]) -> None:
        """Start to gather the parameters of the next `hold`."""

    def accumulation(self) -> AbstractContextManager[None]:
        """Context of all backwards of one optimizer step; on exit all gradients are reduced."""

    def backward(self, surrogate: torch.Tensor) -> None:
        """Accumulate gradients, to be averaged over ranks."""

    def reduce(self, parameters: list[torch.nn.Parameter]) -> None:
        """Reduce gradients of these parameters that are complete, before all others."""

    def fill_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Give these parameters gradients of zeros where they have none."""

    def discard(self) -> None:
        """Drop the gradients of an accumulation that an exception ended."""


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters.

    torch's own AdamW, so that no machine needs a compiler to build an optimizer; fused, because the
    unfused one reads and writes the state about 13 times, which an offloaded run waits for.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into two groups: matrices decay, norms and biases do not."""
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # A parameter that ZeRO-3 has partitioned has lost its shape to `ds_shape`.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) >= 2 else kept).append(parameter)
    # DeepSpeed cannot partition an empty group.
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0-based); there is no state to save.

    Linear warm-up over `warmup_steps` from lr/warmup_steps to lr, then the chosen decay, which
    would reach 0 at `decay_steps`, or `num_steps` without it.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    # Without decay_steps, a longer run would change rates of steps already made: see run_identity.
    end = config.decay_steps or num_steps
    progress = (step - config.warmup_steps) / (end - config.warmup_steps)
    if config.decay == "linear":
        return config.lr * (1 - progress)
    if config.decay == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr


@dataclasses.dataclass(kw_only=True, slots=True)
class TensorChunk:
    """A chunk on the device."""

    number: int
    input_ids: torch.Tensor  # (T,)
    lengths: torch.Tensor  # (C,) in host memory
    instruction_tokens: torch.Tensor | None  # (C,) at the front of each row; None: no row has any
    packed: Any = None  # inputs of the encoder's layers other than hidden states (sweep only)


def on_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Move an array to the device, without waiting for what the device has still to do."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def to_tensors(number: int, chunk: Chunk, device: torch.device) -> TensorChunk:
    """Move one chunk to the device."""
    skipped = chunk.instruction_tokens
    return TensorChunk(
        number=number,
        input_ids=on_device(chunk.input_ids, device),
        # On the host, because code that splits rows must not wait for the device.
        lengths=torch.from_numpy(chunk.lengths),
        instruction_tokens=None if skipped is None else on_device(skipped, device),
    )


def seed_random(*numbers: int) -> None:
    """Seed torch by a few numbers, such as (seed, step, rank, chunk).

    A resumed run then draws the dropout masks of the uninterrupted one without any saved state,
    and every schedule draws the same.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) % 2**63)


def seed_of_chunks(seed: int, step: int) -> Callable[[int], None]:
    """Return a function that seeds torch for a chunk of this rank, given the chunk's number."""
    return lambda number: seed_random(seed, step, comm.rank(), number)


class ChunkOutOfMemoryError(DiffembedError):
    """A chunk did not fit on some rank; raised on all ranks, the gradients are discarded."""


def release_memory() -> None:
    """Free the tensors of work that has failed, and give them back to the device.

    Call it where the exception and its frames are gone. On GPUs they were seen in cycles of
    references, which counting references alone never frees: gigabytes stayed allocated.
    """
    gc.collect()
    torch.cuda.empty_cache()


class StepGivenUpError(DiffembedError):
    """A rank received a stop request; raised on all ranks, the gradients are discarded."""


class NonFiniteLossError(DiffembedError):
    """The global loss is infinite or not a number; raised on all ranks, before the update.

    Args:
        loss: its value.
        texts: indices of this rank's texts whose embedding is not finite.
    """

    def __init__(self, loss: float, texts: list[int]) -> None:
        super().__init__(f"loss is {loss}")
        self.texts = texts


# A step that takes longer may be given up on request; then ranks agree about this often within it.
_LONG_STEP_SECONDS = 10.0
_SPACING_SECONDS = 5.0


class Agreement:
    """Decides within a step, for all ranks together, whether it continues.

    Every agreement is the same collective call, so that a rank which leaves its chunks for lack of
    memory joins the others at whichever check they have reached.

    Args:
        wants_to_stop: this rank's own view.
    """

    def __init__(self, wants_to_stop: Callable[[], bool] = lambda: False) -> None:
        self._wants_to_stop = wants_to_stop
        self._checks = 0
        self.has_failed = False  # this rank, in this step, for lack of memory
        # Checks from one agreement to the next. None before a step's duration is known: the first
        # step after a start is always finished, so that restarts make progress.
        self._spacing: int | None = None

    def begin_step(self) -> None:
        """Count the checks of a new step."""
        self._checks = 0
        self.has_failed = False

    def end_step(self, seconds: float) -> None:
        """Choose how often to agree in the next step.

        Args:
            seconds: of this step, the same number on all ranks.
        """
        # From numbers that all ranks share: ranks that agreed at different checks would hang.
        per_check = seconds / max(self._checks, 1)
        long = seconds > _LONG_STEP_SECONDS
        self._spacing = max(1, round(_SPACING_SECONDS / per_check)) if long else None

    def check(self) -> None:
        """Agree, if it is time; all ranks call this equally often: per chunk, or layer of a sweep.

        Raises:
            ChunkOutOfMemoryError: a rank has left its chunks.
            StepGivenUpError: a rank received a stop request.
        """
        self._checks += 1
        if self._spacing is not None and self._checks % self._spacing == 0:
            self._agree(stop=self._wants_to_stop())

    def on_all_ranks(self, work: Callable[[], Found]) -> Found:
        """Do work without collectives, and let one rank's lack of memory end it on all.

        A rank that fails waits here for the others. Parameters are gathered before and gradients
        reduced afterwards, so no other collective is in between.

        Raises:
            ChunkOutOfMemoryError: some rank ran out of memory.
        """
        found = self.attempt(work)
        self.settle()
        return cast(Found, found)

    def attempt(self, work: Callable[[], Found]) -> Found | None:
        """Do work without collectives, unless this rank has run out of memory before.

        A lack of memory is kept for the next agreement. Until then the rank makes the collective
        calls of the others, which do not know of it. The work is a function, not a `with` block,
        because the frames of a failed block would keep its tensors until the step has ended.
        """
        if self.has_failed:
            return None
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_device_memory(error):
                raise
            self.has_failed = True
        release_memory()
        return None

    def settle(self) -> None:
        """Agree whether every rank's work of this step fitted into memory; a collective call.

        Raises:
            ChunkOutOfMemoryError: some rank ran out of memory.
        """
        # No stop here: what little is left of the step would be lost.
        self._agree(stop=False)

    def _agree(self, *, stop: bool) -> None:
        any_failed, any_stop = comm.max_over_ranks(self.has_failed, stop)
        if any_failed:
            raise ChunkOutOfMemoryError("a chunk does not fit into memory")
        if any_stop:
            raise StepGivenUpError("a stop was requested within a step")
