"""Be the first process of a sandbox: build its view of the host, run a program, report its end.

    sandbox.py ──> outer: namespaces ──fork──> first: mounts, wall limit ──fork──> program
                   (or bubblewrap)                                        limits, filter, exec

`sandbox.py` passes the text of this file to `python -c`, so that no path of the host is needed
inside; only the standard library can be imported. The request is JSON in the first argument. The
report is lines of JSON on a pipe: `{"started": true}`, then the end; or `{"error": ...}` alone, if
the sandbox could not be built. If the first process ends, the kernel kills all others with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import sys
import time
from typing import Any, NoReturn

NOBODY = 65534
WORK = "/work"
PYTHON = "/python/bin/python3"
_MAIN = f"{WORK}/main.py"

# linux/sched.h
_CLONE_THREAD = 0x00010000
_NEW = {
    **{"user": 0x10000000, "mount": 0x00020000, "pid": 0x20000000, "network": 0x40000000},
    **{"ipc": 0x08000000, "host name": 0x04000000, "cgroup": 0x02000000},
}
# linux/mount.h, and the same flags as statvfs reports them where they differ
_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT, _BIND = 1, 2, 4, 32, 4096
_RECURSIVE, _PRIVATE = 16384, 1 << 18
_SAME_FLAGS, _STATVFS_RELATIME, _RELATIME = 1 | 2 | 4 | 8 | 1024 | 2048, 4096, 1 << 21
_DETACH = 2
# linux/prctl.h, linux/capability.h
_DIE_WITH_PARENT, _CAPABILITIES = 1, 0x20080522

# Refused to programs. Child processes: limits of CPU and memory hold for each process, so that one
# process is what makes them hold for a program. Memory that no limit counts. Sockets: some kinds
# (vsock) ignore namespaces. Doors into the kernel that a solution to a problem never needs.
_REFUSED = (
    "fork", "vfork", "memfd_create", "memfd_secret", "shmget", "shmat", "shmctl", "shmdt",
    "msgget", "msgsnd", "msgrcv", "msgctl", "semget", "semop", "semctl", "semtimedop",
    "mq_open", "socket", "connect", "bind", "listen", "accept", "accept4", "ptrace",
    "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp", "keyctl", "add_key",
    "request_key", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter",
    "io_uring_register", "unshare", "setns", "mount", "umount2", "pivot_root", "chroot",
    "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr",
    "swapon", "swapoff", "reboot", "init_module", "finit_module", "delete_module", "kexec_load",
    "kexec_file_load", "open_by_handle_at", "name_to_handle_at", "quotactl", "quotactl_fd",
    "syslog", "acct", "settimeofday", "clock_settime", "adjtimex", "clock_adjtime",
    "personality", "fanotify_init",
)  # fmt: skip
_ALLOW, _ERRNO, _MASKED_EQUAL = 0x7FFF0000, 0x00050000, 7  # seccomp.h
_EPERM, _ENOSYS = 1, 38

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Build the sandbox that the request describes, and run the program in it."""
    request = json.loads(sys.argv[1])
    report = request["report"]
    os.set_inheritable(report, False)
    try:
        with os.fdopen(request["source"], "rb") as file:
            source = file.read()
        if request["parent"]:
            _die_with(request["parent"])
            _enter_namespaces()
            _first_process(report)
            _build_view(request)
        # Python's own handler would let the program interrupt this process.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _mount_folders(request)
        _run(request, source, report)
    except Exception as error:
        _tell(report, error=f"{error}")
    os._exit(0)


def _tell(report: int, **line: Any) -> None:
    # A reader that has gone needs no report.
    with contextlib.suppress(BrokenPipeError):
        os.write(report, json.dumps(line).encode() + b"\n")


