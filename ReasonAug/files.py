"""Read and write JSON lines and folders, with errors in the words of the command line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import write_text


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


def read_jsonl(path: Path, *, fix: str) -> list[dict[str, Any]]:
    """Read one JSON object per line; empty lines do not count.

    Args:
        fix: What to do when the file is missing.

    Raises:
        UserError: The file is missing or a line is no JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(found=f"{path}: {error.strerror}", fix=fix) from error
    rows = []
    # Not `splitlines`: a JSON string may contain Unicode's line separators.
    content = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if b"\\ud" in line.lower():
                json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                found=f"{path}:{number}: {error.reason}", allowed="UTF-8 text"
            ) from error
        except UnicodeEncodeError as error:
            raise UserError(
                found=f"{path}:{number}: half of a pair of \\u escapes, which is no text",
                allowed="UTF-8 text",
            ) from error
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise UserError(
                found=f"{path}:{number}: {reason}", allowed="one JSON object per line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(found=f"{path}:{number}: no object", allowed="one JSON object per line")
        rows.append(row)
    return rows


def require_texts(
    path: Path, rows: Iterable[Mapping[str, Any]], fields: Iterable[str], *, optional: str = ""
) -> None:
    """Refuse rows that lack one of the text `fields`; `optional` may also be null.

    Raises:
        UserError: names the row by its number among the objects of the file.
    """
    for number, row in enumerate(rows, 1):
        for field in (*fields, *((optional,) if optional else ())):
            value = row.get(field)
            may_be_null = field == optional and field in row
            if not isinstance(value, str) and not (may_be_null and value is None):
                raise UserError(
                    found=f"{path}: object {number}: {field!r} is {type(value).__name__}",
                    allowed=f"a text in each of: {', '.join(fields)}",
                )
