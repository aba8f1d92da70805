"""Is this node fit to train? One line of answer, from Python's own library, within a minute.

python -m pipeline.submission.health RUN_FOLDER SCRATCH_FOLDER NUM_GPUS
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MARK = "health:"
FIT = "fit"
# A node below this fails in the middle of a checkpoint or of compiling a kernel.
_FREE_BYTES = 2**30
# Beyond it, authentication fails and files seem older than what they were made of.
_CLOCK_SECONDS = 60
_GPU_SECONDS = 45
_QUERY = "index,mig.mode.current,ecc.errors.uncorrected.volatile.total"


def find_faults(run_folder: Path, scratch: Path, num_gpus: int) -> list[str]:
    """What makes this node unfit, in words; empty when nothing does."""
    faults = _gpu_faults(num_gpus) if num_gpus else []
    for folder in (run_folder, scratch):
        faults += _folder_faults(folder)
    return faults + _clock_faults(run_folder)


def _gpu_faults(wanted: int) -> list[str]:
    command = shutil.which("nvidia-smi")
    if command is None:  # another vendor's
        return []
    words = [command, f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_GPU_SECONDS)
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi did not answer within {_GPU_SECONDS} s"]
    lines = [line.split(", ") for line in done.stdout.splitlines() if line]
    if done.returncode:
        # A GPU that fell off the bus: all others may still answer.
        said = (done.stderr or done.stdout).strip().splitlines()
        return [f"nvidia-smi: {said[-1] if said else f'exit code {done.returncode}'}"]
    # Of a GPU that is cut into instances, Slurm counts those.
    whole = all(mode != "Enabled" for _, mode, _ in lines)
    faults = [f"{len(lines)} of {wanted} GPUs answer"] if whole and len(lines) < wanted else []
    for index, _, errors in lines:
        if errors.isdecimal() and int(errors):  # a number where the GPU counts them
            faults.append(f"GPU {index} has {errors} uncorrected memory errors")
    return faults


def _folder_faults(folder: Path) -> list[str]:
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return [f"{folder} cannot be written ({error.strerror})"]
    if free < _FREE_BYTES:
        return [f"{folder} has {free / 2**30:.2f} GiB free, less than {_FREE_BYTES / 2**30:.0f}"]
    return []


def _clock_faults(shared: Path) -> list[str]:
    """A shared folder's files carry the time of its server, the same for all nodes."""
    try:
        with tempfile.NamedTemporaryFile(dir=shared, prefix=".clock-") as probe:
            away = time.time() - Path(probe.name).stat().st_mtime
    except OSError:
        return []  # said already
    if abs(away) > _CLOCK_SECONDS:
        return [f"its clock is {away:.0f} s away from that of {shared}"]
    return []


def main() -> None:
    """Print this node's name and what is wrong with it, or that nothing is."""
    run_folder, scratch, num_gpus = sys.argv[1:]
    faults = find_faults(Path(run_folder), Path(scratch), int(num_gpus))
    node = os.environ.get("SLURMD_NODENAME", "this node")
    print(f"{MARK} {node}: {'; '.join(faults) or FIT}", flush=True)


if __name__ == "__main__":
    main()