def _call(what: str, name: str, *arguments: Any) -> None:
    """Call a function of the C library, which returns -1 if it fails."""
    if getattr(_libc, name)(*arguments) == -1:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends."""
    _call("parent-death signal", "prctl", _DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if parent and os.getppid() != parent:
        os._exit(0)


# --- namespaces ------------------------------------------------------------------------------


def _enter_namespaces() -> None:
    """Enter new namespaces as user 0 of them if this is root, otherwise as `NOBODY`."""
    user, group = os.geteuid(), os.getegid()
    everything = sum(_NEW.values())
    if user == 0:
        # Limits on the number of threads do not hold for root: the program gets another user, and
        # only a process outside may map two of them.
        _map_from_outside((f"0 0 1\n{NOBODY} {NOBODY} 1", f"{NOBODY} 0 1"), everything)
        return
    _unshare(everything)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{NOBODY} {user} 1")
    _write("/proc/self/gid_map", f"{NOBODY} {group} 1")


def _map_from_outside(maps: tuple[str, ...], flags: int) -> None:
    """Enter namespaces while a process outside writes the first of these maps that is allowed.

    The second is for root of a container that has no other user; the limits hold for that root.
    """
    ready, reached = os.pipe()
    process = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(reached)
        if os.read(ready, 1):  # nothing, if `unshare` failed
            for text in maps:
                with contextlib.suppress(OSError):
                    _write(f"/proc/{process}/uid_map", text)
                    _write(f"/proc/{process}/gid_map", text)
                    os._exit(0)
        os._exit(1)
    os.close(ready)
    try:
        _unshare(flags)
        os.write(reached, b"1")
    finally:
        os.close(reached)
        status = os.waitpid(helper, 0)[1]
    if status:
        raise OSError(f"user {NOBODY} cannot be mapped into a namespace")


def _unshare(flags: int) -> None:
    if _libc.unshare(flags) == -1:
        number = ctypes.get_errno()
        # "No space left on device" would send the reader to the disk.
        limit = "user.max_user_namespaces or another limit of namespaces is reached"
        reason = limit if number == errno.ENOSPC else os.strerror(number)
        raise OSError(f"no new namespaces: {reason}")


def _first_process(report: int) -> None:
    """Return as process 1 of the namespaces; the outer process waits for it and ends."""
    alive, outer = os.pipe()
    child = os.fork()
    if child:
        os.close(report)
        os.close(alive)
        # Otherwise the reader would wait for this process to close them.
        for stream in range(3):
            os.close(stream)
        os.waitpid(child, 0)
        os._exit(0)
    os.close(outer)
    _die_with(0)
    # The parent may have ended before the signal was asked for.
    os.set_blocking(alive, False)
    with contextlib.suppress(BlockingIOError):
        os.read(alive, 1)
        os._exit(0)


# --- view ------------------------------------------------------------------------------------


def _build_view(request: dict[str, Any]) -> None:
    """Replace all mounts by an empty root with the listed parts of the host, read-only."""
    _call("host name", "sethostname", b"sandbox", 7)
    # Nothing that is mounted from here on reaches the host.
    _mount("none", "/", _RECURSIVE | _PRIVATE)
    # Below any folder: what it hides is seen again below /old.
    _mount("tmpfs", "/usr", _NO_SUID | _NO_DEVICES, "tmpfs", "size=1m,mode=755")
    os.mkdir("/usr/old")  # noqa: PTH102 -- few imports: this runs once per program
    _call("new root", "pivot_root", b"/usr", b"/usr/old")
    os.chdir("/")
    for source, target in request["binds"]:
        _bind(f"/old{source}", target, devices=False)
    for device in request["devices"]:
        _bind(f"/old{device}", device, devices=True)
    os.mkdir(WORK)  # noqa: PTH102
    _call("old root", "umount2", b"/old", _DETACH)
    os.rmdir("/old")  # noqa: PTH106
    _mount("none", "/", _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEVICES)


def _mount_folders(request: dict[str, Any]) -> None:
    """Mount the program's own folder, in memory, and an empty one over each hidden folder."""
    flags = _NO_SUID | _NO_DEVICES
    for folder in request["hidden"]:
        _mount("tmpfs", folder, flags | _READ_ONLY, "tmpfs", "size=4k,mode=755")
    size = f"size={request['limits']['files']},nr_inodes={request['limits']['inodes']},mode=700"
    _mount("tmpfs", WORK, flags, "tmpfs", size)


