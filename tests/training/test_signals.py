"""A first signal is a request, a second one ends the process, an echo of the first does not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os, signal, sys
from pathlib import Path
from pipeline.training import signals
signals._ONE_REQUEST_SECONDS = float(sys.argv[1])
stop = signals.StopRequest(Path(sys.argv[2]), launched=False)
print(repr(stop.reason()))
os.kill(os.getpid(), signal.SIGUSR1)
print(stop.reason(), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print(stop.reason(), flush=True)
"""


@pytest.mark.parametrize(
    ("seconds_of_one_request", "code", "printed"),
    [
        (60, 0, ["''", "SIGUSR1", "SIGUSR1"]),  # a launcher hands on what the rank got as well
        (0, 128 + signal.SIGTERM, ["''", "SIGUSR1"]),
    ],
)
def test_a_second_request_ends_the_process_at_once_and_an_echo_does_not(
    tmp_path: Path, seconds_of_one_request: float, code: int, printed: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(seconds_of_one_request), str(tmp_path / "stop")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == printed
