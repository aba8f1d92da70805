"""Python processes without the start: forked from a server that has imported the slow libraries.

Importing torch, transformers, DeepSpeed and mteb takes 6 to 10 seconds of CPU: most of the time
of a command on a tiny model. `Process` and `run` take what follows `python` on a command line:

    forks.run(["pipeline/train.py", "config.yaml"], folder=ROOT)
    forks.run(["-m", "pipeline.cli", "report", "config.yaml"], folder=ROOT, environment={...})

The first call starts the server (this module as a program), which forks a child for each request.
A child has its own environment, folder, arguments, streams and process group, runs the program as
`__main__` and ends as Python does, with its exit handlers. The server has no thread and no process
group, and has read no data. The workers of one pytest-xdist run share a server. It ends when the
last of them does; children end when the worker that asked for them does.

A process is really started where a fork would not be the same:
  - variables that libraries read while they are imported differ from the server's;
  - torch sees a GPU, which a forked child cannot use once its parent has looked at it;
  - `DIFFEMBED_TEST_FORKS=0`.
Tests of launchers, signals, imports and installation start their processes themselves.

Jobs on a Slurm of the tests find `python` and `diffembed` on the PATH of `program_path`: small
processes that hand on signals and their end (`forked_python.py`).

`tests/damage` and `tests/goldens` have imported the libraries in their own process: they fork a
`Child` of it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import multiprocessing.util
import os
import pkgutil
import random
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
# The environment of every process of a test, forked or not. A machine may have packages in folders
# of PYTHONPATH alone.
_PATHS = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(dict.fromkeys(_PATHS)),
}
_LIBRARIES = (
    *("torch", "torch.distributed", "transformers", "deepspeed", "peft", "datasets"),
    *("sentence_transformers", "pyarrow.parquet", "pydantic", "typer", "mteb", "fsspec", "yaml"),
    *("matplotlib.pyplot", "hypothesis", "pytest", "bm25s"),
    # Imported by DeepSpeed with its first engine, and with it torch's compiler.
    "deepspeed.runtime.zero.muon.original_muon",
    # Imported by name as a model is built or read.
    *("transformers.models.qwen2.modeling_qwen2", "transformers.models.auto.modeling_auto"),
    "transformers.models.auto.tokenization_auto",
)
# Read by libraries while they are imported, or by the interpreter and the linker as they start.
_READ_AT_START = (
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "MTEB_", "TOKENIZERS_", "DS_", "MPL"),
    *(
        "OMP_",
        "OPENBLAS_",
        "MKL_",
        "KMP_",
        "GOMP_",
        "CUDA_",
        "NVIDIA_",
        "NCCL_",
        "TORCH",
        "PYTORCH_",
    ),
    *("PYTHON", "LD_", "LC_", "LANG", "XDG_", "HOME"),
)
# Set in a child by `_take_environment`, or of no effect on a process that has started.
_SET_AFTER_START = (
    *("HF_DATASETS_CACHE", "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "TORCHELASTIC_RUN_ID"),
    "HF_DATASETS_OFFLINE",  # follows from HF_HUB_OFFLINE
    "TOKENIZERS_PARALLELISM",  # read whenever texts are tokenised
    "DS_ACCELERATOR",  # chosen by the trainer; without a GPU there is only one
    # By libraries, as they are imported.
    *("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"),
    *("TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK"),
    # By what a rank without a GPU never calls.
    *("TORCH_EXTENSIONS_DIR", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_DEBUG"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
)
# Names the server of a test to programs of its jobs.
_SERVER = "DIFFEMBED_TEST_SERVER"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_AT_IMPORT = dict(os.environ)  # before any test has changed it
cpu_seconds = 0.0  # of processes that the server forked for this process and that have ended
differing: list[str] = []  # variables because of which processes were started, not forked


class Process:
    """A Python process, forked or started; as far as it goes, `subprocess.Popen`.

    Args:
        words: what follows `python`: a script, `-m` and a module, or `-c` and code; then arguments.
        folder: its working directory.
        environment: variables in addition to this process's and `ENVIRONMENT`.
        stdout: an open file for what it prints.
        stderr: an open file for its errors; `stdout` by default.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        *,
        folder: Path,
        stdout: IO[str],
        stderr: IO[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        words = [str(word) for word in words]
        whole = {**os.environ, **ENVIRONMENT, **(environment or {})}
        self.returncode: int | None = None
        self._started: subprocess.Popen[bytes] | None = None
        streams = (stdout, stderr or stdout)
        server = _server_for(whole)
        if server is None:
            self._started = subprocess.Popen(
                [sys.executable, *words],
                cwd=folder,
                env=whole,
                stdin=subprocess.DEVNULL,
                stdout=streams[0],
                stderr=streams[1],
                start_new_session=True,
            )
            self.pid = self._started.pid
            return
        self._status, status = os.pipe()
        request = {"words": words, "folder": str(folder), "environment": whole}
        server.send(request, [*(stream.fileno() for stream in streams), status])
        os.close(status)
        self.pid = self._read_number() or 0

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        return self._end(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code as soon as it ends.

        Raises:
            subprocess.TimeoutExpired: it runs longer.
        """
        code = self._end(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("python", timeout or 0)
        return code

    def kill(self) -> None:
        """Kill it with the processes of its group."""
        if self.poll() is None:
            _kill_group(self.pid)

    def _end(self, timeout: float | None) -> int | None:
        if self._started is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.returncode = self._started.wait(timeout)
        elif self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            global cpu_seconds
            code = self._read_number()
            # The server is gone, and its children with it.
            self.returncode = -signal.SIGKILL if code is None else code
            cpu_seconds += (self._read_number() or 0) / 1000
            os.close(self._status)
        return self.returncode

    def _read_number(self) -> int | None:
        line = b""
        while (byte := os.read(self._status, 1)) not in (b"", b"\n"):
            line += byte
        return int(line) if line else None


def run(
    words: Sequence[str | Path],
    *,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """Run a Python process to its end, whatever its exit code; kill it after so many seconds.

    Raises:
        subprocess.TimeoutExpired: it was killed.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = Process(
            words, folder=folder, environment=environment, stdout=stdout, stderr=stderr
        )
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        texts = []
        for stream in (stdout, stderr):
            stream.seek(0)
            texts.append(stream.read())
    return subprocess.CompletedProcess([str(word) for word in words], code, *texts)


# --- the server, seen from the tests -----------------------------------------------------------


class _Server:
    """The socket by which the server is asked; starts the server if no other worker has."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        # A name outside the file system, free again when its last socket is closed.
        self.run = os.environ.get(_SERVER) or os.environ.get(
            "PYTEST_XDIST_TESTRUNUID", str(os.getpid())
        )
        address = f"\0diffembed-forks-{self.run}"
        greeting = b""
        for _ in range(50):
            started = _start_server_once(address, environment)
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with contextlib.suppress(ConnectionError):
                self._socket.connect(address)
                greeting = self._socket.recv(2**20)
            if greeting:
                break
            assert not started, "the server ended, see: python -m tests.forks"
            time.sleep(0.1)  # a server that another worker has started is ending
        self.read_at_start: dict[str, str] = json.loads(greeting)

    def send(self, request: Mapping[str, object], descriptors: Sequence[int]) -> None:
        socket.send_fds(self._socket, [json.dumps(request).encode()], list(descriptors))

    def stop(self) -> None:
        """Leave the server, which ends the children of this process, and itself after the last."""
        self._socket.close()


def _start_server_once(address: str, environment: Mapping[str, str]) -> bool:
    """Start the server at an address; return false if another worker has done so."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        try:
            listener.bind(address)
        except OSError:
            return False
        listener.listen(128)
        subprocess.Popen(
            [sys.executable, "-m", "tests.forks", str(listener.fileno())],
            cwd=ROOT,
            env=dict(environment),
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return True


_server: _Server | None = None


def _server_for(environment: Mapping[str, str]) -> _Server | None:
    """Return the server if its children would be what a process of this environment is."""
    global _server
    if environment.get("DIFFEMBED_TEST_FORKS") == "0":
        return None
    if _server is None:
        if _SERVER not in environment:  # the test that has set it has looked
            import torch

            if torch.cuda.is_available():
                return None
        _server = _Server({**_AT_IMPORT, **ENVIRONMENT})
    ours, theirs = _server.read_at_start, _read_at_start(environment)
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    differing.extend(names)
    return None if names else _server


def program_path(folder: Path) -> str:
    """Return a PATH for jobs on which `python` and `diffembed` are forked, if they can be.

    Args:
        folder: where the two programs are written.
    """
    server = _server_for({**os.environ, **ENVIRONMENT})
    if server is None:
        return os.environ["PATH"]
    folder.mkdir()
    variables = {_SERVER: server.run}
    if (hidden := server.read_at_start.get("CUDA_VISIBLE_DEVICES")) is not None:
        variables["CUDA_VISIBLE_DEVICES"] = hidden  # Slurm unsets it in jobs without a GPU
    exported = " ".join(f"{name}={value}" for name, value in variables.items())
    for name, words in (("python", ""), ("diffembed", "-m pipeline.cli")):
        program = folder / name
        program.write_text(
            f"#!/bin/sh\nexport {exported}\n"
            f'exec {sys.executable} {Path(__file__).with_name("forked_python.py")} {words} "$@"\n'
        )
        program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def would_fork(environment: Mapping[str, str]) -> bool:
    """Return True if a process of this environment would be forked."""
    return _server_for({**environment, **ENVIRONMENT}) is not None


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_AT_START) and name not in _SET_AFTER_START
    }


def stop_server() -> None:
    """Leave the server; it ends what it has forked for this process, and itself after the last."""
    global _server
    if _server is not None:
        _server.stop()
        _server = None


# --- forks -------------------------------------------------------------------------------------


def import_libraries() -> None:
    """Import what commands import, and this project's modules."""
    for name in _LIBRARIES:
        importlib.import_module(name)
    for package in ("pipeline", "ReasonAug"):
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("qwen2")  # keeps its table of all models
    # A process that has started MPI must not fork.
    assert "mpi4py.MPI" not in sys.modules


def fork(work: Callable[[], object], *, folder: Path, stdout: int, stderr: int) -> int:
    """Call `work` in a child, in `folder`, with open files as its streams; return its process id.

    The child leads a process group, ends with the exit code of Python's rules and without the exit
    handlers of this process, and is killed if this process ends first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
            if os.getppid() == parent:
                os.dup2(stdout, 1)
                os.dup2(stderr, 2)
                for stream in {stdout, stderr} - {1, 2}:
                    os.close(stream)
                os.chdir(folder)
                code = _exit_code(work)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


class Child:
    """A forked child of this process, with files for what it prints.

    Args:
        work: what it calls; its exit code is what `sys.exit` is called with.
        folder: its working directory.
        stdout: a file, created or emptied.
        stderr: another one.
    """

    def __init__(
        self, work: Callable[[], object], *, folder: Path, stdout: Path, stderr: Path
    ) -> None:
        self._files = (stdout, stderr)
        self._code: int | None = None
        with stdout.open("w") as out, stderr.open("w") as err:
            self.pid = fork(work, folder=folder, stdout=out.fileno(), stderr=err.fileno())

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        if self._code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if ended else None
        return self._code

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None if it was killed after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                return None
            time.sleep(0.01)
        return self._code

    def kill(self) -> None:
        """Kill what is left of it and of the processes of its group."""
        _kill_group(self.pid)

    def read(self) -> tuple[str, str]:
        """Return what it has printed, and its errors."""
        out, err = (file.read_bytes().decode(errors="replace") for file in self._files)
        return out, err


def _kill_group(leader: int) -> None:
    """Kill a process that leads a group, or is about to, and the group."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(leader, signal.SIGKILL)


def _exit_code(work: Callable[[], object]) -> int:
    """Call `work`, wait for threads and workers as Python does at its end; what it exits with."""
    code: object = 0
    try:
        work()
    except SystemExit as end:
        code = 0 if end.code is None else end.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code) & 0xFF  # type: ignore[call-overload]


