"""Record the inputs of a dataset, to tell a stale dataset from a current one.

    config, bytes of every input, tokenizer ──> recipe.json ──> fingerprint in manifest.json

`prepare_status(config)` answers cheaply: it hashes only files whose size or times have changed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import TypeAdapter, ValidationError

from pipeline.config import (
    DecontaminateConfig,
    PrepareConfig,
    SourceConfig,
    as_tree,
    build_config,
)
from pipeline.data.manifest import FILE_NAME, RECIPE_NAME, VERSION, read_manifest
from pipeline.data.prepare.contamination import contamination_files
from pipeline.data.sources import expand_sources, input_files
from pipeline.data.sources.columnar import stored_files
from pipeline.data.sources.paths import name_remote
from pipeline.errors import DiffembedError, UserError
from pipeline.files import write_text
from pipeline.tokenizer import TokenizerInfo, load_fast_tokenizer, lower_casing_file

# Metadata of remote file systems that changes with a file's content.
_REMOTE_TAGS = ("ETag", "etag", "e_tag", "md5Hash", "md5", "checksum", "versionId", "generation")
# Coarsest clock of a file system. A file that was younger than this when it was hashed may have
# changed since with the same time.
_TICK_NS = 2_000_000_000
# With config.json, by which transformers finds the class of a tokenizer that names none.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "config.json"),
)
# Keys that change the work, not the result.
_WITHOUT_EFFECT = ("output_dir", "reuse")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """One file and its content.

    Args:
        key: the config key that names it.
        file: path, or URL.
        sha256: of its bytes as stored.
        stamp: size and times of a local file, or a remote store's tags of the content. Equal
            stamps mean equal bytes; different ones mean nothing. Empty where nothing is known.
    """

    key: str
    file: str
    sha256: str
    stamp: tuple[int | str, ...]

    @property
    def identity(self) -> tuple[str, str, str]:
        """The part that decides: neither the folder nor the times."""
        return self.key, PurePath(self.file).name, self.sha256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that decides a dataset's bytes."""

    version: int
    config: dict[str, Any]
    inputs: tuple[InputFile, ...]
    # Hash of its behaviour, which decides: its files may be rewritten without changing it.
    tokenizer: str
    tokenizer_files: tuple[InputFile, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the result."""
        parts = [self.version, self.config, [entry.identity for entry in self.inputs]]
        text = json.dumps([*parts, self.tokenizer], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_recipe(config: PrepareConfig, tokenizer: str) -> Recipe:
    """Hash every input of a config.

    Args:
        config: the dataset to prepare.
        tokenizer: from `identify_tokenizer`.

    Raises:
        UserError: an input is missing, cannot be read, or changed while it was read.
    """
    return Recipe(
        version=VERSION,
        config=_settings(config),
        inputs=_measure(_list_inputs(config.sources, config.decontaminate), {}),
        tokenizer=tokenizer,
        tokenizer_files=_measure(_list_tokenizer(config), {}),
    )


def require_inputs(config: PrepareConfig) -> None:
    """Refuse a config with missing inputs, before any of them is read.

    Raises:
        UserError: a format is unknown, or a file is missing.
    """
    for _ in _list_inputs(config.sources, config.decontaminate):
        pass  # listing a file is what refuses it


def write_recipe(folder: Path, recipe: Recipe, *, started_ns: int) -> None:
    """Write `recipe.json`; its modification time is the time before anything was hashed."""
    path = folder / RECIPE_NAME
    write_text(path, json.dumps(dataclasses.asdict(recipe), indent=1, ensure_ascii=False) + "\n")
    os.utime(path, ns=(started_ns, started_ns))


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe of a dataset, finished or half-built.

    Raises:
        UserError: nothing is recorded, or the record is damaged.
    """
    path = folder / RECIPE_NAME
    try:
        recipe = TypeAdapter(Recipe).validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: {RECIPE_NAME} is missing, so its inputs are unknown",
            fix="remove the folder and prepare it again",
        ) from error
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UserError(
            f"{path}: damaged ({reason})", fix="remove the folder and prepare it again"
        ) from error
    # Files that were very young when they were hashed are hashed again.
    recorded = path.stat().st_mtime_ns
    return dataclasses.replace(
        recipe,
        inputs=tuple(_trusted(entry, recorded) for entry in recipe.inputs),
        tokenizer_files=tuple(_trusted(entry, recorded) for entry in recipe.tokenizer_files),
    )


