"""Time that training waits for a save: all of it on disk, or a copy in memory and a rename.

python -m tests.benchmarks.bench_save [MEGABYTES]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pipeline.training.checkpoints import Saver
from tests.training.memory_engine import save

_KEYS = ("weight", "exp_avg", "exp_avg_sq")
_NUM_PARAMETERS = 10


class HostEngine:
    """State in host memory, in the place of an engine on one rank."""

    optimizer_steps = 1

    def __init__(self, megabytes: int) -> None:
        size = megabytes * 1_000_000 // (4 * len(_KEYS) * _NUM_PARAMETERS)
        self._state = {
            f"p{index}": {key: torch.randn(size) for key in _KEYS}
            for index in range(_NUM_PARAMETERS)
        }

    @property
    def parameter_names(self) -> list[str]:
        return list(self._state)

    def share_of(self, name: str) -> range:
        return range(self._state[name]["weight"].numel())

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name]["weight"].shape)

    def share_state(self, name: str) -> dict[str, torch.Tensor]:
        return self._state[name]


def main() -> None:
    """Print both times for one process."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    engine = HostEngine(megabytes)
    with TemporaryDirectory(dir=".") as folder:
        began = time.perf_counter()
        save(Path(folder), engine, step=1, identity={})
        whole = time.perf_counter() - began
        saver = Saver(Path(folder))
        began = time.perf_counter()
        saver.begin(engine, step=2, identity={})
        copied = time.perf_counter() - began
        while saver.is_writing:
            time.sleep(0.01)
        began = time.perf_counter()
        saver.finish()
        renamed = time.perf_counter() - began
    print(f"{megabytes} MB: {whole:.2f} s if training waits for all of it")
    parts = f"{copied:.2f} copy, {renamed:.2f} rename"
    print(f"{megabytes} MB: {copied + renamed:.2f} s as it is ({parts})")


if __name__ == "__main__":
    main()
