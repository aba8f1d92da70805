"""Commands that look at a machine, at configs and at prepared shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.commands import CHECK, Overrides
from pipeline.errors import UserError

app = typer.Typer()
config = typer.Typer(help="Explain and compare configs.", no_args_is_help=True)
data = typer.Typer(help="Inspect and verify prepared shards.", no_args_is_help=True)
app.add_typer(config, name="config", rich_help_panel=CHECK)
app.add_typer(data, name="data", rich_help_panel=CHECK)
Shards = Annotated[Path, typer.Argument(metavar="DIR", help="a folder made by `prepare`")]


@app.command(rich_help_panel=CHECK)
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="also check everything that it names")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
    launcher: Annotated[
        str,
        typer.Option(
            help='words that start ranks, such as "srun --ntasks=16"; default: ranks of this '
            "machine, one per GPU, otherwise two"
        ),
    ] = "",
) -> None:
    """Check versions, GPUs, kernels, ranks, disks, limits and a config; exit 1 if any fails."""
    from pipeline.doctor import doctor as check_all

    raise typer.Exit(check_all(config, tuple(overrides or ()), launcher=launcher, as_json=as_json))


@config.command("explain")
def explain_key(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="loss.temperature, temperature, or a section: loss")
    ],
) -> None:
    """Print what a key means, its values and its default; a section prints its keys."""
    from pipeline.config.explain import explain

    print(explain(key))


@config.command()
def schema(
    kind: Annotated[
        Literal["starter", "prepare", "mine", "train", "evaluate", "probe", "chain"] | None,
        typer.Argument(
            metavar="[KIND]", help="starter, prepare, mine, train, evaluate, probe or chain"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="a folder: write the schemas of all kinds as KIND.json")
    ] = None,
) -> None:
    """Print the JSON schema of a kind of config files, for completion and checks in an editor."""
    import json

    from pipeline.config.explain import file_schema, write_schemas

    if (kind is None) == (output is None):
        raise UserError("config schema", allowed="either a KIND to print, or --output FOLDER")
    if output is not None:
        print(*write_schemas(output), sep="\n")
    if kind is not None:
        print(json.dumps(file_schema(kind), indent=1, ensure_ascii=False))


@config.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="a config, or a run's config.yaml")],
    second: Annotated[Path, typer.Argument(metavar="B", help="another config of the same kind")],
) -> None:
    """Print every key that differs between two configs, with everything they extend."""
    from pipeline.config.explain import compare

    rows = compare(first, second)
    width = max((len(key) for key, _, _ in rows), default=0)
    for key, left, right in rows:
        print(f"{key:{width}}  {left} -> {right}")
    if not rows:
        print("no key differs")


@data.command()
def inspect(folder: Shards) -> None:
    """Show sources, counts, lengths and a few decoded examples."""
    from pipeline.data.shards import inspect_dataset

    print(inspect_dataset(folder))


@data.command()
def verify(folder: Shards) -> None:
    """Read every shard and compare it with its recorded hash."""
    from pipeline.data.shards import verify_dataset

    print(verify_dataset(folder))