@dataclasses.dataclass(frozen=True)
class _Forked:
    pid: int
    status: int  # the pipe for its process id, exit code and CPU time
    client: socket.socket


def _serve(listener: socket.socket, read_at_start: Mapping[str, str]) -> None:
    """Fork a child for each request, until the last client has left."""
    greeting = json.dumps(read_at_start).encode()
    children: dict[int, _Forked] = {}  # by pidfd
    clients: set[socket.socket] = set()
    with selectors.DefaultSelector() as selector:

        def leave() -> None:
            """Close what a child has of the server's."""
            selector.close()
            for each in (listener, *clients):
                each.close()
            for fd, child in children.items():
                os.close(fd)
                os.close(child.status)

        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    with contextlib.suppress(ConnectionError):  # killed; read as one that left
                        client.send(greeting)
                    clients.add(client)
                    selector.register(client, selectors.EVENT_READ)
                elif key.fd in children:
                    selector.unregister(key.fd)
                    _report_end(key.fd, children.pop(key.fd))
                elif forked := _answer(key.fileobj, leave):  # type: ignore[arg-type]
                    fd = os.pidfd_open(forked.pid)
                    children[fd] = forked
                    selector.register(fd, selectors.EVENT_READ)
                else:
                    for child in children.values():
                        if child.client is key.fileobj:
                            _kill_group(child.pid)
                    selector.unregister(key.fileobj)
                    clients.discard(key.fileobj)  # type: ignore[arg-type]
                    key.fileobj.close()  # type: ignore[union-attr]
                    if not clients:
                        return


