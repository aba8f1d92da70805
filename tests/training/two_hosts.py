"""Two hosts on one machine: network namespaces with a wire between them and nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

INTERFACE = "wire0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def why_unavailable() -> str:
    """What this machine lacks; empty when nothing."""
    if shutil.which("ip") is None:
        return "no command ip (Debian: apt-get install iproute2)"
    name = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces; the first has ADDRESSES[0], the second ADDRESSES[1]."""
    names = (f"host-{os.getpid()}-1", f"host-{os.getpid()}-2")
    try:
        for name in names:
            _ip("netns", "add", name)
        ends = ("link", "add", INTERFACE, "netns", names[0], "type", "veth")
        _ip(*ends, "peer", "name", INTERFACE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def remote_shell(folder: Path, names: tuple[str, str]) -> Path:
    """A command in the place of ssh: `COMMAND ADDRESS words` runs the words on that host."""
    path = folder / "remote_shell"
    cases = "".join(
        f"  {address}) host={name} ;;\n" for address, name in zip(ADDRESSES, names, strict=True)
    )
    path.write_text(
        f'#!/bin/sh\ncase $1 in\n{cases}esac\nshift\nexec ip netns exec "$host" sh -c "$*"\n'
    )
    path.chmod(0o755)
    return path


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
