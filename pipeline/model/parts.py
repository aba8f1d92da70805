"""What an export is made of: its own folder and, for an adapter alone, those it stands on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pipeline.config import ModelConfig, build_config
from pipeline.errors import UserError

# What every export of ours says about itself.
SETTINGS = "diffembed.json"


def read_settings(folder: Path, name: str) -> Any:
    """One of an export's JSON files.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / name
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__})",
            fix="give a folder written by `diffembed export`, or in sentence-transformers layout",
        ) from error


def is_export(path: Path) -> bool:
    """Whether a folder was written by `diffembed export`."""
    return (path / SETTINGS).is_file()


def is_adapter(export: Path) -> bool:
    """Whether an export is an adapter without the weights it belongs to."""
    return (export / "adapter_config.json").is_file()


def adapted_model(export: Path) -> ModelConfig:
    """The model section that builds an adapter-only export on its base model.

    Raises:
        UserError: its settings are missing or damaged.
    """
    tree = read_settings(export, SETTINGS)["model"]
    trained = build_config(ModelConfig, tree, origin=str(export / SETTINGS))
    return dataclasses.replace(
        trained,
        lora=None,
        merged_adapters=trained.all_merged,
        adapter=str(export),
        adapter_use="merge",
    )


def folders_of(export: Path) -> list[Path]:
    """The local folders whose files decide an export's vectors, its own as the last of them.

    What an adapter's settings name by a hub name is left out: that name stands for it.
    """
    if not is_adapter(export):
        return [export]
    model = adapted_model(export)
    return [Path(part) for part in (model.path, *model.all_merged) if Path(part).is_dir()]


def backbone_folder(export: Path) -> Path | None:
    """Where an export's backbone lies on this machine; None if it has yet to be fetched."""
    if not is_adapter(export):
        return export
    model = adapted_model(export)
    if Path(model.path).is_dir():
        return Path(model.path)
    # Here, not at the top: a whole export needs no hub.
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    return Path(cached).parent if isinstance(cached, str) else None
