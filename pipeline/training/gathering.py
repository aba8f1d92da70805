"""Gather ZeRO-3's parameters in pieces, each while the one before it is copied out.

    a large parameter       gathered in place
    several small ones      gathered into one buffer, then copied out of it; the buffer goes

So the peak is the whole parameters and one buffer (`buffer_bytes`), whatever the size of the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline import comm

# A call in which every rank sends less takes as long as one in which it sends this much.
_SHARE_BYTES = 2 * 2**20


def buffer_bytes(world_size: int) -> int:
    """Return the most bytes that a gather needs in addition to the parameters it makes whole."""
    return world_size * _SHARE_BYTES if world_size > 1 else 0


class Gathering:
    """The parameters that are whole at present, and the gathers that are under way.

    Persistent parameters, which DeepSpeed keeps whole, are left alone. Without ZeRO-3 there is
    nothing to gather.
    """

    def __init__(self) -> None:
        self._under_way: deque[Any] = deque()

    @contextmanager
    def hold(self, parameters: Iterable[Any]) -> Iterator[None]:
        """Keep parameters whole until the context ends; a collective call."""
        # One that is whole already belongs to an outer context.
        gathered = [p for p in _partitioned(parameters) if p.ds_status.name != "AVAILABLE"]
        # hpZ's second copy outlives a step for frozen parameters only. Copies and partitions belong
        # to different groups of ranks, which must not be at work at the same time.
        for copied in (False, True):
            for piece in _pieces(p for p in gathered if _has_copy(p) == copied):
                self._under_way.append(piece[0].all_gather_coalesced(piece))
                # The next gather runs while this piece is copied out of its buffer.
                while len(self._under_way) > 1:
                    self._under_way.popleft().wait()
            self._wait()
        try:
            yield
        finally:
            self._release(gathered)

    def prefetch(self, parameters: Iterable[Any]) -> None:
        """Start to gather what the next `hold` asks for, without waiting; a collective call.

        Not hpZ's copies: within a node they arrive fast enough, and their group must not be at work
        at the same time as that of the reduction.
        """
        for piece in _pieces(p for p in _partitioned(parameters) if not _has_copy(p)):
            self._under_way.append(piece[0].all_gather_coalesced(piece))

    def discard(self, parameters: Iterable[Any]) -> None:
        """Release what was prefetched and is not needed any more."""
        self._wait()
        self._release(p for p in _partitioned(parameters) if p.ds_status.name == "AVAILABLE")

    def _wait(self) -> None:
        while self._under_way:
            self._under_way.popleft().wait()

    def _release(self, parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            if not parameter.ds_persist:
                parameter.partition()


def _partitioned(parameters: Iterable[Any]) -> list[Any]:
    return [parameter for parameter in parameters if hasattr(parameter, "ds_id")]


def _has_copy(parameter: Any) -> bool:
    """Return true where hpZ keeps the parameter a second time, divided over a node's ranks."""
    return parameter.ds_secondary_tensor is not None


def _pieces(parameters: Iterable[Any]) -> Iterator[list[Any]]:
    """Divide the parameters that are neither whole nor under way into groups of one call each."""
    missing = [p for p in parameters if p.ds_status.name == "NOT_AVAILABLE"]
    bound = buffer_bytes(comm.world_size())
    if not bound:  # on one rank nothing is copied
        yield from [missing] if missing else []
        return
    small: list[Any] = []
    size_of_small = 0
    for parameter in missing:
        size = parameter.ds_numel * parameter.element_size()
        if size >= bound:
            yield [parameter]
            continue
        if size_of_small + size > bound:
            yield small
            small, size_of_small = [], 0
        small.append(parameter)
        size_of_small += size
    if small:
        yield small
