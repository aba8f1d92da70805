"""Arguments that several commands of `diffembed` share, and the way they read a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from pipeline.config import load_config
from pipeline.launch import discover_world

T = TypeVar("T")

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see launch/recipes/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="changes to CONFIG")
]
DeepSpeed = Annotated[Path, typer.Option(help="DeepSpeed JSON, see ds_configs/")]
DEFAULT_DEEPSPEED = Path("ds_configs/zero3.json")
# Commands of one process per device, alone or under a launcher.
Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="processes; default: one per GPU, otherwise one per core; under mpirun or srun, "
        "its ranks",
    ),
]


# The groups of `diffembed --help`.
MODEL, CHECK = "From data to a model", "Before a run"
RUN, USE = "While it runs, and on Slurm", "Use and score it"


def load(kind: type[T], config: Path, overrides: list[str] | None) -> T:
    """Return the config of a command line.

    Raises:
        UserError: the file or an override is wrong.
    """
    return load_config(kind, config, tuple(overrides or ()))


def say_next(command: str, config: Path, overrides: list[str] | None, also: str = "") -> None:
    """Print the command to run next with this config; on the first rank only."""
    if discover_world().is_main:
        print(f"next: diffembed {' '.join([command, str(config), *(overrides or ())])}{also}")
