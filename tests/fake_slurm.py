"""Fake commands in front of PATH: Slurm's, and others whose failures no test can cause."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def put_command(path: Path, body: str) -> None:
    """Write an executable script; without a `#!` line it runs in sh."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body if body.startswith("#!") else f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def put_first_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands in a folder replace the ones of the machine."""
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


class FakeSlurm:
    """Commands of Slurm that succeed, print nothing, and record orders.

    Args:
        folder: receives the commands, and `orders` with the arguments of each recorded call.
        monkeypatch: puts the folder first on PATH.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._orders = folder / "orders"
        for name in ("sbatch", "squeue", "scontrol", "scancel", "srun"):
            self.put(name, ":")
        put_first_on_path(folder, monkeypatch)

    def put(self, name: str, body: str) -> None:
        """Replace a command; `record` in its body records the call, `count` prints their number."""
        functions = (
            f'record() {{ echo "$*" >>{self._orders}; }}\ncount() {{ wc -l <{self._orders}; }}'
        )
        put_command(self.folder / name, f"{functions}\n{body}")

    @property
    def orders(self) -> list[str]:
        """The arguments of each recorded call, oldest first."""
        return self._orders.read_text().splitlines() if self._orders.exists() else []
