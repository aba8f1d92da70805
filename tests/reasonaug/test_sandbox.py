"""Programs of strangers reach nothing and cost no more than their limits."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from ReasonAug import sandbox
from ReasonAug.sandbox import Limits, Outcome, run_program
from tests.support import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
SMALL = Limits(cpu_seconds=5, wall_seconds=60, memory_mb=256, files_mb=2, output_kb=32, threads=4)


def why_refused() -> str:
    try:
        sandbox.require_sandbox()
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(params=["namespaces", "bubblewrap"], autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with both kinds of sandbox, where they exist."""
    name = str(request.param)
    if name == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed (Debian: apt-get install bubblewrap)")
    if refusal := why_refused():
        pytest.skip(refusal)
    monkeypatch.setattr(sandbox, "require_sandbox", lambda: name)
    return name


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    files = set(Path(os.environ.get("TMPDIR", "/tmp")).glob("*"))
    yield
    deadline = time.monotonic() + PATIENCE
    while left := [*sandbox_processes()]:
        assert time.monotonic() < deadline, f"processes {left} are left"
        time.sleep(0.05)
    assert set(Path(os.environ.get("TMPDIR", "/tmp")).glob("*")) <= files


def sandbox_processes() -> Iterator[int]:
    """Processes of this file's sandboxes, which have its limits on their command line."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and f'"files": {SMALL.files_mb * 2**20}'.encode() in words:
            yield int(process.name)


def attempts(*sources: str) -> str:
    """A program that tries each statement and prints the ones that succeeded."""
    return f"""
import ctypes, os, pathlib, signal, socket, subprocess
libc = ctypes.CDLL(None, use_errno=True)
def call(number_or_name, *arguments):
    if getattr(libc, number_or_name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), number_or_name)
for source in {sources!r}:
    try:
        exec(source)
    except Exception as error:
        continue
    print(source)
