"""Every way a run may end, as one exception tree with its exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class DiffembedError(Exception):
    """Root of all errors this package raises on purpose; exits with 1."""

    exit_code = 1


class UserError(DiffembedError):
    """The user's config, data or command is wrong; exits with 2.

    Args:
        found: what was met, with the key path or file that holds it.
        allowed: what would have been accepted.
        fix: what to change, when the two do not already say it.
    """

    exit_code = 2

    def __init__(self, found: str, *, allowed: str = "", fix: str = "") -> None:
        self.found, self.allowed, self.fix = found, allowed, fix
        parts = [found]
        if allowed:
            parts.append(f"allowed: {allowed}")
        if fix:
            parts.append(f"fix: {fix}")
        super().__init__(" | ".join(part.replace("\n", " ") for part in parts))


class Stopped(DiffembedError):  # noqa: N818 -- an outcome, not a fault
    """The run was asked to stop, wrote a checkpoint, and can be resumed; exits with 75."""

    exit_code = 75


def say_error(error: DiffembedError) -> None:
    """The one line by which every command tells an error of this package."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def errors_end_the_process() -> Iterator[None]:
    """A command: an error of this package becomes one line and its exit code."""
    try:
        yield
    except DiffembedError as error:
        say_error(error)
        sys.exit(error.exit_code)
