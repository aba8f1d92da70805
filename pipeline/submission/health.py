"""Check that this node is fit to train, and print one line; uses Python's standard library only.

    python -m pipeline.submission.health RUN_FOLDER SCRATCH_FOLDER NUM_GPUS

A fault belongs to the node, or to something that all nodes share: a full run folder is full on
every node. Some faults look the same until the nodes are compared (see
`allocation.attribute_faults`).
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MARK = "health:"
# With less, a node fails in the middle of a checkpoint or while it compiles a kernel.
_FREE_BYTES = 2**30
# Beyond it, authentication fails, and files seem older than their inputs.
_CLOCK_SECONDS = 60
_GPU_SECONDS = 45
_FOLDER_SECONDS = 45
_QUERY = "index,mig.mode.current,ecc.errors.uncorrected.volatile.total"
# Errors of the folder itself, the same from every node.
_SHARED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """Faults found on a node, as messages; all empty if it is fit.

    Args:
        own: of the node: GPUs, its local disk.
        shared: of the run's folder itself.
        folder: of the access to the run's folder: the node's mount, or the server.
        clock: distance of its clock from the file server's.
    """

    own: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    folder: tuple[str, ...] = ()
    clock: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """All faults in one line; empty without any."""
        return "; ".join((*self.own, *self.shared, *self.folder, *self.clock))


def check_node(run_folder: Path, scratch: Path, num_gpus: int) -> Health:
    """Check this node without blocking on a disk that hangs."""
    # All faults, not the first only: they help the site to repair the node.
    own = _gpu_faults(num_gpus) if num_gpus else []
    number, fault = probe(scratch)
    own += [fault] if fault else []
    number, fault = probe(run_folder)
    if not fault:
        return Health(own=tuple(own), clock=tuple(_clock_faults(run_folder)))
    if number in _SHARED:
        return Health(own=tuple(own), shared=(fault,))
    return Health(own=tuple(own), folder=(fault,))


def _gpu_faults(wanted: int) -> list[str]:
    command = shutil.which("nvidia-smi")
    if command is None:  # no GPUs, or another vendor's
        return []
    words = [command, f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=_GPU_SECONDS
        )
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi did not answer within {_GPU_SECONDS} s"]
    lines = [line.split(", ") for line in done.stdout.splitlines() if line]
    if done.returncode:
        # A GPU fell off the bus; the others may still answer.
        printed = (done.stderr or done.stdout).strip().splitlines()
        return [f"nvidia-smi: {printed[-1] if printed else f'exit code {done.returncode}'}"]
    # If a GPU is split into MIG instances, Slurm counts the instances.
    whole = all(mode != "Enabled" for _, mode, _ in lines)
    faults = [f"{len(lines)} of {wanted} GPUs answer"] if whole and len(lines) < wanted else []
    for index, _, errors in lines:
        if errors.isdecimal() and int(errors):  # a number where the GPU counts them
            faults.append(f"GPU {index} has {errors} uncorrected memory errors")
    return faults


def probe(folder: Path) -> tuple[int, str]:
    """Write a small file to a folder and read its free space.

    A child process does it, because a process that waits for a dead mount cannot be interrupted.

    Returns:
        The error number and a message; 0 and an empty one if the folder is fit.
    """
    words = [sys.executable, "-m", "pipeline.submission.health", "--probe", str(folder)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, complaint = child.communicate(timeout=_FOLDER_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()  # not waited for: it may never end
        return errno.ETIMEDOUT, f"{folder} did not answer within {_FOLDER_SECONDS} s"
    if child.returncode:
        return errno.EIO, f"{folder} could not be checked ({complaint.strip()[-200:]})"
    number, free = json.loads(output)
    if number:
        return number, f"{folder} cannot be written ({os.strerror(number)})"
    if free < _FREE_BYTES:
        room = f"{free / 2**30:.2f} GiB free, less than {_FREE_BYTES / 2**30:.0f}"
        return errno.ENOSPC, f"{folder} has {room}"
    return 0, ""


def _write_a_little(folder: Path) -> tuple[int, int]:
    """Return the error number, or 0, and the free bytes of a folder."""
    try:
        free = shutil.disk_usage(folder).free
        # Written and synced: a full or read-only disk may still accept an empty file.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO, 0
    return 0, free


def _clock_faults(shared: Path) -> list[str]:
    """Compare this clock with the file server's, which sets the times of new files."""
    try:
        with tempfile.NamedTemporaryFile(dir=shared, prefix=".clock-") as file:
            away = time.time() - Path(file.name).stat().st_mtime
    except OSError:
        return []  # the next use of the folder reports it
    if abs(away) > _CLOCK_SECONDS:
        return [f"its clock is {away:.0f} s away from the clock of {shared}"]
    return []


def main() -> None:
    """Print this node's name and its faults."""
    if sys.argv[1] == "--probe":
        print(json.dumps(_write_a_little(Path(sys.argv[2]))))
        return
    run_folder, scratch, num_gpus = sys.argv[1:]
    health = check_node(Path(run_folder), Path(scratch), int(num_gpus))
    # Slurm's name of the node, by which `attribute_faults` knows it; the host's may differ.
    node = os.environ.get("SLURMD_NODENAME", "this node")
    print(f"{MARK} {node}: {json.dumps(dataclasses.asdict(health))}", flush=True)


if __name__ == "__main__":
    main()
