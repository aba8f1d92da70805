"""A request to stop: from a signal, a file, or the end of the launcher."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from pipeline import comm, launcher

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Launchers hand on a signal that the ranks have got as well: both are one request.
_ONE_REQUEST_SECONDS = 1.0


class StopRequest:
    """Remembers the first signal; a second one, a second later or more, ends the process at once.

    Args:
        file: a path that, once it exists, asks for a stop as a signal would.
        launchers: the processes without which nobody would end the ranks, and a run that is started
            again would meet them in its folder (see launcher.processes); empty for none.
    """

    def __init__(self, file: Path, *, launchers: tuple[int, ...]) -> None:
        self._file = file
        self._reason = ""
        self._launchers = launchers
        for number in _SIGNALS:
            signal.signal(number, self._remember)
        # Python runs a handler only once the main thread has come back from what it calls: from a
        # collective call that waits for a rank which hangs, never. The descriptor hears it at once.
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told)
        threading.Thread(target=_end_at_second_signal, args=(heard,), daemon=True).start()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name

    def reason(self) -> str:
        """Why this rank wants to stop, empty when it does not."""
        if not self._reason:
            if comm.rank() == 0 and self._file.exists():
                return f"{self._file.name} file"
            if self._launchers and launcher.processes() != self._launchers:
                self._reason = "the launcher's end"
        return self._reason

    def agreed_reason(self) -> str:
        """The reason of the first rank that has one; a collective call."""
        return str(next(reason for reason in comm.all_gather_object(self.reason()) if reason))

    def clear(self) -> None:
        """Forget an earlier request by file, so that the next start does not stop again."""
        if comm.rank() == 0:
            self._file.unlink(missing_ok=True)


def _end_at_second_signal(heard: int) -> None:
    """Read signals, a byte each, and end this process at the second request."""
    first = None
    while True:
        number, now = os.read(heard, 1)[0], time.monotonic()
        if number not in _SIGNALS:  # that another library listens to
            continue
        if first is None:
            first = now
        elif now - first > _ONE_REQUEST_SECONDS:
            os._exit(128 + number)
