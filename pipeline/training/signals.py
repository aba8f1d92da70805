"""A request to stop, from a signal or a file, turned into one decision of all ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

from pipeline import comm

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers the first signal; a second one ends the process at once.

    Args:
        file: a path that, once it exists, asks for a stop as a signal would.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._reason = ""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._reason:
            os._exit(128 + number)
        self._reason = signal.Signals(number).name

    def agreed(self) -> str:
        """The reason to stop on all ranks, empty when there is none; a collective call.

        One rank alone must not decide: the others would wait for it in the next collective.
        """
        reason = self._reason
        if not reason and comm.rank() == 0 and self._file.exists():
            reason = f"{self._file.name} file"
        if not comm.any_rank(bool(reason)):
            return ""
        return str(next(r for r in comm.all_gather_object(reason) if r))

    def clear(self) -> None:
        """Forget an earlier request by file, so that the next start does not stop again."""
        if comm.rank() == 0:
            self._file.unlink(missing_ok=True)
