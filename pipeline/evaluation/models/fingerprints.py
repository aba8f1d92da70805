"""What tells one export from another that was written to the same path."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pipeline.config import EvaluatedModel, as_tree
from pipeline.errors import UserError

# The files of an export that decide its vectors.
_EXPORT_SUFFIXES = {".safetensors", ".json", ".txt", ".model"}
# Keys of an evaluated model that do not.
_NOT_THE_MODEL = {"name", "path", "instruction_set", "instructions"}


def export_fingerprint(path: Path) -> str:
    """A short hash that changes whenever an export is written anew.

    Sizes and times of writing stand for the content: reading 15 GB per element would cost minutes.
    The model card is left out, because the report's scores may be added to it.

    Raises:
        UserError: the folder is missing or holds no weights.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _EXPORT_SUFFIXES)
    if not any(p.suffix == ".safetensors" for p in files):
        raise UserError(
            f"{path}: no export there",
            allowed="a folder with *.safetensors",
            fix="run `diffembed export`, or correct models.path",
        )
    lines = [f"{p.relative_to(path)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def model_fingerprint(model: EvaluatedModel) -> str:
    """A short hash of the export and of what the config changes about it.

    Instructions are no part of it: vectors are stored by instruction already.
    """
    export = export_fingerprint(model.path)
    tree, plain = (
        {key: value for key, value in as_tree(each).items() if key not in _NOT_THE_MODEL}
        for each in (model, EvaluatedModel(name=model.name, path=model.path))
    )
    if tree == plain:
        return export
    return hashlib.sha256(json.dumps([export, tree], sort_keys=True).encode()).hexdigest()[:12]
