"""Run programs that a language model wrote, without letting them reach anything.

A program gets its own process: no network, no files of this machine except Python's own
(read-only) and an empty folder in memory, no variables, no other processes, and limits of CPU,
memory, files, threads, time and output. Child processes are refused. When the program ends, or this
process does, nothing of it is left.

    run_program ──> bubblewrap, or namespaces ──> sandbox_init: mounts, limits, filter ──> program

Needs Linux with user namespaces (or bubblewrap), and libseccomp.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from pipeline.config.loading import strict
from pipeline.errors import MachineError, UserError

Reason = Literal["ok", "failed", "time", "cpu", "memory", "output", "killed"]

_INIT = Path(__file__).with_name("sandbox_init.py")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_WORK = "/work"
_PYTHON = "/python"
_PACKAGES = f"{_PYTHON}/packages"
_ENVIRONMENT = {
    **{"HOME": _WORK, "TMPDIR": _WORK, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
    **{"LD_LIBRARY_PATH": f"{_PYTHON}/{sys.platlibdir}", "PYTHONPATH": _PACKAGES},
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
}
_INODES = 1024
_OPEN_FILES = 64
_STACK_MB = 8
# Longer than a sandbox needs to start on a busy machine.
_START_SECONDS = 120


@strict
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The most that one program may use.

    Args:
        cpu_seconds: of all its threads together.
        wall_seconds: from its start to its end.
        memory_mb: address space, which includes Python itself (about 30 MB).
        files_mb: all files in its folder together.
        output_kb: standard output and standard error, each.
        threads: at a time.
    """

    cpu_seconds: PositiveInt = 10
    wall_seconds: PositiveInt = 20
    memory_mb: Annotated[int, Field(ge=64)] = 512
    files_mb: PositiveInt = 16
    output_kb: PositiveInt = 256
    threads: PositiveInt = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The end of a program.

    Args:
        reason: `ok` for exit code 0, `failed` for another, `killed` for a signal, otherwise the
            limit that it exceeded.
        exit_code: negative for a signal.
        stdout: at most `Limits.output_kb`.
        stderr: at most `Limits.output_kb`.
        seconds: from start to end.
        cpu_seconds: used by all threads together.
    """

    reason: Reason
    exit_code: int
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """The source of a program, and its standard input."""

    source: str
    stdin: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The parts of the host that programs see.

    Args:
        binds: path on the host and path in the sandbox, read-only.
        hidden: folders in the sandbox that look empty.
    """

    binds: tuple[tuple[str, str], ...]
    hidden: tuple[str, ...]


def run_program(
    source: str, *, stdin: str = "", limits: Limits | None = None, packages: Sequence[str] = ()
) -> Outcome:
    """Run a Python program in a sandbox; whatever it does is an outcome, not an exception.

    Args:
        source: its text; the standard library and `packages` can be imported.
        stdin: its standard input.
        limits: `Limits()` by default.
        packages: names of packages of this environment that it may import.

    Raises:
        UserError: this machine cannot build a sandbox, or a package is not installed.
        MachineError: a sandbox could not be started although another could before.
    """
    engine, program = require_sandbox(), Program(source=source, stdin=stdin)
    return _run(engine, program, limits or Limits(), tuple(packages))


@functools.cache
def require_sandbox() -> str:
    """Return the kind of sandbox that works here: `bubblewrap` or `namespaces`.

    Raises:
        UserError: none works.
    """
    refusals = [] if sys.platform == "linux" else [f"{sys.platform} is not Linux"]
    # Bubblewrap would keep root's user, to whom the limit of threads does not apply.
    engines = ("namespaces",) if os.geteuid() == 0 else ("bubblewrap", "namespaces")
    for engine in () if refusals else engines:
        try:
            outcome = _run(engine, Program(source="print(6 * 7)"), Limits(), ())
            if outcome.stdout == "42\n":
                return engine
            refusals.append(f"{engine}: {outcome.reason} {_last_line(outcome.stderr)}".strip())
        except MachineError as error:
            refusals.append(f"{engine}: {error}")
    raise UserError(
        f"this machine cannot run programs in a sandbox ({'; '.join(refusals)})",
        fix="install bubblewrap and libseccomp2, or allow user namespaces (sysctl "
        "user.max_user_namespaces), or leave programs unverified with `execution: off`",
    )


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "")


# --- view ------------------------------------------------------------------------------------


