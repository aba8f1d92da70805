"""What an export is made of: its own folder and, for an adapter alone, those it stands on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, Required

from pydantic import Field
from typing_extensions import TypedDict

from pipeline.config import ModelConfig, build_config
from pipeline.files import check_kind, read_json

# What every export of ours says about itself.
SETTINGS = "diffembed.json"


class Trained(TypedDict):
    """What `diffembed.json` says of the model."""

    model: dict[str, Any]


class Compared(TypedDict, total=False):
    """How vectors are compared, in either file that says so."""

    similarity: Literal["cosine", "dot"]
    similarity_fn_name: str | None


class Worded(TypedDict):
    """What it says of instructions and texts."""

    template: dict[str, str]


class Cut(TypedDict):
    """What it says of the length of texts."""

    max_length: Annotated[int, Field(ge=1)]


class Origin(TypedDict, total=False):
    """What it says of the run; nothing for a model that no run has trained."""

    step: int | None
    checkpoint: str | None


class Backbone(TypedDict, total=False):
    """What is read of a `config.json` before transformers reads it."""

    model_type: Required[str]
    is_causal: bool


class Module(TypedDict):
    """An entry of `modules.json`."""

    type: str
    path: str


class Lengths(TypedDict, total=False):
    """`sentence_bert_config.json`."""

    max_seq_length: Annotated[int, Field(ge=1)] | None


class Prompts(TypedDict, total=False):
    """What is read of `config_sentence_transformers.json`."""

    prompts: dict[str, str]
    truncate_dim: int | None


class PoolingModes(TypedDict, total=False):
    """What is read of the pooling's `config.json`; before version 5 there was one switch each."""

    pooling_mode: str
    include_prompt: bool
    pooling_mode_cls_token: bool
    pooling_mode_max_tokens: bool
    pooling_mode_mean_tokens: bool
    pooling_mode_mean_sqrt_len_tokens: bool
    pooling_mode_weightedmean_tokens: bool
    pooling_mode_lasttoken: bool


def read_settings(folder: Path, name: str, kind: Any) -> Any:
    """One of an export's JSON files, with all that it holds.

    Args:
        folder: the export.
        name: the file's name there.
        kind: the keys that are used, and the types of their values.

    Raises:
        UserError: it is missing or damaged, or a value has another type.
    """
    path = folder / name
    fix = "give a folder written by `diffembed export`, or in sentence-transformers layout"
    tree = read_json(path, fix=fix)
    check_kind(tree, kind, where=str(path), fix=fix)
    return tree


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
    tree = read_settings(export, SETTINGS, Trained)["model"]
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