def _trusted(entry: InputFile, recorded_ns: int) -> InputFile:
    """Return an input without its stamp if the file may have changed after it was hashed."""
    # Entries 1 and 2 of a local file's stamp are times; a remote store's tags are texts.
    young = any(
        isinstance(value, int) and value > recorded_ns - _TICK_NS for value in entry.stamp[1:3]
    )
    return dataclasses.replace(entry, stamp=()) if young else entry


def find_change(config: PrepareConfig, recipe: Recipe, *, load: bool = True) -> str | None:
    """Describe the first difference between a recipe and one that would be made now.

    Args:
        config: the dataset that is wanted.
        recipe: of the dataset that exists.
        load: load the tokenizer where its files differ, to see whether it still behaves the same.

    Returns:
        The difference in words; None where the dataset is up to date.

    Raises:
        UserError: an input of the config is missing or cannot be read.
    """
    # The cheapest comparison first: no file is listed, and none hashed, if a setting differs.
    for change in _changed_settings(recipe, _settings(config)):
        return change
    listed = list(_list_inputs(config.sources, config.decontaminate))
    # Several files may have one name, in train/ and test/ for example.
    now = collections.Counter((key, PurePath(file).name) for key, file in listed)
    then = collections.Counter((entry.key, PurePath(entry.file).name) for entry in recipe.inputs)
    for key, name in sorted(now - then):
        return f"{key}: {name} is new"
    for key, name in sorted(then - now):
        return f"{key}: {name} is gone"
    known = {entry.file: entry for entry in (*recipe.inputs, *recipe.tokenizer_files)}
    for entry, earlier in zip(_measure(listed, known), recipe.inputs, strict=True):
        if entry.identity != earlier.identity:
            return f"{entry.key}: {entry.file} has changed"
    files = _measure(_list_tokenizer(config), known)
    same = [e.identity for e in files] == [e.identity for e in recipe.tokenizer_files]
    # Other files may hold the same tokenizer: only loading it can tell.
    if (files and same) or (load and _load_identity(config) == recipe.tokenizer):
        return None
    return f"tokenizer: {config.tokenizer} has changed"


def prepare_status(config: PrepareConfig) -> Literal["whole", "other", "missing"]:
    """Tell whether `output_dir` holds the shards of this config and these inputs.

    Compare sizes and times of the inputs, and hash only files that may have changed; use no network
    and load no tokenizer.

    Returns:
        `whole`; `other` for shards of another config or other inputs, or whose inputs cannot be
        read on this machine; `missing` where there is no finished dataset.
    """
    if not (config.output_dir / FILE_NAME).is_file():
        return "missing"
    try:
        recipe = read_recipe(config.output_dir)
        if recipe.fingerprint != read_manifest(config.output_dir).recipe:
            return "other"
        return "other" if find_change(config, recipe, load=False) else "whole"
    except (DiffembedError, OSError):
        return "other"


def _settings(config: PrepareConfig) -> dict[str, Any]:
    tree = {key: value for key, value in as_tree(config).items() if key not in _WITHOUT_EFFECT}
    if tree["holdout"] is None:
        del tree["holdout"]  # younger than the other keys; fingerprints made before it stay true
    return tree


def _changed_settings(recipe: Recipe, now: dict[str, Any]) -> Iterator[str]:
    """Yield config keys whose values differ; keys newer than the recipe count as their defaults."""
    if recipe.version != VERSION:
        yield f"version {recipe.version} of the shards, this package writes version {VERSION}"
    try:
        # `output_dir` is required, but not part of a recipe.
        filled = build_config(
            PrepareConfig, {**recipe.config, "output_dir": "."}, origin=RECIPE_NAME
        )
    except UserError as error:
        yield str(error)
        return
    then, new = dict(_flatten(_settings(filled))), dict(_flatten(now))
    for key in sorted(then.keys() | new.keys()):
        if then.get(key) != new.get(key):
            yield f"{key} was {then.get(key)!r} and is {new.get(key)!r}"


