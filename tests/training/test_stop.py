"""A first signal is a request, a second one ends the process, an echo of the first does not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests import forks
from tests.support import PATIENCE

# A checkpoint on its way to a disk that stays full.
FULL_DISK = """
import os, signal, sys
from pathlib import Path
from safetensors import SafetensorError
from pipeline.errors import DiffembedError
from pipeline.training import checkpoints
from pipeline.training.run_checkpoints import StopRequest
from tests.training.memory_engine import Memory
def save_file(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    raise SafetensorError("Error while serializing: I/O error (os error 28)")
checkpoints.save_file = save_file
stop = StopRequest(Path(sys.argv[1], "stop"), launchers=(), echo_seconds=60)
saver = checkpoints.Saver(Path(sys.argv[1]), in_a_hurry=stop.is_pending)
saver.begin(Memory(a=1.0), step=1, identity={})
try:
    saver.finish()
except DiffembedError as error:
    print(stop.reason(), error, flush=True)
    sys.exit(error.exit_code)
"""

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
    words = ["-c", CODE, str(seconds_of_one_request), tmp_path / "stop", str(seconds_in_c)]
    done = forks.run(words, folder=tmp_path, timeout=PATIENCE)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == printed


def test_a_signal_ends_the_wait_for_a_full_disk(tmp_path: Path) -> None:
    done = forks.run(["-c", FULL_DISK, tmp_path], folder=tmp_path, timeout=PATIENCE)
    assert done.returncode == 1, done.stderr
    assert "trying again in a second" in done.stdout
    assert "SIGTERM" in done.stdout.splitlines()[-1]
    assert "step-000001 could not be written (rank 0: " in done.stdout.splitlines()[-1]
