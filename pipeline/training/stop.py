"""Turn signals, a stop file and the end of the launcher into one request to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from pipeline import comm, launch

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers the first signal; a second one, `echo_seconds` later, ends the process at once.

    Args:
        file: a path whose existence is a request, as a signal is.
        launchers: ids of the launcher's processes (see `launch.launcher_processes`), whose end is
            a request as well: nothing else would end the ranks, and the next start of the run
            would find them in its folder. Empty for none.
        echo_seconds: launchers forward a signal that the ranks have also received directly; the
            two are one request.
    """

    def __init__(
        self, file: Path, *, launchers: tuple[int, ...], echo_seconds: float = 1.0
    ) -> None:
        self._file = file
        self._reason = ""
        self._launchers = launchers
        for number in _SIGNALS:
            signal.signal(number, self._remember)
        # Python runs a handler only once the main thread has returned from C++: from a collective
        # call that waits for a rank which hangs, never. A pipe receives the signal at once.
        receiving, sending = os.pipe()
        os.set_blocking(sending, False)
        signal.set_wakeup_fd(sending)
        threading.Thread(
            target=_end_at_second_signal, args=(receiving, echo_seconds), daemon=True
        ).start()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name

    def reason(self) -> str:
        """Return why this rank wants to stop, empty when it does not."""
        if not self._reason:
            if comm.rank() == 0 and self._file.exists():
                # Not remembered: a user may take the file away again.
                return f"{self._file.name} file"
            if self._launchers and launch.launcher_processes() != self._launchers:
                self._reason = "the launcher's end"
        return self._reason

    def agreed_reason(self) -> str:
        """Return the reason of the first rank that has one; a collective call."""
        return str(next(reason for reason in comm.all_gather_object(self.reason()) if reason))

    def clear(self) -> None:
        """Forget an earlier request by file, so that the next start does not stop again."""
        if comm.rank() == 0:
            self._file.unlink(missing_ok=True)


def _end_at_second_signal(receiving: int, echo_seconds: float) -> None:
    """Read signals, a byte each, and end this process at the second request."""
    first = None
    while True:
        number, now = os.read(receiving, 1)[0], time.monotonic()
        if number not in _SIGNALS:  # for another library
            continue
        if first is None:
            first = now
        elif now - first > echo_seconds:
            os._exit(128 + number)
