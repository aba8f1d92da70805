"""The time of kernels on the pretended device: events around each call, read when all are done."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from pipeline.measuring import layers
from tests.fake_cuda.fake_cuda import CUDA, FakeCuda


class Clock:
    """A device that is done only after `synchronize`, on which each call takes a millisecond."""

    def __init__(self) -> None:
        self.now, self.seen, self.waits = 0, 0, 0

    def synchronize(self) -> None:
        self.seen, self.waits = self.now, self.waits + 1

    def event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, clock: Clock) -> None:
        self._clock, self.at = clock, math.inf

    def record(self) -> None:
        self._clock.now += 1
        self.at = self._clock.now

    def elapsed_time(self, end: Event) -> float:
        assert self.at < end.at <= self._clock.seen, "read before the device was done"
        return end.at - self.at


@contextlib.contextmanager
def timed_device() -> Iterator[Clock]:
    clock = Clock()
    with mock.patch.multiple(torch.cuda, synchronize=clock.synchronize, Event=clock.event):
        yield clock


def test_events_enclose_each_call_and_are_read_after_one_wait_for_all() -> None:
    calls: list[int] = []
    timer = layers.Timer(CUDA, seconds=0.0)
    with timed_device() as clock:
        assert timer.kernels(lambda: calls.append(clock.waits)) == 1e-3
    # One call warms up, one is timed alone; the host waits only once for all the others.
    assert calls == [0, 1, 3, 3, 3]
    assert clock.waits == 4


@pytest.mark.parametrize(("seconds", "count"), [(0.0, 3), (0.004, 4), (0.1, 100)])
def test_the_device_works_for_the_seconds_of_a_measurement_however_fast_calls_are_queued(
    seconds: float, count: int
) -> None:
    """An H200 was given minutes of work for each number: the host queued calls for 40 ms."""
    timer = layers.Timer(CUDA, seconds=seconds)
    with timed_device() as clock:
        timer.kernels(lambda: None)
    assert clock.now == 2 * (1 + count)


def test_parts_of_layers_are_measured_on_the_device_without_a_wait() -> None:
    timer = layers.Timer(CUDA, seconds=0.0)
    with FakeCuda() as record, timed_device():
        product = layers._product(timer, "bfloat16", 8, 16, 32)
        attention = layers._attention(timer, "bfloat16", 8, 64, 0.0)
        dropped = layers._attention(timer, "bfloat16", 8, 64, 0.1)
        numbers, dropout = layers._dropout(timer, "bfloat16", 8, 64)

    assert record.num_syncs == 0, dict(record.syncs)
    assert product.forward == product.by_input == product.by_weight == 1e-3
    assert attention.forward == dropped.forward == pytest.approx(1e-3 / 4 / 128)
    assert (numbers, dropout[0]) == (8 * 64, 1e-3)