def _answer(client: socket.socket, leave: Callable[[], None]) -> _Forked | None:
    """Fork what a client asks for; None if it has left.

    A client may be killed at any moment, and this server serves many others.
    """
    try:
        message, descriptors, *_ = socket.recv_fds(client, 2**20, 3)
    except ConnectionError:  # it was killed before it had read the greeting
        return None
    if not message:
        return None
    request = json.loads(message)
    stdout, stderr, status = descriptors

    def work() -> None:
        leave()
        os.close(status)
        _become(request["words"], request["environment"])

    pid = fork(work, folder=Path(request["folder"]), stdout=stdout, stderr=stderr)
    os.close(stdout)
    os.close(stderr)
    # Without a reader the child is killed, when the client's end of the socket is read.
    with contextlib.suppress(BrokenPipeError):
        os.write(status, b"%d\n" % pid)
    return _Forked(pid, status, client)


def _report_end(fd: int, child: _Forked) -> None:
    """Write exit code and milliseconds of CPU to the pipe of a child that has ended."""
    _, code, usage = os.wait4(child.pid, 0)
    milliseconds = 1000 * (usage.ru_utime + usage.ru_stime)
    with contextlib.suppress(BrokenPipeError):  # the test has forgotten it
        os.write(child.status, b"%d\n%d\n" % (os.waitstatus_to_exitcode(code), milliseconds))
    os.close(fd)
    os.close(child.status)