def _bind(source: str, target: str, *, devices: bool) -> None:
    """Show a file or folder of the host, read-only unless it is a device."""
    folder = os.path.isdir(source)  # noqa: PTH112
    os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)  # noqa: PTH103, PTH120
    if not folder:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, _BIND | _RECURSIVE)
    wanted = _NO_SUID if devices else _NO_SUID | _NO_DEVICES | _READ_ONLY
    for path in [target, *_mounts_below(target)]:
        # Flags that the host has set may not be cleared here.
        flags = os.statvfs(path).f_flag
        kept = flags & _SAME_FLAGS | (_RELATIME if flags & _STATVFS_RELATIME else 0)
        _mount("none", path, _REMOUNT | _BIND | wanted | kept)


def _mounts_below(folder: str) -> list[str]:
    with open("/old/proc/self/mountinfo") as file:  # noqa: PTH123
        paths = [line.split()[4] for line in file]
    return [path for path in paths if path.startswith(f"{folder}/")]


def _mount(source: str, target: str, flags: int, kind: str = "none", options: str = "") -> None:
    words = (source.encode(), target.encode(), kind.encode())
    _call(target, "mount", *words, ctypes.c_ulong(flags), options.encode())


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123
        file.write(text)


# --- program ---------------------------------------------------------------------------------


def _run(request: dict[str, Any], source: bytes, report: int) -> None:
    """Run the program, end it at its wall limit, and report its end."""
    with open(_MAIN, "wb") as file:  # noqa: PTH123
        file.write(source)
    load_filter = _prepare_filter()
    if os.getuid() == 0:
        for path in (WORK, _MAIN):
            os.chown(path, NOBODY, NOBODY)
    _tell(report, started=True)
    # Blocked, so that `sigtimedwait` takes it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    start = time.monotonic()
    program = os.fork()
    if program == 0:
        _become_program(request, load_filter, report)
    for stream in range(3):
        os.close(stream)
    late = signal.sigtimedwait({signal.SIGCHLD}, request["limits"]["wall"]) is None
    if late:
        os.kill(program, signal.SIGKILL)
    _, status, usage = os.wait4(program, 0)
    _tell(
        report,
        exit=os.waitstatus_to_exitcode(status),
        late=late,
        seconds=time.monotonic() - start,
        cpu=usage.ru_utime + usage.ru_stime,
    )


def _become_program(request: dict[str, Any], load_filter: Any, report: int) -> NoReturn:
    try:
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        # Bubblewrap leaves some that would survive `execve`.
        header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
        _call("capabilities", "capset", header, (ctypes.c_uint32 * 6)())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        os.chdir(WORK)
        for name, values in request["limits"]["resources"].items():
            resource.setrlimit(getattr(resource, name), values)
        load_filter()
        os.execve(PYTHON, [PYTHON, "-s", "-B", _MAIN], request["environment"])
    except Exception as error:
        _tell(report, error=f"{error}")
    os._exit(1)


class _Comparison(ctypes.Structure):
    """A condition on one argument of a system call (`struct scmp_arg_cmp`)."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def _prepare_filter() -> Any:
    """Return a function that installs the filter of system calls, which no program can remove."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(library.seccomp_init(_ALLOW))

    def refuse(call: str, number: int, *conditions: _Comparison) -> None:
        resolved = library.seccomp_syscall_resolve_name(call.encode())
        if resolved == -1:  # newer than the library
            return
        array = (_Comparison * len(conditions))(*conditions)
        if library.seccomp_rule_add_array(rules, _ERRNO | number, resolved, len(conditions), array):
            raise OSError(f"seccomp refuses a rule for {call}")

    for call in _REFUSED:
        refuse(call, _EPERM)
    refuse("clone", _EPERM, _Comparison(0, _MASKED_EQUAL, _CLONE_THREAD, 0))
    # Its flags are behind a pointer; without it, the C library starts threads by `clone`.
    refuse("clone3", _ENOSYS)

    def load() -> None:
        if error := library.seccomp_load(rules):
            raise OSError(f"seccomp: {os.strerror(-error)}")

    return load


if __name__ == "__main__":
    main()
