"""End every failed command with one line and an exit code.

DiffembedError    1   root of all errors that this package raises on purpose
|- UserError      2   config, data or command is wrong; running it again would fail again
|- MachineError   1   a disk, a limit or a mount failed; running it again may succeed
`- Stopped       75   a checkpoint was saved on request; running it again continues
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


class DiffembedError(Exception):
    """Root of all errors this package raises on purpose; exits with 1."""

    exit_code = 1


class UserError(DiffembedError):
    """The user's config, data or command is wrong; exits with 2.

    Args:
        found: the key or file, and the wrong value in it.
        allowed: the values that are accepted.
        fix: the change to make, if it does not follow from these two.
        docs: page and anchor below docs/ that say more, for the most common errors.
    """

    exit_code = 2

    def __init__(self, found: str, *, allowed: str = "", fix: str = "", docs: str = "") -> None:
        self.found, self.allowed, self.fix, self.docs = found, allowed, fix, docs
        message = [found]
        if allowed:
            message.append(f"allowed: {allowed}")
        if fix:
            message.append(f"fix: {fix}")
        if docs:
            message.append(f"docs: {docs}")
        super().__init__(" | ".join(message).replace("\n", " "))


class Stopped(DiffembedError):  # noqa: N818 -- an outcome, not a fault
    """The run saved a checkpoint on request and can be resumed; exits with 75."""

    exit_code = 75


class MachineError(DiffembedError):
    """A disk, a limit or a mount of this machine failed; the config is fine; exits with 1."""


# Errors that stay until the user changes something: a path, permissions, a limit.
_PATH_FAULTS = {
    errno.EACCES: "give a path that this user may read or write",
    errno.EPERM: "give a path that this user may read or write",
    errno.EROFS: "give a path on a file system that is mounted writable",
    errno.ENOENT: "give a path that exists",
    errno.ENOTDIR: "give a path whose parents are folders",
    errno.EISDIR: "give the path of a file",
    errno.EEXIST: "give another path, or remove the existing file",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "give a path without a circle of symbolic links",
    errno.EFBIG: "raise `ulimit -f` and run the same command again",
}
# Errors of the machine: the same command works once they are repaired.
_MACHINE_FAULTS = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EIO: "check the disk and run the same command again",
    errno.ESTALE: "check the network disk and run the same command again",
    errno.ETIMEDOUT: "check the network disk and run the same command again",
    errno.EMFILE: "raise `ulimit -n` and run the same command again",
    errno.ENFILE: "raise the system's limit of open files and run the same command again",
    errno.ENOMEM: "give the process more memory and run the same command again",
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain_os_error(error: BaseException) -> DiffembedError | None:
    """Return the one-line form of a failed disk access, or None for any other error.

    Libraries written in Rust (safetensors, tokenizers) raise other types of errors; their text ends
    in `(os error N)`.
    """
    if is_out_of_device_memory(error):
        # torch's message is a paragraph; its second sentence has the sizes.
        text = ". ".join(str(error).strip().split(". ")[:2]) or "a GPU is out of memory"
        cure = "use smaller sizes (`diffembed plan run` counts a training's), or more GPUs"
        return MachineError(f"{' '.join(text.split())} | fix: {cure}")
    if _is_out_of_memory(error):
        lines = str(error).strip().splitlines() or ["out of memory"]
        cure = "use smaller sizes, or a machine with more memory"
        return MachineError(f"{lines[-1]} | fix: {cure}")
    number, path = _number_of(error), ""
    if number is None:
        return None
    if isinstance(error, OSError):
        path = ": ".join(str(name) for name in (error.filename, error.filename2) if name)
    text = f"{path}: {os.strerror(number)}" if path else str(error)
    if fix := _PATH_FAULTS.get(number):
        return UserError(text, fix=fix)
    if fix := _MACHINE_FAULTS.get(number):
        return MachineError(f"{text} | fix: {fix}")
    return None


def _number_of(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


@contextlib.contextmanager
def name_full_disk(path: Path) -> Iterator[None]:
    """Add the path to errors about a full disk; Arrow's and Rust's do not name it."""
    try:
        yield
    except Exception as error:
        number = _number_of(error)
        if number not in _NO_ROOM or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def several(count: int, noun: str) -> str:
    """Return `1 rank`, `2 ranks`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def say_line(text: str, *, file: TextIO | None = None) -> None:
    """Print one line of a run's log, by default on stdout; a log on a full disk ends no run."""
    with contextlib.suppress(OSError):
        print(text, file=file, flush=True)


def say_warning(message: str) -> None:
    """Print one line on stderr about something left out or replaced, and carry on."""
    say_line(f"WARNING: {message}", file=sys.stderr)


def _is_out_of_memory(error: BaseException) -> bool:
    """Return True for errors of Python, Arrow or torch about a host without free memory."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def is_out_of_device_memory(error: BaseException) -> bool:
    """Return True for errors of torch, cuBLAS or NCCL about a GPU without free memory."""
    # By name and text, because nothing here may import torch, which takes seconds.
    texts = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "Cuda failure 2 'out of")
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


@contextlib.contextmanager
def blame(found: str, *, allowed: str = "", fix: str = "") -> Iterator[None]:
    """Turn any error of a library that reads a user's file into one line that names the file.

    Use it around code that only reads: a damaged file makes such code fail anywhere, with errors of
    any type (KeyError, AttributeError, a Rust panic).

    Args:
        found: the file and the attempt, for the message; the library's reason is added.
        allowed: the content that is accepted.
        fix: the change to make.
    """
    try:
        yield
    except (DiffembedError, MemoryError):
        raise
    except BaseException as error:
        # The panics of libraries in Rust are no `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        raise UserError(f"{found} ({reason})", allowed=allowed, fix=fix) from error


def say_error(error: DiffembedError) -> None:
    """Print an error of this package as one line on stderr."""
    say_line(describe_error(error), file=sys.stderr)


def describe_error(error: DiffembedError) -> str:
    """Return an error of this package as one line."""
    # Kinds of UserError differ for the code that catches them, not for the user.
    name = "UserError" if isinstance(error, UserError) else type(error).__name__
    return f"{name}: {error}"


def require_utf8() -> None:
    """Refuse a locale in which Python cannot name every file, or write every text of a library.

    Raises:
        UserError: the encoding of file names is not UTF-8.
    """
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        raise UserError(
            f"Python encodes the names of files in {encoding}",
            allowed="utf-8",
            fix="export PYTHONUTF8=1, or LC_ALL=C.UTF-8",
        )


@contextlib.contextmanager
def errors_end_the_process() -> Iterator[None]:
    """Exit with one line and a code for an error of this package or of a disk."""
    try:
        require_utf8()
        yield
    except DiffembedError as error:
        say_error(error)
        sys.exit(error.exit_code)
    except Exception as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        say_error(explained)
        sys.exit(explained.exit_code)
