"""Wait for what a site cures by itself: a controller that is away, a disk that is full."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential,
)

T = TypeVar("T")

# Seconds between two tries at most.
LONGEST_WAIT = 30


def repeat(
    call: Callable[[], T],
    *,
    on: type[Exception],
    seconds: float,
    tell: Callable[[BaseException], None],
) -> T:
    """Repeat a call while it raises an error of one kind, at growing intervals.

    Args:
        call: what to try.
        on: the kind of error; any other one is raised at once.
        seconds: after which the last error is raised.
        tell: called once, with the first error, before the first wait.
    """

    def before_sleep(state: RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        if state.attempt_number == 1 and error:
            tell(error)

    retrying = Retrying(
        retry=retry_if_exception_type(on),
        wait=wait_exponential(max=LONGEST_WAIT),
        stop=stop_after_delay(seconds),
        before_sleep=before_sleep,
        reraise=True,
    )
    return retrying(call)
