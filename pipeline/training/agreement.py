"""Where inside a step all ranks agree to give it up: the same places on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pipeline import comm
from pipeline.errors import DiffembedError

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
