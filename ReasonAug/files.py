"""Files that appear whole or not at all, and errors in the words of the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run_dir import write_text


def make_folder(path: Path) -> None:
    """Create `path` unless it exists.

    Raises:
        UserError: It cannot be created or is not a folder.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            found=f"--out {path}: {error.strerror}", allowed="a folder that can be written"
        ) from error


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically.

    Raises:
        UserError: The file cannot be written.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(
            found=f"{path}: {error.strerror}", allowed="a folder that can be written"
        ) from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read what `write_jsonl` wrote.

    Raises:
        UserError: The file is missing or a line is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            found=f"{path}: {error.strerror}", fix="run `python -m ReasonAug templates` first"
        ) from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                found=f"{path}:{number}: {error.msg}", allowed="one JSON object per line"
            ) from error
    return rows
