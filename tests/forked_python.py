"""`python` of a job in tests: a process forked for it, with its signals, its output and its end.

    python tests/forked_python.py WHAT FOLLOWS PYTHON

A real Python where a fork would not be the same, and under mpirun, which knows its processes by
their numbers. Whoever kills this process kills the forked one.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests import forks

_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def main() -> None:
    """Be the process for whoever started this one."""
    words = sys.argv[1:]
    if "OMPI_COMM_WORLD_RANK" in os.environ or not forks.would_fork(os.environ):
        os.execv(sys.executable, [sys.executable, *words])
    process = forks.Process(words, folder=Path.cwd(), stdout=sys.stdout, stderr=sys.stderr)
    for number in _HANDED_ON:
        signal.signal(number, lambda number, _: os.kill(process.pid, number))
    code = process.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
