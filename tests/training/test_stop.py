"""A first signal is a request, a second one ends the process, an echo of the first does not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import PATIENCE

CODE = """
import os, signal, sys, threading, time
from datetime import timedelta
from pathlib import Path
from torch.distributed import TCPStore
from pipeline.training.run_checkpoints import StopRequest
stop = StopRequest(Path(sys.argv[2]), launchers=(), echo_seconds=float(sys.argv[1]))
print(repr(stop.reason()))
os.kill(os.getpid(), signal.SIGUSR1)
print(stop.reason(), flush=True)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
try:
    # In C++, as ranks wait for each other; Python runs no handler of a signal meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True)
    store.wait(["never set"], timedelta(seconds=float(sys.argv[3])))
except Exception:
    print(stop.reason(), flush=True)
"""


@pytest.mark.parametrize(
    ("seconds_of_one_request", "seconds_in_c", "code", "printed"),
    [
        # A launcher forwards a signal that the rank has received as well.
        (60, 2, 0, ["''", "SIGUSR1", "SIGUSR1"]),
        (0, 600, 128 + signal.SIGTERM, ["''", "SIGUSR1"]),
    ],
)
def test_a_second_request_ends_the_process_at_once_and_an_echo_does_not(
    tmp_path: Path,
    seconds_of_one_request: float,
    seconds_in_c: float,
    code: int,
    printed: list[str],
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c", CODE, str(seconds_of_one_request)),
            *(str(tmp_path / "stop"), str(seconds_in_c)),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == printed
