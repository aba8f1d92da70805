"""JSON that programs write and read again: a damaged file is one line that names it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import UserError
from pipeline.run_dir import write_json

T = TypeVar("T")

# What git-lfs leaves in place of a file that it has not fetched.
_LFS = "version https://git-lfs.github.com/"
# The key under which a sealed file holds the hash of its other keys.
_SEAL = "sha256"


def read_json(path: Path, *, fix: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        fix: what to do when it cannot be read.

    Raises:
        UserError: it is missing, or no JSON text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", fix=fix) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged (not UTF-8, byte {error.start})", fix=fix) from error
    return parse_json(text, where=str(path), fix=fix)


def read_json_lines(path: Path, kind: type[Any], *, fix: str) -> list[tuple[str, dict[str, Any]]]:
    """Read a JSON-lines file that grows: each whole line with its object, checked to be a `kind`.

    A killed writer may leave half a last line, which is left out.

    Raises:
        UserError: a line is no JSON object of this kind; the message names it.
    """
    try:
        # Not `splitlines`: a line separator of Unicode may stand inside a JSON string.
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", fix=fix) from error
    found = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: damaged (not UTF-8)", fix=fix) from error
        tree = parse_json(text, where=where, fix=fix)
        check_kind(tree, kind, where=where, fix=fix)
        found.append((text, tree))
    return found


def parse_json(text: str, *, where: str, fix: str) -> Any:
    """Parse JSON in which no key stands twice.

    Args:
        text: the JSON text.
        where: file, or file and line, for the message.
        fix: what to do when it cannot be parsed.

    Raises:
        UserError: it is no JSON text.
    """
    if text.startswith(_LFS):
        raise UserError(f"{where}: a Git LFS pointer, not the file", fix="run `git lfs pull`")

    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: damaged ({error})", fix=fix) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return tree


def check_kind(tree: Any, kind: type[T], *, where: str, fix: str) -> T:
    """Return a JSON tree as `kind`: a dataclass, a TypedDict, or any type that pydantic knows.

    Raises:
        UserError: a key is missing or a value has another type; the message names it.
    """
    try:
        # Strict as JSON is: a list may be a tuple, but "1" is no number and true is not 1.
        return TypeAdapter(kind).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{where}: damaged ({key}: {first['msg']})", fix=fix) from error


def read_record(path: Path, kind: type[T], *, fix: str) -> T:
    """Read a JSON file that this package wrote, sealed or not, as `kind`.

    Raises:
        UserError: it is missing, no JSON, of another kind, or changed since it was sealed.
    """
    tree = unseal(read_json(path, fix=fix), path, fix=fix)
    return check_kind(tree, kind, where=str(path), fix=fix)


def write_sealed(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON object atomically, with a hash of its content that `read_record` compares."""
    write_json(path, {**tree, _SEAL: _seal(tree)})


def unseal(tree: Any, path: Path, *, fix: str) -> Any:
    """The content of a sealed object; anything else as it is.

    Raises:
        UserError: the content is not what was sealed.
    """
    if not isinstance(tree, dict) or _SEAL not in tree:
        return tree
    content = {key: value for key, value in tree.items() if key != _SEAL}
    if tree[_SEAL] != _seal(content):
        raise UserError(f"{path}: damaged (its content is not what its {_SEAL} says)", fix=fix)
    return content


def _seal(tree: dict[str, Any]) -> str:
    # Through JSON once, so that tuples are lists and keys are strings, as a reader sees them.
    text = json.dumps(json.loads(json.dumps(tree)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