@functools.cache
def _view(packages: tuple[str, ...]) -> View:
    """Return what Python and some packages need, and nothing else.

    Raises:
        UserError: a package is not installed.
    """
    library = Path(sysconfig.get_path("stdlib"))
    version = f"{_PYTHON}/{sys.platlibdir}/{library.name}"
    binds = [
        (str(Path(sys.executable).resolve()), f"{_PYTHON}/bin/python3"),
        (str(library.parent.resolve()), f"{_PYTHON}/{sys.platlibdir}"),
    ]
    machine = sysconfig.get_config_var("MULTIARCH") or "none"
    shared = [f"/lib/{machine}", f"/usr/lib/{machine}"]
    if not any(Path(folder).is_dir() for folder in shared):
        shared = ["/lib", "/usr/lib"]
    for folder in ("/lib64", "/usr/lib64", *shared):
        if Path(folder).is_dir():
            binds.append((str(Path(folder).resolve()), folder))
    for package in packages:
        binds += [(str(path), f"{_PACKAGES}/{path.name}") for path in _files_of(package)]
    # Packages of the host would otherwise be importable by accident.
    names = ("site-packages", "dist-packages")
    hidden = [f"{version}/{name}" for name in names if (library / name).is_dir()]
    return View(binds=tuple(binds), hidden=tuple(hidden))


def _files_of(package: str) -> list[Path]:
    """Return the folder or module of a package, and the folder of libraries next to it.

    Raises:
        UserError: it is not installed.
    """
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if not found or not found.origin or not Path(found.origin).is_file():
        raise UserError(
            f"packages: {package!r}", allowed="names of packages that are installed here"
        )
    path = Path(found.origin)
    path = path.parent if found.submodule_search_locations else path
    return [each for each in (path, path.with_name(f"{package}.libs")) if each.exists()]


