"""Errors of disks end a command with one line: exit code 2 for a wrong path, 1 for a machine."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.data.sources.records import BadRowError
from pipeline.errors import (
    MachineError,
    UserError,
    blame,
    errors_end_the_process,
    explain_os_error,
    say_line,
    say_warning,
)
from pipeline.files import atomic_path, require_writable


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EROFS, "read-only", "/out/x"), UserError),
        (PermissionError(errno.EACCES, "denied", "/out/x"), UserError),
        (FileNotFoundError(errno.ENOENT, "missing", "/out/x"), UserError),
        (OSError(errno.ENOSPC, "full", "/out/x"), MachineError),
        (OSError(errno.EDQUOT, "quota", "/out/x"), MachineError),
        (Exception("I/O error: No space left on device (os error 28)"), MachineError),
        (Exception("Permission denied (os error 13)"), UserError),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0"),
            MachineError,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `c`"), MachineError),
    ],
)
def test_a_failed_access_of_disk_or_device_is_explained(error: Exception, kind: type) -> None:
    assert isinstance(explain_os_error(error), kind)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "Error writing bytes to file"),  # Arrow's
        Exception("I/O error: No space left on device (os error 28)"),  # Rust's
    ],
)
def test_a_full_disk_names_the_file_that_was_written(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    with pytest.raises(OSError) as raised, atomic_path(path):
        raise error
    told = f"{path}: {os.strerror(errno.ENOSPC)} | fix: free some space"
    assert str(explain_os_error(raised.value)).startswith(told)


def test_an_error_of_what_is_read_does_not_blame_the_file_that_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, atomic_path(tmp_path / "x.arrow"):
        raise OSError(errno.EIO, "Error reading bytes from file")
    assert raised.value.filename is None


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), ConnectionError("no network"), OSError("?")]
)
def test_any_other_error_is_left_alone(error: Exception) -> None:
    assert explain_os_error(error) is None


def test_a_command_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, errors_end_the_process():
        raise OSError(errno.ENOSPC, "full", "/out/x")

    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        f"MachineError: /out/x: {os.strerror(errno.ENOSPC)} | "
        "fix: free some space and run the same command again\n"
    )


def test_a_log_that_takes_no_line_changes_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        say_line("a line that the disk does not take")
        say_warning("nor this one")
        with pytest.raises(SystemExit) as ended, errors_end_the_process():
            raise UserError("wrong")
        assert ended.value.code == 2
        monkeypatch.undo()
        # What the failed lines left in its buffer must not fail once more, when it is closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_an_output_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b", key="output_dir")

    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_disk_that_takes_no_byte_keeps_no_trace_and_names_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "full", str(path))

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(MachineError) as raised:
        require_writable(tmp_path / "out", key="output_dir")

    told = f"output_dir: {tmp_path}/out: {os.strerror(errno.ENOSPC)} | fix: free some space"
    assert str(raised.value).startswith(told)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match=r"output_dir: .*file/out: Not a directory"):
        require_writable(tmp_path / "file" / "out", key="output_dir")


def test_an_error_of_a_row_is_reported_as_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, errors_end_the_process():
        raise BadRowError("rows.jsonl:2", "text: null")

    assert ended.value.code == 2
    assert capsys.readouterr().err == "UserError: rows.jsonl:2: text: null\n"


def test_any_error_of_a_library_over_a_file_is_one_line_about_the_file() -> None:
    for error in (KeyError("x"), AttributeError("two\nlines"), RecursionError(), StopIteration()):
        with pytest.raises(UserError) as caught, blame("a.json: damaged", fix="write it again"):
            raise error
        assert str(caught.value).startswith("a.json: damaged (")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^own$"), blame("a.json: damaged"):
        raise UserError("own")
    with pytest.raises(KeyboardInterrupt), blame("a.json: damaged"):
        raise KeyboardInterrupt


def test_a_machine_without_memory_is_one_line_with_exit_1() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (MemoryError(), caught.value):
        explained = explain_os_error(error)
        assert explained is not None
        assert explained.exit_code == 1
        assert "memory" in str(explained)


@pytest.mark.parametrize("command", [["-m", "pipeline.cli", "config"], ["pipeline/train.py"]])
def test_a_locale_without_utf8_is_refused(command: list[str]) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **locale},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "UserError: Python encodes the names of files in ascii | allowed: utf-8 | "
        "fix: export PYTHONUTF8=1, or LC_ALL=C.UTF-8\n"
    )