def _flatten(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for inner, value in pairs:
            yield from _flatten(value, f"{key}.{inner}" if key else str(inner))
    else:
        yield key, tree


def identify_inputs(
    sources: Iterable[SourceConfig], rule: DecontaminateConfig | None
) -> list[tuple[str, str, str]]:
    """Return key, name and hash of every file that some sources and evaluation sets consist of.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    return [entry.identity for entry in _measure(_list_inputs(sources, rule), {})]


def _list_inputs(
    sources: Iterable[SourceConfig], rule: DecontaminateConfig | None
) -> Iterator[tuple[str, str]]:
    """Yield (key, file) of everything that rows, documents or evaluation texts are read from."""
    for source in expand_sources(sources):
        for file in input_files(source):
            for stored in stored_files(file, source.split):
                yield f"sources.{source.name}", stored
    for evaluation in rule.sets if rule else ():
        for file, split in contamination_files(evaluation):
            for stored in stored_files(file, split):
                yield f"decontaminate.{evaluation.name}", stored


def _list_tokenizer(config: PrepareConfig) -> Iterator[tuple[str, str]]:
    """Yield (key, file) of a tokenizer's files, in its folder or in the hub's cache."""
    for name in _TOKENIZER_FILES:
        file: Any = Path(config.tokenizer, name)
        if not Path(config.tokenizer).is_dir():
            # Imported here, because most tokenizers are folders and the hub's library is slow.
            from huggingface_hub import try_to_load_from_cache
            from huggingface_hub.errors import HFValidationError

            try:
                file = try_to_load_from_cache(config.tokenizer, name)
            except HFValidationError:
                return  # neither a folder nor a name: loading it raises the error
        if isinstance(file, str | Path) and Path(file).is_file():
            yield "tokenizer", str(file)
    if (file := lower_casing_file(config.tokenizer)) is not None:
        yield "tokenizer", str(file)


def identify_tokenizer(tokenizer_json: str, info: TokenizerInfo) -> str:
    """Hash the behaviour of a tokenizer, from the results of `load_fast_tokenizer`."""
    return hashlib.sha256(json.dumps([tokenizer_json, info.eos_id]).encode()).hexdigest()


def _load_identity(config: PrepareConfig) -> str:
    return identify_tokenizer(*load_fast_tokenizer(config.tokenizer, append_eos=config.append_eos))


def _measure(
    files: Iterable[tuple[str, str]], known: dict[str, InputFile]
) -> tuple[InputFile, ...]:
    """Hash files, several at a time; reuse the hash of a `known` file with an equal stamp."""
    # hashlib releases the interpreter lock; more threads than disks and cores gain nothing.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return tuple(pool.map(functools.partial(_measure_one, known=known), files))


def _measure_one(named: tuple[str, str], known: dict[str, InputFile]) -> InputFile:
    key, file = named
    with name_remote(file, f"{key}: {file}"):
        return _measure_file(key, file, known)


def _measure_file(key: str, file: str, known: dict[str, InputFile]) -> InputFile:
    try:
        filesystem, inner = fsspec.core.url_to_fs(file)
        stamp = _stamp(filesystem, inner)
        earlier = known.get(file)
        # An empty stamp equals another empty one, but proves nothing.
        if earlier is not None and stamp and stamp == earlier.stamp:
            return dataclasses.replace(earlier, key=key)
        with filesystem.open(inner, "rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
        same = stamp == _stamp(filesystem, inner)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file}: cannot be read ({error})") from error
    if not same:
        raise UserError(
            f"{key}: {file} changed while it was read", fix="run the same command again"
        )
    return InputFile(key=key, file=file, sha256=sha256, stamp=stamp)


def _stamp(filesystem: Any, inner: str) -> tuple[int | str, ...]:
    if isinstance(filesystem, LocalFileSystem):
        # Of the file behind a link. A program can set the modification time back, but not the
        # change time; a file renamed into place has another inode.
        state = Path(inner).stat()
        return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino
    info = filesystem.info(inner)
    tags = [str(info[name]) for name in _REMOTE_TAGS if info.get(name)]
    return (str(info.get("size")), *tags) if tags else ()
