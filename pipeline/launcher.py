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

_PATIENCE_SECONDS = 5.0
# Who adopts processes whose parent has ended, beside process 1.
_ADOPTERS = ("systemd", "slurmstepd")


def processes() -> tuple[int, ...]:
    """Process ids of the parent, and of the command `deepspeed` where that started the parent.

    When that command is killed, what it started goes on without it. Further ancestors do not count:
    a run goes on when the shell is closed that it was started from.
    """
    parent = os.getppid()
    try:
        above = _parent_of(parent)
        return (parent, above) if _is_deepspeed(above) else (parent,)
    except OSError:  # the parent has just ended, or a system without /proc
        return (parent,)


def _parent_of(process: int) -> int:
    # pid (name) state ppid ...; the name may hold anything but ends with the last bracket.
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _words_of(process: int) -> list[bytes]:
    return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")


def _is_deepspeed(process: int) -> bool:
    return any(word.rpartition(b"/")[2] == b"deepspeed" for word in _words_of(process)[:2])


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
    if _left_by_deepspeed():
        raise DiffembedError("the command deepspeed has ended")
    where, deadline = place(), time.monotonic() + _PATIENCE_SECONDS
    while where and _refuses(where):
        if time.monotonic() > deadline:
            address, port = where
            raise DiffembedError(f"the launcher that answered at {address}:{port} has ended")
        time.sleep(0.5)


def _left_by_deepspeed() -> bool:
    """Whether the parent was started by `deepspeed` on this host, and init has adopted it since."""
    try:
        parent = os.getppid()
        above = _parent_of(parent)
        adopted = above == 1 or Path(f"/proc/{above}/comm").read_text().strip() in _ADOPTERS
        by_deepspeed = b"deepspeed.launcher.launch" in _words_of(parent)
        return by_deepspeed and adopted and not _is_deepspeed(above)
    except OSError:
        return False


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
def ending_with(launchers: tuple[int, ...]) -> Iterator[None]:
    """End this process if `processes` are no longer those, now or in the meantime.

    For the time in which ranks wait for each other: nothing is lost yet.
    """
    joined = threading.Event()

    def watch() -> None:
        while processes() == launchers:
            if joined.wait(1.0):
                return
        print("the launcher ended before all ranks had joined", file=sys.stderr, flush=True)
        os._exit(1)

    if launchers:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        joined.set()
