"""Commands that look at a machine, at configs and at prepared shards."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.commands import CHECK, Overrides
from pipeline.errors import UserError
from pipeline.launch import count_gpus, discover_world

if TYPE_CHECKING:
    from pipeline.doctor import Check

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
    from pipeline.doctor import ranks, report, run_checks

    changes, world = tuple(overrides or ()), discover_world()
    # One rank alone may be a shell that `srun --pty` opened, and has no others to sum with.
    if world.world_size == 1:
        words = _words(launcher)
        checks = all_checks(config, changes, lambda: ranks.check_ranks(words))
        raise typer.Exit(report(run_checks(checks), as_json=as_json))
    # Under a launcher, all ranks sum together, and rank 0 does the rest.
    found = list(ranks.examine(world))
    from pipeline import comm

    code = int(any(finding.level == "fail" for finding in found))
    if world.is_main:
        checks = all_checks(config, changes, lambda: found)
        del checks["mpirun"]  # ranks start no ranks
        code = report(run_checks(checks), as_json=as_json)
    joined = not any(finding.check == "ranks" and finding.level == "fail" for finding in found)
    comm.leave(code, gracefully=joined)


def _words(launcher: str) -> list[str]:
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"--launcher {launcher!r}: {error}", fix="close the quotes") from error
    if not words:
        return []
    from pipeline.doctor.machine import find_program

    program = find_program(words[0])
    if program is None:
        raise UserError(f"--launcher: {words[0]}: not found", fix="give a program on PATH")
    return [program, *words[1:]]


def all_checks(
    config: Path | None, overrides: tuple[str, ...], check_ranks: Check
) -> dict[str, Check]:
    """Return every check by its name, in the order of the report."""
    from pipeline.doctor import machine, readiness

    has_gpu = count_gpus() > 0
    checks: dict[str, Check] = {
        "versions": lambda: machine.check_packages(has_gpu=has_gpu),
        "ranks": check_ranks,
        "mpirun": machine.check_mpi,
        "compilers": lambda: machine.check_compilers(has_gpu=has_gpu),
        "extension locks": machine.check_build_locks,
        "shared memory": machine.check_shared_memory,
        "open files": machine.check_open_files,
        "caches": machine.check_caches,
        "slurm": lambda: machine.check_slurm(config),
    }
    if config is not None:
        checks["config"] = lambda: readiness.check_config(config, overrides)
    return checks


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
