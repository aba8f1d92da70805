"""`diffembed data`: what is in prepared shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at prepared shards.", no_args_is_help=True)
Shards = Annotated[Path, typer.Argument(metavar="DIR", help="a folder made by `prepare`")]


@app.command()
def inspect(folder: Shards) -> None:
    """Show sources, counts, lengths and a few decoded examples."""
    from pipeline.data.inspect import inspect as inspect_shards

    print(inspect_shards(folder))


@app.command()
def verify(folder: Shards) -> None:
    """Read every shard again and compare it with its recorded hash."""
    from pipeline.data.inspect import verify as verify_shards

    print(verify_shards(folder))
