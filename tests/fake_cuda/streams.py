"""Streams of the pretended device: a copy on one of them is done only when something waits for it.

A real stream may be that late. Until then the copy's target holds NaN, so that whoever reads it
too early gets wrong numbers. The default stream works at once, as the pretended device does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


class FakeEvent:
    """A point in a stream's work."""

    def __init__(self, stream: FakeStream) -> None:
        self._stream, self._position = stream, stream.given

    def complete(self) -> None:
        """Do all work up to here."""
        self._stream.work_until(self._position)


class FakeStream:
    """Work that is done when it is waited for.

    Args:
        device: of the stream; there is only one.
    """

    current: FakeStream | None = None  # None: the default stream

    def __init__(self, device: Any = None) -> None:
        self.given = 0
        self._done = 0
        self._work: list[Callable[[], None]] = []
        self._guarded: list[Tensor] = []
        self._knows_default = False

    def wait_stream(self, other: FakeStream) -> None:
        """The default stream is never behind, so there is nothing to wait for."""
        self._knows_default = True

    def wait_event(self, event: FakeEvent) -> None:
        """Let the default stream wait."""
        event.complete()

    def record_event(self) -> FakeEvent:
        """Return the present end of the work."""
        return FakeEvent(self)

    def guard(self, tensor: Tensor) -> None:
        """Note that the allocator will wait for this stream before it uses the memory again."""
        self._guarded.append(tensor)

    def copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        """Copy later."""
        assert self._knows_default, "the source may not be computed yet"
        self._knows_default = False
        with _inside(None):
            target.fill_(torch.nan)

        def work() -> None:
            on_device = source if source.is_cuda else target
            assert any(tensor is on_device for tensor in self._guarded), "its memory may be reused"
            with _inside(None):
                _real_copy(target, source, non_blocking)

        self._work.append(work)
        self.given += 1

    def work_until(self, position: int) -> None:
        """Do the work up to a position, in order."""
        while self._done < position:
            self._work[self._done]()
            self._done += 1


_real_copy = Tensor.copy_


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if FakeStream.current is None:
        return _real_copy(target, source, non_blocking)
    FakeStream.current.copy(target, source, non_blocking)
    return target


@contextmanager
def _inside(stream: FakeStream | None) -> Iterator[None]:
    before, FakeStream.current = FakeStream.current, stream
    try:
        yield
    finally:
        FakeStream.current = before


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch make and use these streams."""
    default = FakeStream()
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: default)
    monkeypatch.setattr(torch.cuda, "stream", _inside)
    monkeypatch.setattr(Tensor, "copy_", _copy)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: stream.guard(tensor))
