"""Write training data, generated or from generations, and replicas: `python -m ReasonAug`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.config.loading import load_config
from pipeline.errors import errors_end_the_process
from ReasonAug.generation_rows import write_generation_rows
from ReasonAug.long_rows import write_long_rows
from ReasonAug.replicas import write_replicas
from ReasonAug.templates import write_templates
from ReasonAug.texts import write_texts

app = typer.Typer(
    help="Synthesis of reasoning-intensive retrieval data, by templates or by a language model.",
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
    out: Annotated[Path, typer.Option(help="JSONL of training rows; a summary goes next to it")],
    seed: Seed = 0,
    held_out: Annotated[
        float, typer.Option(help="share of the concepts to keep out of all rows")
    ] = 0.0,
    hub: Annotated[
        Path | None,
        typer.Option(help="folder for a BRIGHT replica with queries about the concepts held out"),
    ] = None,
) -> None:
    """Turn a language model's generations into training rows."""
    write_generation_rows(generations, definitions, out, seed=seed, held_out=held_out, hub=hub)


@app.command()
def replicas(
    data: Annotated[Path, typer.Option(help="folder written by `templates`")],
    out: Annotated[Path, typer.Option(help="folder that replaces the hub")],
    seed: Seed = 0,
    max_tokens: Annotated[int, typer.Option(help="cap of the LongEmbed documents")] = 1024,
    divide_lengths: Annotated[
        int,
        typer.Option(
            help="LongEmbed split test_N has documents of N / this many tokens; above 1 they "
            "contain the answer once, at 1 once in every 256 tokens"
        ),
    ] = 1,
    long_queries: Annotated[int, typer.Option(help="LongEmbed queries of each length")] = 10,
) -> None:
    """Write small replicas of FollowIR, LongEmbed and BRIGHT from the evaluation splits."""
    write_replicas(
        data,
        out,
        seed=seed,
        max_tokens=max_tokens,
        divide_lengths=divide_lengths,
        long_queries=long_queries,
    )


@app.command()
def texts(
    data: Annotated[Path, typer.Option(help="folder written by `templates`")],
    seed: Seed = 0,
    num_long: Annotated[int, typer.Option(help="long texts in addition to the problems")] = 1024,
    max_tokens: Annotated[int, typer.Option(help="length of the longest of them")] = 1024,
) -> None:
    """Write plain texts to pre-train on, and rows that search for a fact in a short text."""
    write_texts(data, seed=seed, num_long=num_long, max_tokens=max_tokens)


@app.command()
def long(
    data: Annotated[Path, typer.Option(help="folder written by `templates`")],
    seed: Seed = 0,
    rows: Annotated[int, typer.Option(help="training rows, notes and needles in turn")] = 4096,
    max_tokens: Annotated[int, typer.Option(help="length of the longest document")] = 4096,
) -> None:
    """Write training rows whose long documents contain the answer to the query once."""
    write_long_rows(data, seed=seed, num_rows=rows, max_tokens=max_tokens)


@app.command()
def synthesize(
    config: Annotated[Path, typer.Argument(help="YAML config: ReasonAug/README.md")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value, over the file's")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the calls, tokens and price that are left")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="write this many problems and a page with them")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="ask again what failed for good")
    ] = False,
    state: Annotated[
        bool, typer.Option("--state", help="print what a Slurm job must know, as JSON")
    ] = False,
) -> None:
    """Write training rows with a language model behind an OpenAI-compatible server."""
    from ReasonAug.synthesis.config import SynthesisConfig
    from ReasonAug.synthesis.run import describe_state
    from ReasonAug.synthesis.run import synthesize as run

    settings = load_config(SynthesisConfig, config, tuple(overrides or ()))
    if state:
        print(json.dumps(describe_state(settings)))
        return
    run(settings, dry_run=dry_run, limit=limit, retry_failed=retry_failed)


@app.command(name="import")
def import_answers(
    config: Annotated[Path, typer.Argument(help="YAML config of the synthesis")],
    generations: Annotated[
        Path, typer.Option(help="JSONL of n, domain, concept, generation, check; or batch output")
    ],
    definitions: Annotated[
        Path | None, typer.Option(help="JSONL of domain, concept, definition; or batch output")
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(help="for batch outputs: JSONL of custom_id, stage, domain, concept, n"),
    ] = None,
) -> None:
    """Record answers that exist, so that `synthesize` takes them instead of asking."""
    from ReasonAug.synthesis.config import SynthesisConfig
    from ReasonAug.synthesis.imports import import_files

    settings = load_config(SynthesisConfig, config)
    import_files(settings, generations=generations, definitions=definitions, index=index)


def main() -> None:
    """Run the command; an error of the user ends with one line and exit code 2."""
    with errors_end_the_process():
        app()


if __name__ == "__main__":
    main()
