"""What tells an export, or any folder, from another that was written to the same path."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.config import EvaluatedModel, as_tree
from pipeline.errors import UserError
from pipeline.model.parts import folders_of

# The files of an export that decide its vectors.
_EXPORT_SUFFIXES = {".safetensors", ".json", ".txt", ".model"}
# Keys of an evaluated model that do not.
_NOT_THE_MODEL = {"name", "path", "instruction_set", "instructions"}
# What is read of a file: all of a small one, of a large one so many pages, evenly spread.
_PAGES = 64
_PAGE_BYTES = 4096


def fingerprint(folder: Path, files: Iterable[Path]) -> str:
    """A short hash that changes whenever one of a folder's files is written anew.

    Names, sizes, times of writing and some pages stand for the content: reading 15 GB per element
    would cost minutes. The pages are there because a copy may keep the time, and some file systems
    have only one.
    """
    lines = []
    for path in sorted(files):
        at = path.stat()
        pages = _pages(path, at.st_size, at.st_mtime_ns, at.st_ctime_ns)
        lines.append(f"{path.relative_to(folder)} {at.st_size} {at.st_mtime_ns} {pages}")
    return _short_hash("\n".join(lines))


@functools.lru_cache(maxsize=4096)
def _pages(path: Path, size: int, *_: int) -> str:
    """Hash of a file's pages; read again where its times say that it may have changed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _PAGES * _PAGE_BYTES:
            digest.update(file.read())
        else:
            for page in range(_PAGES):
                file.seek(page * (size - _PAGE_BYTES) // (_PAGES - 1))
                digest.update(file.read(_PAGE_BYTES))
    return digest.hexdigest()[:16]


def export_fingerprint(path: Path) -> str:
    """The fingerprint of an export; of an adapter alone with the local folders it stands on.

    The model card is left out, because the report's scores may be added to it.

    Raises:
        UserError: the folder is missing or holds no weights.
    """
    files = {folder: _model_files(folder) for folder in folders_of(path)}
    if not any(p.suffix == ".safetensors" for p in files[path]):
        raise UserError(
            f"{path}: no export there",
            allowed="a folder with *.safetensors",
            fix="run `diffembed export`, or correct models.path",
        )
    prints = [fingerprint(folder, own) for folder, own in files.items()]
    return prints[0] if len(prints) == 1 else _short_hash(json.dumps(prints))


def _model_files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and p.suffix in _EXPORT_SUFFIXES]


def model_settings(model: EvaluatedModel) -> dict[str, Any]:
    """What the config says about an export that changes its vectors.

    Instructions are no part of it: vectors are stored by instruction already.
    """
    return {key: value for key, value in as_tree(model).items() if key not in _NOT_THE_MODEL}


def model_fingerprint(model: EvaluatedModel) -> str:
    """A short hash of the export and of what the config changes about it.

    Raises:
        UserError: there is no export.
    """
    export, settings = export_fingerprint(model.path), model_settings(model)
    if settings == model_settings(EvaluatedModel(name=model.name, path=model.path)):
        return export
    return _short_hash(json.dumps([export, settings], sort_keys=True))


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
