"""Define the commands of `diffembed`: arguments, help, and the functions that they call.

    init  starter  prepare  mine  train  export  encode  probe  report     files in, files out
    submit                                                           the same as Slurm jobs
    watch  stop  rewind                                              a run's folder
    doctor                                                           this machine, before a run
    config    explain  schema  diff                                  the keys of all configs
    data      inspect  verify                                        prepared shards
    plan      run  scale  calibrate  loss                            the cost of a run, in advance
    evaluate  tasks  count  run  prefetch  plan  embed  score        an evaluation, step by step

Commands import heavy packages inside, after they have read their config: `--help` and errors of a
config are answered at once.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from pipeline.commands import checks, evaluating, plans, steps
from pipeline.errors import errors_end_the_process

app = typer.Typer(
    help="Turn a diffusion or autoregressive language model into a text embedder.",
    epilog="Start with `diffembed init DIR`: it asks four questions, writes the configs and prints "
    "the next commands. `diffembed COMMAND --help` lists options, `diffembed config explain KEY` "
    "explains any key of a config.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (steps, evaluating, checks, plans):
    app.add_typer(group.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print("diffembed", metadata.version("diffembed"))
        raise typer.Exit


@app.callback()
def _shared(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print and stop"),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a command; errors of this package end as one line and their exit code."""
    with errors_end_the_process():
        app([_expand_home(argument) for argument in sys.argv[1:]])


def _expand_home(argument: str) -> str:
    """Expand `~` in `--output=~/export`: shells expand it only at the start of a word."""
    name, equals, value = argument.partition("=")
    if name.startswith("--") and value.startswith("~"):
        value = os.path.expanduser(value)  # noqa: PTH111 -- a text that need not be a path
    return name + equals + value


if __name__ == "__main__":
    main()
