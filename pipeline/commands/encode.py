"""`diffembed encode`: texts of a file as vectors in another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="an export")]
Input = Annotated[
    str, typer.Option("--input", help="JSON lines, Parquet or text: file, folder, glob or URL")
]
Output = Annotated[
    Path, typer.Option(help="file of ids and vectors: .arrow, .parquet or .npy (with .ids.json)")
]
Field = Annotated[str, typer.Option(help="the field that holds the text")]
IdField = Annotated[
    str | None,
    typer.Option(help="the field that names a record; default: id or _id; '': row numbers"),
]
TitleField = Annotated[
    str | None,
    typer.Option(help="the field that stands before the text; default: a document's title"),
]
Role = Annotated[Literal["query", "document"], typer.Option(help="of all texts")]
Instruction = Annotated[str, typer.Option(help="of all texts")]
MaxLength = Annotated[int | None, typer.Option(help="tokens; default: the model's")]
Dtype = Annotated[Literal["float32", "float16"], typer.Option(help="of the vectors in the file")]
Dim = Annotated[int | None, typer.Option(help="keep the first so many numbers")]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"], typer.Option(help="of weights and arithmetic")
]
MaxTokens = Annotated[int, typer.Option(help="packed tokens of one forward")]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1, help="default: one per GPU, else per core; under mpirun or srun, its ranks"
    ),
]


def encode(
    model: Model,
    source: Input,
    output: Output,
    field: Field = "text",
    id_field: IdField = None,
    title_field: TitleField = None,
    role: Role = "document",
    instruction: Instruction = "",
    max_length: MaxLength = None,
    dtype: Dtype = "float32",
    dim: Dim = None,
    precision: Precision = "auto",
    max_tokens: MaxTokens = 16384,
    processes: Processes = None,
) -> None:
    """Turn texts into vectors; a killed run is continued by the same command."""
    from pipeline.evaluation.vectors.encode import encode_file
    from pipeline.evaluation.vectors.job import EncodeJob

    job = EncodeJob(
        model=model,
        input=source,
        output=output,
        field=field,
        id_field=id_field,
        title_field=title_field,
        role=role,
        instruction=instruction,
        max_length=max_length,
        dtype=dtype,
        dimensions=dim,
        precision=precision,
        max_tokens=max_tokens,
    )
    encode_file(job, num_processes=processes)
