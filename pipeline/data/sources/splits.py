"""Splits of a data set in a folder: shown by names of files and folders, or by its README."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator
from typing import Any

import yaml

from pipeline.errors import UserError

# The words by which the hub, too, recognises splits.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
_WORD = re.compile(rf"(?<![^-._ 0-9])({'|'.join(_SPLIT_OF_WORD)})(?![^-._ 0-9])")
# `NAME-00000-of-00003` is a file of the split NAME, whatever its name.
_NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}$")


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """Files to read, and what to tell about those left out."""

    files: list[str]
    note: str = ""


def canonical(split: str) -> str:
    """Return one name for all spellings of a split."""
    return _SPLIT_OF_WORD.get(split.lower(), split)


def split_of(name: str) -> str:
    """Return the split that a file's name or a path shows; empty if it shows none."""
    for part in reversed(name.lower().split("/")):
        if word := _WORD.search(part):
            return _SPLIT_OF_WORD[word[1]]
    return ""


def stem_of(file: str) -> str:
    """Return a file's name before `-00000-of-00001`, or without its endings."""
    stem = file.rsplit("/", 1)[-1].split(".")[0]
    numbered = _NUMBERED.match(stem)
    return numbered[1] if numbered else stem


def choose_by_name(
    files: list[str], root: str, split: str | None, default: str, place: str
) -> Choice:
    """Choose the files of a split; those whose names show another one are left out.

    Files that show no split are taken unless the split meant has files of its own and others have,
    too: then nothing says which split they belong to.

    Args:
        files: what was found.
        root: the folder that their names are relative to; its own name shows nothing.
        split: the split asked for, or None.
        default: the split meant where none is asked for; "" for all files.
        place: names the path in messages.

    Raises:
        UserError: the names show splits, but not the one meant.
    """
    files = sorted(files)
    wanted = canonical(split or default)
    if not files or not wanted:
        return Choice(files)
    shown = {file: split_of(file.removeprefix(root).lstrip("/")) for file in files}
    found = set(shown.values()) - {""}
    if wanted in found:
        others = found - {wanted}
        taken = [f for f in files if shown[f] == wanted or (not shown[f] and not others)]
    elif split is not None:
        taken = [file for file in files if stem_of(file) == split]
        if not taken and not found and wanted == "train":
            taken = files
    else:
        taken = [file for file in files if not shown[file]]
    if not taken:
        names = sorted(found) or sorted({stem_of(file) for file in files})
        raise UserError(
            f"{place}: no file of the split {wanted!r}",
            allowed=f"the splits found: {', '.join(names)}",
            fix="set `split`, or give the path of the files",
        )
    return Choice(taken, _note(files, taken, shown, wanted) if split is None else "")


def _note(files: list[str], taken: list[str], shown: dict[str, str], wanted: str) -> str:
    left = [file for file in files if file not in set(taken)]
    if not left:
        return ""
    splits = ", ".join(sorted({shown[file] or "no split" for file in left}))
    names = ", ".join(file.rsplit("/", 1)[-1] for file in left[:3])
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return f"only files of the split {wanted!r} are read; left out ({splits}): {names}{more}"


def choose_by_readme(
    filesystem: Any, folder: str, split: str, place: str
) -> tuple[list[str], str] | None:
    """Return the globs of a split that the README of a hub repository names, and a note.

    Raises:
        UserError: it has several configs, or names the splits but not this one.
    """
    configs = {
        str(config.get("config_name", "default")): config
        for config in _configs(filesystem, folder)
        if config.get("data_files") is not None
    }
    if not configs:
        return None
    chosen = [c for name, c in configs.items() if name == "default" or c.get("default")]
    if len(configs) > 1 and not chosen:
        raise UserError(
            f"{place}: its README.md has the configs {', '.join(configs)}",
            fix=f"choose one: hub:{folder}:{next(iter(configs))}",
        )
    splits = dict(_patterns((chosen or list(configs.values()))[0]["data_files"]))
    name = find_split(splits, split, missing=f"{place}: its README.md names no split {split!r}")
    others = [other for other in splits if other != name]
    note = f"only the split {name!r} is read; left out: {', '.join(others)}" if others else ""
    return [f"{folder.rstrip('/')}/{pattern}" for pattern in splits[name]], note


def _configs(filesystem: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Return the entries of `configs` in the metadata at the top of a README.md."""
    path = f"{folder.rstrip('/')}/README.md"
    if not filesystem.isfile(path):
        return
    with filesystem.open(path, "rb") as handle:
        text = handle.read().decode(errors="replace").removeprefix("\ufeff")
    found = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    try:
        tree = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return
    configs = tree.get("configs") if isinstance(tree, dict) else None
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict):
            yield config


def _patterns(data_files: Any) -> Iterator[tuple[str, list[str]]]:
    """Return (split, globs) for each way that the hub allows `data_files` to be written."""
    if isinstance(data_files, dict):
        for split, paths in data_files.items():
            yield str(split), _strings(paths)
    elif isinstance(data_files, list) and all(isinstance(entry, dict) for entry in data_files):
        for entry in data_files:
            yield str(entry.get("split", "train")), _strings(entry.get("path"))
    else:
        yield "train", _strings(data_files)


def _strings(paths: Any) -> list[str]:
    return [str(path) for path in (paths if isinstance(paths, list) else [paths])]


def find_split(names: Collection[str], wanted: str, *, missing: str) -> str:
    """Return which of the splits found is the wanted one, however it is spelt.

    Raises:
        UserError: none of them; `missing` says so.
    """
    for name in names:
        if canonical(name) == canonical(wanted):
            return name
    allowed = f"the splits found: {', '.join(names)}"
    raise UserError(missing, allowed=allowed, fix="set `split`")