def _become(words: list[str], environment: dict[str, str]) -> None:
    """Run a program as a process of this environment, with its exit handlers."""
    _take_environment(environment)
    try:
        run_program(words)
    except Exception:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        raise SystemExit(1) from None
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def run_program(words: Sequence[str]) -> None:
    """Run what follows `python` on a command line as `__main__`."""
    # Its second execution, as __main__, is meant.
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
    if words[0] == "-m":
        sys.argv = list(words[1:])
        sys.path[0] = str(Path.cwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = list(words)
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def _take_environment(environment: dict[str, str]) -> None:
    """Set the environment, and what modules have kept from the one at their import."""
    import datasets
    import numpy as np
    import torch

    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    # Anything else would be the same in all children, and mteb seeds all three at its import.
    random.seed()
    np.random.seed()
    torch.seed()
    if cache := environment.get("HF_DATASETS_CACHE"):
        datasets.config.HF_DATASETS_CACHE = Path(cache)


if __name__ == "__main__":
    # Children look at their parent's modules, so the server is not `__main__`.
    from tests import forks

    read_at_start = forks._read_at_start(os.environ)
    forks.import_libraries()
    gc.collect()
    gc.freeze()  # shared with children: a collection of theirs copies no page
    if sys.argv[1:]:  # without a socket, the imports alone are tried
        forks._serve(socket.socket(fileno=int(sys.argv[1])), read_at_start)
