"""What a folder of sentence-transformers says about itself, for a training that starts from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError

# What git-lfs leaves in place of a file that it has not fetched.
_LFS = b"version https://git-lfs"

Pooling = Literal["mean", "weighted_mean", "last_token", "first_token"]

# Our poolings by their name there.
POOLINGS: dict[str, Pooling] = {
    "mean": "mean",
    "weightedmean": "weighted_mean",
    "lasttoken": "last_token",
    "cls": "first_token",
}
# The older form, one boolean for each pooling; text-embeddings-inference reads nothing else.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def pooling_mode(settings: Mapping[str, Any]) -> str:
    """Return sentence-transformers' name of a pooling, from its config.json, new or old."""
    mode = settings.get("pooling_mode")
    if mode is None:
        mode = "+".join(kind for key, kind in POOLING_FLAGS.items() if settings.get(key))
    return str(mode)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Declared:
    """What a model's folder declares; None and empty where it is no such folder.

    Attributes:
        pooling: sentence-transformers' name.
        normalize: whether its vectors are normalised.
        prompts: what stands before texts, by name.
    """

    pooling: str | None = None
    normalize: bool | None = None
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)


def read_declared(path: str, revision: str | None = None) -> Declared:
    """Read a local folder, or the local cache of a hub name; a network is never asked.

    A damaged file counts as absent: whoever loads such a folder as an embedder refuses it.
    """
    modules = _read(path, "modules.json", revision)
    if not isinstance(modules, list):
        return Declared()
    kinds = {
        str(module.get("type")).rpartition(".")[2]: str(module.get("path"))
        for module in modules
        if isinstance(module, dict)
    }
    settings = _read(path, f"{kinds.get('Pooling', '')}/config.json", revision)
    stated = _read(path, "config_sentence_transformers.json", revision)
    prompts = stated.get("prompts") if isinstance(stated, dict) else None
    return Declared(
        pooling=pooling_mode(settings) or None if isinstance(settings, dict) else None,
        normalize="Normalize" in kinds,
        prompts={str(k): str(v) for k, v in prompts.items() if v}
        if isinstance(prompts, dict)
        else {},
    )


def default_pooling(path: str, revision: str | None) -> Pooling:
    """Return the pooling of a model whose config names none: the declared one, or the mean.

    Raises:
        UserError: the declared one does not exist here.
    """
    declared = read_declared(path, revision).pooling
    if declared is None:
        return "mean"
    if declared not in POOLINGS:
        raise UserError(
            f"model.pooling: none, and {path} declares {declared!r}",
            allowed=", ".join(sorted(POOLINGS.values())),
            fix="set model.pooling to one of them; the model is then trained to it",
        )
    return POOLINGS[declared]


def _read(path: str, name: str, revision: str | None) -> Any:
    file = local_file(path, name, revision)
    try:
        return json.loads(file.read_text()) if file else None
    except (OSError, ValueError):
        return None


def require_model_place(path: str, *, key: str) -> None:
    """Refuse a path without a folder; what may be a name on the hub is left to its client.

    Args:
        path: a folder of this machine, or a name on the hub.
        key: the config key that gives it.

    Raises:
        UserError: it is a file, or a path where nothing is.
    """
    if Path(path).is_dir():
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    allowed = "a folder in Hugging Face layout, or a model name in the local cache"
    if Path(path).exists():
        raise UserError(f"{key}: {path} is a file", allowed=allowed, fix="name its folder")
    try:
        validate_repo_id(path)
    except HFValidationError:
        found = f"{key}: {path}: no such folder"
        fix = f"correct {key}, or put the folder back"
        raise UserError(found, allowed=allowed, fix=fix) from None


def model_fix(path: str) -> str:
    """Return what helps where the files of a model cannot be read."""
    folder = Path(path)
    if any(_is_pointer(file) for file in folder.glob("*")):
        return f"run `git lfs pull` in {path}, whose large files are not there yet"
    if folder.is_dir():
        return f"fetch {path} again, or name another folder"
    return f"correct the name, or run `hf download {path}` where there is a network"


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(_LFS)) == _LFS
    except OSError:
        return False


def local_file(path: str, name: str, revision: str | None = None) -> Path | None:
    """Find a file of a model's folder, or of a hub name's in the local cache; asks no network."""
    folder = Path(path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    # Inside, because the hub's client takes a while to import.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, name, revision=revision)
    except HFValidationError:
        return None  # a path that is not there
    return Path(cached) if isinstance(cached, str) else None