"""


def run(source: str, *, stdin: str = "", limits: Limits = SMALL) -> Outcome:
    return run_program(source, stdin=stdin, limits=limits)


def test_a_program_computes_from_its_input_and_ends_with_its_code() -> None:
    done = run("import sys\nprint(sum(map(int, sys.stdin)))\nsys.exit(3)", stdin="4\n5\n")

    assert (done.reason, done.exit_code, done.stdout, done.stderr) == ("failed", 3, "9\n", "")


def test_a_traceback_names_the_line_and_no_folder_of_the_host() -> None:
    done = run("x = 1\n1 / 0")

    assert done.reason == "failed"
    assert 'File "/work/main.py", line 2' in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert str(Path.home()) not in done.stderr


def test_the_order_of_sets_is_the_same_in_every_run() -> None:
    source = "print({str(i) for i in range(20)})"

    assert run(source).stdout == run(source).stdout != ""


def test_no_file_or_variable_of_the_host_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "planted-key")
    home, own = Path.home(), Path(__file__)

    done = run(
        "import os\nprint(dict(os.environ))\n"
        + attempts(
            f"os.listdir({str(home)!r})",
            f"open({str(own)!r})",
            f"os.listdir({str(ROOT)!r})",
            *(f"os.listdir('/{name}')" for name in ("etc", "proc", "sys", "tmp", "home", "var")),
            "open('/etc/passwd')",
            "open('/proc/1/environ')",
            "open('/proc/self/environ')",
            "open('/dev/mem')",
            "open('/dev/tty')",
            "os.listdir('/dev/shm')",
            "import numpy",
            "import pipeline",
        )
    )

    variables, _, succeeded = done.stdout.partition("\n")
    assert succeeded == ""
    assert "planted-key" not in done.stdout
    assert "'HOME': '/work'" in variables


def test_links_lead_nowhere_and_nothing_outside_the_folder_can_be_written() -> None:
    targets = ("/x", "/usr/x", "/python/lib/x", "/dev/x", "/work/../x", "/python/bin/python3")
    done = run(
        attempts(
            "os.symlink('/etc/passwd', 'link'); open('link')",
            "os.symlink('../../../../root', 'up'); os.listdir('up')",
            "os.link('/python/bin/python3', 'hard')",
            *(f"open({path!r}, 'wb')" for path in targets),
            "os.mknod('disk', 0o60600, os.makedev(254, 0)); open('disk', 'rb')",
            "os.chmod('/usr', 0o777)",
            "os.chown('main.py', 0, 0)",
            "open('own', 'w').write('x')",
        )
    )

    assert done.stdout == "open('own', 'w').write('x')\n"


def test_no_socket_can_be_opened() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run(
            attempts(
                f"socket.create_connection(('127.0.0.1', {port}), timeout=1)",
                *(
                    f"socket.socket(socket.{family}, socket.{kind})"
                    for family in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_VSOCK")
                    for kind in ("SOCK_STREAM", "SOCK_DGRAM", "SOCK_RAW")
                ),
                "socket.socket(socket.AF_UNIX).connect('\\0abstract')",
                "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
            )
        )
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()

    assert done.stdout == ""


def test_no_right_can_be_gained_and_no_other_process_be_reached() -> None:
    done = run(
        attempts(
            "os.setuid(0)",
            "os.setgroups([0])",
            *(f"call('unshare', {flag})" for flag in (0x10000000, 0x20000, 0x40000000)),
            "call('mount', b'tmpfs', b'/work', b'tmpfs', 0, None)",
            "call('umount2', b'/work', 2)",
            "os.chroot('/work')",
            "call('pivot_root', b'/work', b'/work')",
            "call('ptrace', 0, 0, 0, 0)",
            "call('ptrace', 16, 1, 0, 0)",
            "call('prctl', 22, 0)",
            "call('keyctl', 0) if hasattr(libc, 'keyctl') else call('syscall', 250, 0, -3, 0)",
            "call('sethostname', b'x', 1)",
            "os.nice(-5)",
            "version, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(); "
            "call('capget', version, rights); assert any(rights)",
        )
    )

    assert done.stdout == ""


def test_killing_everything_in_sight_ends_only_the_program_itself() -> None:
    done = run(
        "import os, signal\n"
        "for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGINT, signal.SIGTERM):\n"
        "    for process in (1, -1, os.getppid()):\n"
        "        try: os.kill(process, number)\n"
        "        except OSError: pass\n"
        "print('alive', os.getppid(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)"
    )

    assert (done.reason, done.exit_code, done.stdout) == ("killed", -15, "alive 1\n")


def test_no_process_can_be_started_so_none_survives() -> None:
    done = run(
        attempts(
            "os.fork()",
            "os.forkpty()",
            "os.posix_spawn('/python/bin/python3', ['python3', '-c', ''], {})",
            "subprocess.run(['/python/bin/python3', '-c', ''])",
            "assert os.system('true') == 0",
            "call('vfork')",
            "import multiprocessing; multiprocessing.Process(target=print).start()",
        )
        + "\nwhile True:\n    try: os.fork()\n    except OSError: break\nprint('no bomb')"
    )

    assert done.stdout == "no bomb\n"


def test_threads_work_up_to_their_limit() -> None:
    done = run(
        "import threading\nstop = threading.Event()\nstarted = 0\n"
        "threading.stack_size(65536)\n"
        "try:\n"
        "    for _ in range(1000):\n"
        "        threading.Thread(target=stop.wait).start(); started += 1\n"
        "except RuntimeError: pass\n"
        "stop.set()\nprint(started)"
    )

    # Root's threads are not counted; bubblewrap is not chosen for root.
    assert done.exit_code == 0
    if sandbox.require_sandbox() == "namespaces" or os.geteuid():
        assert SMALL.threads <= int(done.stdout) <= SMALL.threads + 1


@pytest.mark.parametrize(
    "source",
    [
        "x = bytearray(10 * 2**30)",
        "x = []\nwhile True: x.append(bytes(2**20))",
        "import mmap\nx = [mmap.mmap(-1, 2**26) for _ in range(1000)]\nraise MemoryError",
    ],
)
def test_memory_ends_at_its_limit(source: str) -> None:
    # mmap's own error is an OSError.
    done = run(
        f"try:\n    exec({source!r})\nexcept OSError as error:\n    raise MemoryError from error"
    )

    assert (done.reason, done.exit_code) == ("memory", 1)


def test_memory_that_no_limit_counts_is_refused() -> None:
    done = run(
        attempts(
            "os.memfd_create('x')",
            "call('shmget', 0, 2**20, 0o1600)",
            "call('msgget', 0, 0o1600)",
        )
    )

    assert done.stdout == ""


def test_the_disk_cannot_be_filled() -> None:
    done = run(
        "import os\n"
        "def fill():\n"
        "    for number in range(100000):\n"
        "        with open(f'f{number}', 'wb') as file:\n"
        "            for _ in range(8): file.write(bytes(2**17)); file.flush()\n"
        "def names():\n"
        "    for number in range(10**6): open(f'n{number}', 'w').close()\n"
        "def whole():\n"
        "    os.posix_fallocate(os.open('big', os.O_CREAT | os.O_RDWR), 0, 2**40)\n"
        "for attack in (whole, fill, names):\n"
        "    try: attack()\n"
        "    except OSError as error: print(attack.__name__, error.strerror)\n"
        "    for name in os.listdir('.'):\n"
        "        if name != 'main.py': os.unlink(name)\n"
    )

    assert done.stdout.splitlines() == [
        "whole File too large",
        "fill No space left on device",
        "names No space left on device",
    ]


def test_a_program_that_sleeps_ends_at_its_wall_limit() -> None:
    limits = Limits(wall_seconds=5, files_mb=SMALL.files_mb)
    done = run(
        "import signal, time\n"
        "for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "print('begin', flush=True)\ntime.sleep(3600)",
        limits=limits,
    )

    assert (done.reason, done.exit_code, done.stdout) == ("time", -9, "begin\n")
    assert done.seconds >= 5


@pytest.mark.parametrize("head", ["", "import signal\nsignal.signal(signal.SIGXCPU, print)\n"])
def test_a_program_that_computes_forever_ends_at_its_cpu_limit(head: str) -> None:
    done = run(head + "while True: pass", limits=Limits(cpu_seconds=1, wall_seconds=PATIENCE))

    assert done.reason == "cpu"
    # The kernel may count a tenth less than it limits.
    assert 0.5 <= done.cpu_seconds <= 3


@pytest.mark.parametrize("stream", [1, 2])
def test_output_without_end_is_cut_and_ends_the_program(stream: int) -> None:
    done = run(f"import os\nwhile True: os.write({stream}, b'x' * 65536)")

    assert done.reason == "output"
    assert len(done.stdout + done.stderr) == SMALL.output_kb * 1024


def test_a_crash_in_native_code_is_an_outcome() -> None:
    done = run("import ctypes\nctypes.string_at(0)")

    assert (done.reason, done.exit_code) == ("killed", -signal.SIGSEGV)


def test_input_that_is_not_read_and_text_that_is_no_utf8_are_accepted() -> None:
    # Half of a surrogate pair, which JSON can hold.
    done = run("import os\nos.write(1, b'\\xff\\n')", stdin="\ud800" * 2**18)

    assert (done.reason, done.stdout) == ("ok", "\ufffd\n")
    assert run("print('\ud800')").reason == "failed"


def test_the_least_memory_is_enough_for_python() -> None:
    assert run("print(1)", limits=Limits(memory_mb=64, files_mb=SMALL.files_mb)).stdout == "1\n"


def test_named_packages_can_be_imported_and_no_others() -> None:
    done = run_program(
        "import numpy\nprint(numpy.arange(4).sum())\nimport scipy",
        limits=Limits(files_mb=SMALL.files_mb, memory_mb=1024),
        packages=("numpy",),
    )

    assert done.stdout == "6\n"
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'scipy'\n")
    with pytest.raises(UserError, match="packages: 'no_such_package'"):
        run_program("", packages=("no_such_package",))


def test_nothing_survives_the_death_of_this_process() -> None:
    """The fixture waits until no process is left."""
    child = os.fork()
    if child == 0:
        run("import time\ntime.sleep(3600)", limits=Limits(wall_seconds=3600, files_mb=2))
        os._exit(1)
    deadline = time.monotonic() + PATIENCE
    while len([*sandbox_processes()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_machine_without_namespaces_is_refused_in_one_line(
    engine: str, refused_in: Callable[[], str]
) -> None:
    if engine == "bubblewrap":
        pytest.skip("as with namespaces")

    assert refused_in() == (
        "UserError: this machine cannot run programs in a sandbox (namespaces: no new namespaces: "
        "user.max_user_namespaces or another limit of namespaces is reached) | fix: install "
        "bubblewrap and libseccomp2, or allow user namespaces (sysctl user.max_user_namespaces), "
        "or leave programs unverified with `execution: off`"
    )


@pytest.fixture
def refused_in() -> Callable[[], str]:
    def refused_in() -> str:
        """Return what a command prints where the kernel allows no more namespaces."""
        code = (
            "from pipeline.errors import errors_end_the_process as e\n"
            "from ReasonAug.sandbox import run_program\n"
            "with e(): run_program('')"
        )
        forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
        words = ["unshare", "--user", "--map-root-user", "bash", "-c", forbid, "bash"]
        done = subprocess.run(
            [*words, sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 2
        return done.stderr.strip()

    return refused_in
