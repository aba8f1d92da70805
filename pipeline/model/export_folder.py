"""The files of an export: names, contents, readers, writers and the fingerprint of them all.

    EXPORT/
      config.json  model.safetensors  tokenizer.json ...   the model, as transformers saves it
      modules.json                                         what follows it: pooling, cut, normalise
      1_Pooling/config.json                                pooling, with or without the prompt
      2_Truncation/                                        a linear layer that keeps `dimensions`
      3_Normalize/
      sentence_bert_config.json                            tokens after which a text is cut
      config_sentence_transformers.json                    prompts, similarity
      diffembed.json                                       template, run and `model` section
      README.md                                            the model card, see `card.py`

All but `diffembed.json` are read by sentence-transformers, and by servers that follow it. An export
of an adapter alone holds adapter_config.json, adapter_model.safetensors, the tokenizer,
`diffembed.json` and the card; its vectors depend on the base model and on merged adapters too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Required, TypeVar

from pydantic import Field
from typing_extensions import TypedDict

from pipeline.config import (
    POOLING_FLAGS,
    POOLINGS,
    EvaluatedModel,
    ModelConfig,
    Pooling,
    Template,
    as_tree,
    build_config,
)
from pipeline.errors import UserError, name_full_disk
from pipeline.files import (
    check_kind,
    fingerprint_files,
    read_json,
    require_writable,
    short_hash,
    sync_dir,
    write_json,
)

T = TypeVar("T")
# The file that only this package writes, so it tells our exports from other folders.
SETTINGS = "diffembed.json"


class ExportSettings(TypedDict, total=False):
    """`diffembed.json`; `step` and `checkpoint` are null in a model that no run has trained."""

    template: dict[str, str]
    max_length: Annotated[int, Field(ge=1)]
    step: int | None
    checkpoint: str | None
    similarity: Literal["cosine", "dot"]
    model: dict[str, Any]
    do_lower_case: bool


class BackboneConfig(TypedDict, total=False):
    """The keys of `config.json` that are needed before transformers reads it."""

    model_type: Required[str]
    is_causal: bool


class ModuleEntry(TypedDict):
    """An entry of `modules.json`."""

    type: str
    path: str


class SentenceBertConfig(TypedDict, total=False):
    """`sentence_bert_config.json`, which had other names before version 1."""

    max_seq_length: Annotated[int, Field(ge=1)] | None
    do_lower_case: bool
    transformer_task: str
    modality_config: dict[str, Any]
    processing_kwargs: dict[str, Any] | None
    query_length: int | None
    document_length: int | None
    query_expansion: dict[str, Any] | None
    tokenizer_args: dict[str, Any]
    processor_kwargs: dict[str, Any]
    config_args: dict[str, Any]
    config_kwargs: dict[str, Any]


class SentenceTransformersConfig(TypedDict, total=False):
    """`config_sentence_transformers.json`."""

    prompts: dict[str, str]
    truncate_dim: int | None
    similarity_fn_name: str | None


class NormalizeConfig(TypedDict, total=False):
    """`config.json` of the normalisation, which it need not have."""

    module_input_name: str


class PoolingConfig(TypedDict, total=False):
    """`config.json` of the pooling; before version 5 there was one flag for each mode."""

    pooling_mode: str | list[str]
    include_prompt: bool
    pooling_mode_cls_token: bool
    pooling_mode_max_tokens: bool
    pooling_mode_mean_tokens: bool
    pooling_mode_mean_sqrt_len_tokens: bool
    pooling_mode_weightedmean_tokens: bool
    pooling_mode_lasttoken: bool


def read_settings(folder: Path, name: str, kind: type[T], *required: str) -> T:
    """Read one of an export's JSON files and check the types of its values.

    Args:
        folder: the export.
        name: of the file in that folder.
        kind: type of the content; keys that it does not name are ignored.
        required: keys without which the caller cannot do its work.

    Raises:
        UserError: the file is missing or damaged, a key is missing, or a value has another type.
    """
    path = folder / name
    fix = "give a folder written by `diffembed export`, or in sentence-transformers layout"
    tree = read_json(path, fix=fix)
    found = check_kind(tree, kind, where=str(path), fix=fix)
    # Not by the type: folders of earlier versions lack keys, and each caller needs only some.
    for key in required:
        if key not in tree:
            raise UserError(f"{path}: damaged ({key}: Field required)", fix=fix)
    return found


def is_export(path: Path) -> bool:
    """Return True for a folder that `diffembed export` wrote."""
    return (path / SETTINGS).is_file()


def check_replaceable(folder: Path, *, key: str, is_own: Callable[[Path], bool], kind: str) -> None:
    """Refuse a folder that `replace_folder` must not or cannot replace, before any work for it.

    Args:
        folder: may not exist yet.
        key: the flag or config key that names it, for the message.
        is_own: whether a folder that is not empty may be replaced.
        kind: what such a folder is, for the message.

    Raises:
        UserError: it holds something else, or cannot be written to.
    """
    if folder.is_dir() and any(folder.iterdir()) and not is_own(folder):
        raise UserError(
            f"{key}: {folder}: not empty and not {kind}", fix="choose another folder, or remove it"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{key}: {folder}: a file", fix="choose another folder")
    require_writable(folder.parent, key=key)
    # The temporary name may be too long for the file system, even where the folder's own is not.
    _temporary(folder).mkdir()
    _temporary(folder).rmdir()


def _temporary(folder: Path) -> Path:
    # Next to the folder, because a rename cannot leave the file system.
    return folder.with_name(f".{folder.name}.{os.getpid()}.tmp")


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write, which replaces `folder` on success and vanishes on failure."""
    folder = folder.resolve()  # replace the target of a link, not the link
    work, old = _temporary(folder), folder.with_name(f".{folder.name}.{os.getpid()}")
    work.mkdir()
    try:
        with name_full_disk(folder):
            yield work
        try:
            # A folder cannot replace another one in one step, so the old one moves away first.
            if folder.exists():
                folder.rename(old)
            work.rename(folder)
        except BaseException:  # also a signal between the two
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        sync_dir(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # already renamed if all went well
        if folder.exists():  # otherwise the old one, which could not be moved back, is all there is
            shutil.rmtree(old, ignore_errors=True)


def is_adapter_only(export: Path) -> bool:
    """Return True if an export is an adapter without the weights of its base model."""
    return is_export(export) and holds_adapter(export)


def holds_adapter(folder: Path) -> bool:
    """Return True for a folder with an adapter, written by whatever program."""
    return (folder / "adapter_config.json").is_file()


def adapted_model_config(export: Path) -> ModelConfig:
    """Return the model section that puts an adapter-only export onto its base model.

    Raises:
        UserError: the export's settings are missing or damaged.
    """
    tree = read_settings(export, SETTINGS, ExportSettings, "model")["model"]
    trained = build_config(ModelConfig, tree, origin=str(export / SETTINGS))
    # The adapter of training is stored in the export itself, on top of those merged before it.
    return dataclasses.replace(
        trained,
        lora=None,
        merged_adapters=trained.all_merged,
        adapter=str(export),
        adapter_use="merge",
    )


def backbone_folder(export: Path) -> Path | None:
    """Find the folder of an export's backbone on this machine; None if it is not here yet."""
    if not is_adapter_only(export):
        return export
    model = adapted_model_config(export)
    if Path(model.path).is_dir():
        return Path(model.path)
    # Here, not at the top: a whole export needs no hub.
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    return Path(cached).parent if isinstance(cached, str) else None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTexts:
    """The prefixes of the texts that a run was trained on.

    Attributes:
        instructions: number of queries by their instruction; empty for none.
        document_prefixes: number of documents of a sample by the text before them; where it is
            empty, the template's prefix holds.
    """

    instructions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    document_prefixes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def instruction(self) -> str | None:
        """The one instruction of every query, empty if none had any; None if they differ."""
        found = list(self.instructions) or [""]
        return found[0] if len(found) == 1 else None


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A template's prefix as sentence-transformers wants it.

    Where the prompt is left out of the pooling, sentence-transformers counts its tokens, and the
    count is right only if the prompt does not end in a space: most tokenizers join that space with
    the next word. So the space moves to the text.

    Attributes:
        prefix: for the stored `prompts`, and for `prompt=`.
        space: to be written in front of the text itself; empty where the prompt is pooled.
    """

    prefix: str
    space: str

    @classmethod
    def of(cls, prefix: str, *, pooled: bool) -> Prompt:
        """Split a template's prefix; `pooled` tells whether its tokens are part of the vector."""
        kept = prefix if pooled else prefix.rstrip()
        return cls(kept, prefix[len(kept) :])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """The prompts of an export.

    Attributes:
        query: with the one instruction of training; empty where there were several.
        document: of documents.
        example: of the card's example query, with the most frequent instruction of training.
    """

    query: Prompt
    document: Prompt
    example: Prompt

    @classmethod
    def of(cls, template: Template, texts: TrainedTexts, *, pooled: bool) -> Prompts:
        """Choose the prompts that match the texts of training."""
        counts = texts.instructions
        frequent = max(counts, key=lambda text: counts[text]) if counts else ""
        # Several prefixes cannot be one stored prompt; the template's own is the best guess then.
        prefixes = list(texts.document_prefixes)
        document = prefixes[0] if len(prefixes) == 1 else template.document_prefix()
        return cls(
            query=Prompt.of(template.query_prefix(texts.instruction or ""), pooled=pooled),
            document=Prompt.of(document, pooled=pooled),
            example=Prompt.of(template.query_prefix(frequent), pooled=pooled),
        )


# The names of our poolings in sentence-transformers.
_POOLING_NAMES: dict[Pooling, str] = {ours: theirs for theirs, ours in POOLINGS.items()}
_TRUNCATION = "2_Truncation"


def write_sentence_transformers_files(
    folder: Path,
    *,
    width: int,
    config: ModelConfig,
    max_length: int,
    prompts: Prompts,
    similarity: str,
    lower_case: bool,
) -> None:
    """Write the files that sentence-transformers reads in addition to weights and tokenizer.

    `width` is that of hidden states, before `config.dimensions` cuts it.
    """
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if config.dimensions is not None:
        modules.append((_TRUNCATION, "Dense"))
    if config.normalize:
        modules.append(("3_Normalize", "Normalize"))
    write_json(
        folder / "modules.json",
        [
            {
                "idx": index,
                "name": str(index),
                "path": path,
                # The old names: new versions map them to their own, old ones know no others.
                "type": f"sentence_transformers.models.{kind}",
            }
            for index, (path, kind) in enumerate(modules)
        ],
    )
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    if config.dimensions is not None:
        _write_truncation(folder / _TRUNCATION, width, config.dimensions)
    write_json(folder / "1_Pooling" / "config.json", _pooling_settings(width, config))
    write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": max_length, "do_lower_case": lower_case},
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": {"query": prompts.query.prefix, "document": prompts.document.prefix},
            "default_prompt_name": None,  # it would be put before documents, too
            "similarity_fn_name": similarity,
        },
    )