def _bubblewrap_words(view: View) -> list[str]:
    """Return the command line of bubblewrap that builds a view.

    Raises:
        MachineError: it is not installed.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise MachineError("not installed")
    words = [program, "--unshare-all", "--die-with-parent", "--new-session", "--as-pid-1"]
    words += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    # For the folders that `sandbox_init` mounts, with a limit of their number of files; it drops
    # the right before it runs the program.
    words += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    for source, target in view.binds:
        words += ["--ro-bind", source, target]
    for device in _DEVICES:
        words += ["--dev-bind", device, device]
    return [*words, "--dir", _WORK, "--remount-ro", "/", "--chdir", "/"]


# --- one program -----------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True, slots=True)
class _Streams:
    """Bytes that a sandbox has written so far, and True if a stream exceeded its limit."""

    stdout: bytearray = dataclasses.field(default_factory=bytearray)
    stderr: bytearray = dataclasses.field(default_factory=bytearray)
    report: bytearray = dataclasses.field(default_factory=bytearray)
    exceeded: bool = False


def _run(engine: str, program: Program, limits: Limits, packages: tuple[str, ...]) -> Outcome:
    view = _view(packages)
    with contextlib.ExitStack() as stack:
        # In memory: no file is left, however this process ends.
        source = os.memfd_create("source")
        stack.callback(os.close, source)
        with os.fdopen(os.dup(source), "wb") as file:
            file.write(program.source.encode(errors="surrogatepass"))
        os.lseek(source, 0, os.SEEK_SET)
        reader, writer = os.pipe()
        report = stack.enter_context(os.fdopen(reader, "rb", buffering=0))
        try:
            process = _start(engine, view, limits, source, writer)
        finally:
            os.close(writer)
        with process:
            streams = _Streams()
            try:
                stdin = program.stdin.encode(errors="surrogatepass")
                _converse(process, report, stdin, limits, streams)
            finally:
                _kill(process)
    return _outcome(streams, limits)


def _start(
    engine: str, view: View, limits: Limits, source: int, report: int
) -> subprocess.Popen[bytes]:
    python = str(Path(sys.executable).resolve())
    words = []
    if engine == "bubblewrap":
        words, python = _bubblewrap_words(view), f"{_PYTHON}/bin/python3"
    request = {
        "parent": os.getpid() if engine == "namespaces" else 0,
        "source": source,
        "report": report,
        "binds": view.binds,
        "devices": _DEVICES,
        "hidden": view.hidden,
        "environment": _ENVIRONMENT,
        "limits": _resources(limits),
    }
    words += [python, "-I", "-S", "-c", _INIT.read_text(), json.dumps(request)]
    # No variable of this process, which may hold keys, is in a process of the sandbox.
    name = "LD_LIBRARY_PATH"
    own = {name: os.environ[name]} if name in os.environ else {}
    return subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(source, report),
        env={**own, **(_ENVIRONMENT if engine == "bubblewrap" else {})},
        start_new_session=True,
        bufsize=0,
    )


def _resources(limits: Limits) -> dict[str, Any]:
    """Return limits in the units of `sandbox_init`."""
    memory, files, stack = (size * 2**20 for size in (limits.memory_mb, limits.files_mb, _STACK_MB))
    resources = {
        # One second more: a program that ignores the first signal is killed by the second.
        "RLIMIT_CPU": (limits.cpu_seconds, limits.cpu_seconds + 1),
        "RLIMIT_AS": (memory, memory),
        "RLIMIT_FSIZE": (files, files),
        "RLIMIT_STACK": (stack, stack),
        # Two more: Python's first thread, and the first process of the sandbox.
        "RLIMIT_NPROC": (limits.threads + 2, limits.threads + 2),
        "RLIMIT_NOFILE": (_OPEN_FILES, _OPEN_FILES),
        **{f"RLIMIT_{name}": (0, 0) for name in ("CORE", "MEMLOCK", "MSGQUEUE")},
    }
    wall = limits.wall_seconds
    return {"wall": wall, "files": files, "inodes": _INODES, "resources": resources}


def _converse(
    process: subprocess.Popen[bytes],
    report: IO[bytes],
    stdin: bytes,
    limits: Limits,
    streams: _Streams,
) -> None:
    """Write the input and read all outputs until they end; kill a program that writes too much."""
    assert process.stdin and process.stdout and process.stderr
    most = limits.output_kb * 1024
    deadline = time.monotonic() + limits.wall_seconds + _START_SECONDS
    with selectors.DefaultSelector() as selector:
        for file, into in (
            (process.stdout, streams.stdout),
            (process.stderr, streams.stderr),
            (report, streams.report),
        ):
            selector.register(file, selectors.EVENT_READ, into)
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE, memoryview(stdin))
        while any(key.events == selectors.EVENT_READ for key in selector.get_map().values()):
            ready = selector.select(deadline - time.monotonic())
            if not ready:
                raise MachineError("a sandbox did not end at its wall limit")
            for key, _ in ready:
                if key.events == selectors.EVENT_WRITE:
                    _feed(selector, key)
                elif not _drain(selector, key, most) and not streams.exceeded:
                    streams.exceeded = True
                    _kill(process)


def _feed(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    left: memoryview = key.data
    try:
        left = left[os.write(key.fd, left[:65536]) :]
    except BrokenPipeError:  # a program need not read its input
        left = left[:0]
    if left:
        selector.modify(key.fileobj, selectors.EVENT_WRITE, left)
    else:
        _close(selector, key)


def _drain(selector: selectors.BaseSelector, key: selectors.SelectorKey, most: int) -> bool:
    """Read what a stream holds; return False if it has exceeded its limit."""
    block = os.read(key.fd, 65536)
    if not block:
        _close(selector, key)
    into: bytearray = key.data
    into += block[: most - len(into)]
    return len(into) < most or not block


def _close(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    selector.unregister(key.fileobj)
    file: Any = key.fileobj
    file.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a sandbox; the kernel ends all processes in it with the first one."""
    # Not yet waited for, so the number cannot belong to another process.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _outcome(streams: _Streams, limits: Limits) -> Outcome:
    """Interpret the report of a sandbox.

    Raises:
        MachineError: the sandbox could not be built.
    """
    stdout, stderr = (
        bytes(each).decode(errors="replace") for each in (streams.stdout, streams.stderr)
    )
    report: dict[str, Any] = {}
    for line in streams.report.splitlines():
        report |= json.loads(line)
    if "error" in report or "started" not in report:
        raise MachineError(report.get("error") or _last_line(stderr) or "it ended at once")
    # Without an end, the whole sandbox was killed.
    exit_code, cpu = report.get("exit", -signal.SIGKILL), report.get("cpu", 0.0)
    reason: Reason = "failed"
    if streams.exceeded:
        reason = "output"
    elif report.get("late"):
        reason = "time"
    elif exit_code == -signal.SIGXCPU or (exit_code < 0 and cpu >= limits.cpu_seconds):
        reason = "cpu"
    elif exit_code < 0:
        reason = "killed"
    elif exit_code == 0:
        reason = "ok"
    elif _last_line(stderr).startswith("MemoryError"):
        reason = "memory"
    return Outcome(
        reason=reason,
        exit_code=exit_code,
        stdout=stdout,
        stderr=stderr,
        seconds=report.get("seconds", 0.0),
        cpu_seconds=cpu,
    )
