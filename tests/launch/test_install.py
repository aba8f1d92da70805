"""The installer's checks, with fake `python` and `pip` that record their arguments."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.fake_slurm import put_command

ROOT = Path(__file__).resolve().parents[2]
# A Python of an environment: new enough, with or without torch, whose pip records its arguments
# and the constraints.
PYTHON = """#!/bin/bash
case "$*" in
  *sys.prefix*) echo "$PREFIX" ;;
  *"import torch"*) exit "$NO_TORCH" ;;
  *pip*)
    while (($#)); do
      if [[ $1 == --constraint ]]; then
        echo "constraint: $(grep '^torch==' "$2")" >>"$PREFIX/pip"
        shift
      else
        printf '%s ' "$1" >>"$PREFIX/pip"
      fi
      shift
    done
    echo >>"$PREFIX/pip" ;;
esac
"""
OLD_PYTHON = """#!/bin/bash
if [[ $1 == --version ]]; then echo "Python 3.10.12"; else exit 1; fi
"""


def install(folder: Path, *, python: str, **environment: str) -> subprocess.CompletedProcess[str]:
    programs = folder / "bin"
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        put_command(programs / name, python)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "source launch/install.sh"],
        cwd=ROOT,
        env={"PATH": f"{programs}:{os.environ['PATH']}", "PREFIX": str(folder), **environment},
        capture_output=True,
        text=True,
    )


def test_an_old_python_is_refused_with_ways_to_get_another(tmp_path: Path) -> None:
    done = install(tmp_path, python=OLD_PYTHON, VIRTUAL_ENV=str(tmp_path))

    assert done.returncode == 2
    assert "found Python 3.10.12" in done.stderr
    assert "Python 3.11 or newer" in done.stderr


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        # No torch yet: the tested one.
        ({"NO_TORCH": "1"}, ["constraint: torch=="]),
        # A torch that is there stays: no constraint on it.
        ({"NO_TORCH": "0"}, ["constraint: \n"]),
        (
            {"NO_TORCH": "1", "DIFFEMBED_TORCH": "torch==2.11.0"},
            ["torch==2.11.0", "constraint: \n"],
        ),
        ({"NO_TORCH": "1", "DIFFEMBED_LATEST": "1"}, ["constraint: \n"]),
    ],
    ids=["no torch", "torch", "named torch", "latest"],
)
def test_torch_is_the_tested_one_unless_one_is_there_or_named(
    tmp_path: Path, environment: dict[str, str], told: list[str]
) -> None:
    done = install(tmp_path, python=PYTHON, VIRTUAL_ENV=str(tmp_path), **environment)

    assert done.returncode == 0, done.stderr
    pip = (tmp_path / "pip").read_text()
    assert all(text in pip for text in told), pip
    assert pip.rstrip().endswith(f"--editable {ROOT}[dev]")


def test_nothing_is_installed_twice(tmp_path: Path) -> None:
    for _ in range(2):
        install(tmp_path, python=PYTHON, VIRTUAL_ENV=str(tmp_path), NO_TORCH="0")

    assert (tmp_path / "pip").read_text().count("--editable") == 1
