"""The files of an export: settings, modules, prompts, and a digest of them all."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Required

import torch
from pydantic import Field
from safetensors.torch import save_file
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
from pipeline.errors import UserError
from pipeline.files import check_kind, read_json, write_json


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTexts:
    """What the examples of a training run held.

    Attributes:
        instructions: of queries, with the number of queries that had each; empty for none.
        document_prefixes: what stood before documents, with how many of a sample had each; without
            an entry, what the template says.
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
    """A prefix, cut in two where pooling leaves it out.

    sentence-transformers counts a prompt's tokens right where the prompt does not end in a space,
    which most tokenizers join with the word behind it. So that space belongs to the text.

    Attributes:
        before: for `prompts` and `prompt=`.
        joint: what a text must begin with by itself.
    """

    before: str
    joint: str

    @classmethod
    def of(cls, prefix: str, *, pooled: bool) -> Prompt:
        """Split a template's prefix; `pooled` is whether its tokens are part of the vector."""
        before = prefix if pooled else prefix.rstrip()
        return cls(before, prefix[len(before) :])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """The prompts of an export.

    Attributes:
        query: of the one instruction of training; without text where there were several.
        document: of documents.
        example: of a query in an example: that of the most frequent instruction.
    """

    query: Prompt
    document: Prompt
    example: Prompt

    @classmethod
    def of(cls, template: Template, texts: TrainedTexts, *, pooled: bool) -> Prompts:
        """Choose the prompts that match what training saw."""
        counts = texts.instructions
        frequent = max(counts, key=lambda text: counts[text]) if counts else ""
        prefixes = list(texts.document_prefixes)
        document = prefixes[0] if len(prefixes) == 1 else template.document_prefix()
        return cls(
            query=Prompt.of(template.query_prefix(texts.instruction or ""), pooled=pooled),
            document=Prompt.of(document, pooled=pooled),
            example=Prompt.of(template.query_prefix(frequent), pooled=pooled),
        )


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


class PromptSettings(TypedDict, total=False):
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


# sentence-transformers' names of our poolings.
POOLING_NAMES: dict[Pooling, str] = {ours: theirs for theirs, ours in POOLINGS.items()}
_TRUNCATION = "2_Truncation"


def write_sentence_files(
    folder: Path,
    *,
    width: int,
    config: ModelConfig,
    max_length: int,
    prompts: Mapping[str, str],
    similarity: str,
) -> None:
    """Write what sentence-transformers reads in addition to weights and tokenizer.

    Args:
        folder: the export.
        width: of hidden states.
        config: pooling, dimensions and normalisation.
        max_length: tokens after which a text is cut.
        prompts: what stands before a text, by `query` and `document`.
        similarity: `cosine` or `dot`.
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
        folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False}
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": similarity},
    )


def _pooling_settings(width: int, config: ModelConfig) -> dict[str, Any]:
    """Both forms of the pooling, the flags first: old servers take the first key that is true."""
    name = POOLING_NAMES[config.pooling]
    return {
        "word_embedding_dimension": width,
        **{flag: kind == name for flag, kind in POOLING_FLAGS.items()},
        "pooling_mode": name,
        "include_prompt": config.pool_instruction,
    }


def _write_truncation(folder: Path, width: int, dimensions: int) -> None:
    """Write a linear layer that keeps the first numbers of a vector.

    Their `truncate_dim` comes after normalising and leaves vectors shorter than 1.
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
    save_file({"linear.weight": torch.eye(dimensions, width)}, folder / "model.safetensors")


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
