"""The device that the parts of the first contact run on, and their reports.

cuda         the GPU
cpu          the same code on the CPU, where `to_device` leaves everything
pretended    the same code on the pretended device of tests/fake_cuda
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from tests.benchmarks.bench_support import Figure, to_device

Kind = Literal["cuda", "cpu", "pretended"]
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The device of a part.

    Args:
        kind: of device.
        tiny: small models and few repeats, to see that the code works.
        deadline: of the part, in seconds of `time.monotonic`.
        folder: for its files.
    """

    kind: Kind
    tiny: bool
    deadline: float
    folder: Path

    @property
    def device(self) -> torch.device:
        """The device of tensors."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", 0)

    @property
    def seconds_left(self) -> float:
        """Seconds until the part is ended."""
        return self.deadline - time.monotonic()

    def to_device(self, module: Any, dtype: torch.dtype | None = None) -> Any:
        """Move a module; its parameters become `dtype`, its buffers keep theirs."""
        if self.kind == "pretended":
            from tests.fake_cuda.fake_cuda import to_cuda

            return to_cuda(module, dtype)
        return to_device(module, self.device, dtype)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.kind != "cpu":
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give cached memory back."""
        if self.kind != "cpu":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def measured(self) -> Iterator[Measured]:
        """Measure seconds and peak memory of a block."""
        result = Measured()
        if self.kind != "cpu":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        yield result
        self.synchronize()
        result.seconds = time.perf_counter() - began
        if self.kind != "cpu":
            result.gib = (torch.cuda.max_memory_allocated() - before) / GIB


@dataclasses.dataclass
class Measured:
    """Seconds of a block, and the GiB that it held at most in addition to what was there."""

    seconds: float = 0.0
    gib: float = 0.0


class Report:
    """Prints each figure at once, and keeps it in a file that outlives the process.

    Args:
        path: JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(
        self,
        name: str,
        measured: str,
        asked: str = "",
        ok: bool | None = None,
        **values: float | str | None,
    ) -> None:
        """Report a figure.

        Args:
            name: of the figure.
            measured: its value in words.
            asked: its bound in words.
            ok: whether it is met; None where nothing is asked.
            values: the numbers, for the JSON.
        """
        print(line_of(Figure(name=name, measured=measured, asked=asked, ok=ok)), flush=True)
        entry = {"name": name, "measured": measured, "asked": asked, "ok": ok, **values}
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def most(self, name: str, value: float, limit: float) -> None:
        """Report an error that must not exceed a limit; NaN exceeds all."""
        self(name, f"{value:.1e}", f"<= {limit:g}", value <= limit, value=value)


def line_of(figure: Figure) -> str:
    """Format a figure as a line of the table."""
    ok = {True: "yes", False: "**no**", None: ""}[figure.ok]
    return f"| {figure.name} | {figure.asked} | {figure.measured} | {ok} |"
