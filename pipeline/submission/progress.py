"""How far a training run has got, from the names of its checkpoints alone."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError
from pipeline.run_dir import RunDir


def last_step(output_dir: Path) -> int:
    """Steps in the newest whole checkpoint of a run; 0 when there is none.

    Raises:
        UserError: `latest` does not hold a checkpoint's name.
    """
    pointer = RunDir(output_dir).checkpoints / "latest"
    if not pointer.exists():
        return 0
    name = pointer.read_text().strip()
    number = name.removeprefix("step-")
    if not number.isdecimal():
        raise UserError(f"{pointer}: {name!r}", allowed="the name of a checkpoint beside it")
    return int(number)
