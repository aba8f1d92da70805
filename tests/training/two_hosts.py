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
    """Return the programs that this machine lacks."""
    for command, package in (("ip", "iproute2"), ("pdsh", "pdsh")):
        if shutil.which(command) is None:
            return f"no command {command} (Debian: apt-get install {package})"
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
    """A folder with a command `ssh`, which runs its words on the host with that address.

    As from a real one, they hear nothing of the environment that it was called in, except the mark
    by which a test finds all processes of a run.
    """
    path = folder / "ssh"
    cases = "".join(
        f"  {address}) host={name} ;;\n" for address, name in zip(ADDRESSES, names, strict=True)
    )
    path.write_text(
        f"""#!/bin/sh
while :; do
  case $1 in
    -o | -p | -l) shift 2 ;;
    -*) shift ;;
    *) break ;;
  esac
done
case $1 in
{cases}esac
shift
exec ip netns exec "$host" env -i HOME="$HOME" PATH=/usr/sbin:/usr/bin:/sbin:/bin \\
  MARK_OF_RUN="$MARK_OF_RUN" sh -c "$*"
"""
    )
    path.chmod(0o755)
    return folder


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
