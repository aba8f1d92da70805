"""Whether the launcher that started this rank still lives; free of torch."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import DiffembedError

_PATIENCE_SECONDS = 10.0


def processes() -> list[int]:
    """Process ids of the parent, and of the command `deepspeed` where that started the parent.

    When that command is killed, what it started goes on without it. Further ancestors do not count:
    a run goes on when the shell is closed that it was started from.
    """
    parent = os.getppid()
    try:
        # pid (name) state ppid ...; the name may hold anything but ends with the last bracket.
        status = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
        words = Path(f"/proc/{status[1]}/cmdline").read_bytes().split(b"\0")
    except OSError:  # the parent has just ended, or a system without /proc
        return [parent]
    by_deepspeed = any(word.rpartition(b"/")[2] == b"deepspeed" for word in words[:2])
    return [parent, int(status[1])] if by_deepspeed else [parent]


def place(environ: Mapping[str, str] | None = None) -> tuple[str, int] | None:
    """Address and port at which the launcher answers as long as it lives, if it has such a place.

    torchrun has one (the store of its first host, by which the ranks meet), and Open MPI (the PMIx
    server of this host); both are there before the first rank.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env:
        by_torchrun = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return (env["MASTER_ADDR"], int(env["MASTER_PORT"])) if by_torchrun else None
    if "OMPI_COMM_WORLD_RANK" in env:
        uris = " ".join(env[name] for name in sorted(env) if name.startswith("PMIX_SERVER_URI"))
        found = re.search(r";tcp4://([^:]+):(\d+)", uris)
        return (found[1], int(found[2])) if found else None
    return None


def require_it() -> None:
    """Raise if the launcher had ended before this process could see who its parent is.

    Some ranks may never have been started then, and the others would wait for them until the
    timeout, in a folder that the next start needs.

    Raises:
        DiffembedError: so it is.
    """
    where, deadline = place(), time.monotonic() + _PATIENCE_SECONDS
    while where and _refuses(where):
        if time.monotonic() > deadline:
            address, port = where
            raise DiffembedError(f"the launcher that answered at {address}:{port} has ended")
        time.sleep(0.5)


def _refuses(where: tuple[str, int]) -> bool:
    """Whether the host is there, but nobody listens at that port of it."""
    try:
        socket.create_connection(where, timeout=_PATIENCE_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # a network that is not up yet: joining waits for that
        return False
    return False


@contextmanager
def ending_with(parent: int | None) -> Iterator[None]:
    """End this process if its parent has ended or ends in the meantime.

    For the time in which ranks wait for each other: nothing is lost yet.
    """
    joined = threading.Event()

    def watch() -> None:
        while os.getppid() == parent:
            if joined.wait(1.0):
                return
        print("the launcher ended before all ranks had joined", file=sys.stderr, flush=True)
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        joined.set()
