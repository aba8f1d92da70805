"""`python -m ReasonAug`: training data, generated or out of generations, and replicas."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import UserError
from ReasonAug.generation_rows import write_generation_rows
from ReasonAug.replicas import write_replicas
from ReasonAug.templates import write_templates

app = typer.Typer(
    help="Synthesis of reasoning-intensive retrieval data, without a network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Seed = Annotated[int, typer.Option(help="same seed, same bytes")]


@app.command()
def templates(
    out: Annotated[Path, typer.Option(help="folder for train, problems and definitions")],
    seed: Seed = 0,
    problems_per_concept: Annotated[int, typer.Option(help="problems of each concept")] = 64,
    max_tokens: Annotated[
        int, typer.Option(help="no background is added beyond this length of problem + solution")
    ] = 1500,
) -> None:
    """Write problems with verified solutions, definitions and training triplets."""
    write_templates(
        out, seed=seed, problems_per_concept=problems_per_concept, max_tokens=max_tokens
    )


@app.command()
def rows(
    generations: Annotated[
        Path, typer.Option(help="JSONL of n, domain, concept, generation, check")
    ],
    definitions: Annotated[Path, typer.Option(help="JSONL of domain, concept, definition")],
    out: Annotated[Path, typer.Option(help="the JSONL of training rows; its summary lies beside")],
    seed: Seed = 0,
) -> None:
    """Turn what a language model generated into training rows."""
    write_generation_rows(generations, definitions, out, seed=seed)


@app.command()
def replicas(
    data: Annotated[Path, typer.Option(help="folder written by `templates`")],
    out: Annotated[Path, typer.Option(help="folder that stands for the hub")],
    seed: Seed = 0,
    max_tokens: Annotated[int, typer.Option(help="cap of the LongEmbed documents")] = 1024,
) -> None:
    """Write small replicas of FollowIR, LongEmbed and BRIGHT from the evaluation splits."""
    write_replicas(data, out, seed=seed, max_tokens=max_tokens)


def main() -> None:
    """Run the command; a mistake of the user ends with one line and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