def _pooling_settings(width: int, config: ModelConfig) -> dict[str, Any]:
    """Return the pooling in both forms; flags first, as old servers take the first true key."""
    name = _POOLING_NAMES[config.pooling]
    return {
        "word_embedding_dimension": width,
        **{flag: kind == name for flag, kind in POOLING_FLAGS.items()},
        "pooling_mode": name,
        "include_prompt": config.pool_instruction,
    }


def _write_truncation(folder: Path, width: int, dimensions: int) -> None:
    """Write a linear layer that keeps the first numbers of a vector.

    sentence-transformers' own `truncate_dim` is applied after normalising, and leaves vectors
    shorter than 1.
    """
    write_json(
        folder / "config.json",
        {
            "in_features": width,
            "out_features": dimensions,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    )
    # Not at the top: login nodes read settings, and must not wait for torch.
    import torch
    from safetensors.torch import save_file

    save_file({"linear.weight": torch.eye(dimensions, width)}, folder / "model.safetensors")


# Suffixes of the files of an export that decide its vectors. The model card (.md) does not: the
# report of an evaluation may add scores to it.
_SUFFIXES = {".safetensors", ".json", ".txt", ".model"}
# The keys of an evaluated model that do not decide its vectors. Instructions are among them because
# vectors are stored by instruction already.
_NOT_THE_MODEL = {"name", "path", "instruction_set", "instructions"}


def export_fingerprint(path: Path) -> str:
    """Return the fingerprint of an export; an adapter's covers the local folders of its base, too.

    Raises:
        UserError: the folder is missing or holds no weights.
    """
    folders = [path]
    if is_adapter_only(path):
        model = adapted_model_config(path)
        # A hub name needs no files to identify it: the adapter's settings hold it.
        folders = [Path(part) for part in (model.path, *model.all_merged) if Path(part).is_dir()]
    files = {folder: _model_files(folder) for folder in folders}
    if not any(p.suffix == ".safetensors" for p in files[path]):
        raise UserError(
            f"{path}: no export there",
            allowed="a folder with *.safetensors",
            fix="run `diffembed export`, or correct models.path",
        )
    prints = [fingerprint_files(folder, own) for folder, own in files.items()]
    return prints[0] if len(prints) == 1 else short_hash(json.dumps(prints))


def _model_files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and p.suffix in _SUFFIXES]


def model_settings(model: EvaluatedModel) -> dict[str, Any]:
    """Return the keys of an evaluated model, apart from its export, that change its vectors."""
    return {key: value for key, value in as_tree(model).items() if key not in _NOT_THE_MODEL}


def model_fingerprint(model: EvaluatedModel) -> str:
    """Return a short hash of an export and of the settings that an evaluation changes.

    Raises:
        UserError: there is no export.
    """
    export, settings = export_fingerprint(model.path), model_settings(model)
    # With all settings at their defaults, it is the export itself that is evaluated.
    if settings == model_settings(EvaluatedModel(name=model.name, path=model.path)):
        return export
    return short_hash(json.dumps([export, settings], sort_keys=True))
