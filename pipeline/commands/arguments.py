"""Arguments that several subcommands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from pipeline.config import load_config

T = TypeVar("T")

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see launch/recipes/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="changes to CONFIG")
]
DEFAULT_DEEPSPEED = Path("ds_configs/zero3.json")


def load(kind: type[T], config: Path, overrides: list[str] | None) -> T:
    """The config of a command line.

    Raises:
        UserError: the file or a change to it is wrong.
    """
    return load_config(kind, config, tuple(overrides or ()))
