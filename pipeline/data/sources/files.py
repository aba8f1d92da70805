"""Find the data files that a path or hub name means, and the split they belong to."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
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


HUB = "hub:"
# What to do about a damaged file.
FETCH_AGAIN = "write or fetch the file again"
_KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "lines",
}
_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
_PACKED = (".gz", ".bz2", ".xz", ".zst")
READABLE = (
    f"files named {', '.join(_KINDS)} (also with {', '.join(_PACKED)}) or {', '.join(_TABLES)}; "
    "a folder or a glob of them; a folder of save_to_disk; hub:OWNER/NAME[:CONFIG]"
)
# What `datasets` writes about its data; never data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SAVED = ("state.json", "dataset_dict.json")
_POINTER = b"version https://git-lfs"


def kind_of(file: str) -> str:
    """Return `json`, `lines`, `csv`, `parquet`, `arrow` or `hub`; empty for other files."""
    if file.startswith(HUB):
        return "hub"
    name = file.rsplit("/", 1)[-1].lower()
    if name.startswith(".") or name in _DESCRIPTIONS:
        return ""
    table = _TABLES.get(Path(name).suffix)
    if table:
        return table
    return _KINDS.get(Path(_unpacked(name)).suffix, "")


def _unpacked(name: str) -> str:
    for suffix in _PACKED:
        name = name.removesuffix(suffix)
    return name


def is_packed(file: str) -> bool:
    """Whether a file is compressed as a whole, so that it can only be read from its start."""
    return not file.startswith(HUB) and file.lower().endswith(_PACKED)


def counts_rows(file: str) -> bool:
    """Whether the blocks of a file count rows, not bytes."""
    return kind_of(file) in ("parquet", "arrow", "hub")


def open_bytes(file: str) -> IO[bytes]:
    """Open a file or URL for reading, decompressed.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        if file.lower().endswith(".zst"):
            # Arrow brings the codec along, reads several frames, and refuses one that is cut off.
            packed = fsspec.open(file, "rb").open()
            return io.BufferedReader(pa.CompressedInputStream(packed, "zstd"))
        if "://" not in file and not is_packed(file):
            return Path(file).open("rb")
        handle: IO[bytes] = fsspec.open(file, "rb", compression="infer").open()
        return handle
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def file_size(file: str) -> int:
    """Bytes of a file, as stored; 0 for a hub dataset, which its name and revision identify."""
    if file.startswith(HUB):
        return 0
    filesystem, inner = fsspec.core.url_to_fs(file)
    return int(filesystem.size(inner))


def list_files(
    path: str, key: str, *, split: str | None = None, default_split: str = ""
) -> list[str]:
    """Return the files meant by a path: itself, the data files of a folder, or a glob, in order.

    Args:
        path: a file, a folder, a glob, an fsspec URL, or `hub:...`.
        key: names the path in messages.
        split: which split of the data is meant; files that show another one are left out.
        default_split: the same for a folder or a glob where `split` is None; "" takes all files.

    Raises:
        UserError: there is no such file or split, or a file cannot be read.
    """
    return choose_files(path, key, split=split, default_split=default_split).files


def choose_files(
    path: str, key: str, *, split: str | None = None, default_split: str = ""
) -> Choice:
    """Return what `list_files` does, with a note on what is left out."""
    if path.startswith(HUB):
        return Choice([path])
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise UserError(f"{key}: {path}: {error}", allowed=READABLE) from error
    local = "://" not in path
    place = f"{key}: {path}"
    if local and any(Path(inner, name).is_file() for name in _SAVED):
        return Choice([HUB + inner])
    if filesystem.isdir(inner):
        choice = _choose_in_folder(filesystem, inner, split, default_split, place)
    elif (magic := re.search(r"[*?\[]", inner)) and not filesystem.exists(inner):
        found = _matching(filesystem, [inner])
        root = inner[: magic.start()].rpartition("/")[0]
        choice = choose_by_name(found, root, split, default_split, place)
    else:
        _require_file(filesystem, inner, place, local=local)
        choice = choose_by_name([inner], inner.rpartition("/")[0], split, "", place)
    if not choice.files:
        raise _nothing_found(filesystem, inner, place)
    if local:
        for file in choice.files:
            _require_readable(Path(file), key)
        return choice
    return Choice([filesystem.unstrip_protocol(file) for file in choice.files], choice.note)


def _choose_in_folder(
    filesystem: Any, folder: str, split: str | None, default: str, place: str
) -> Choice:
    wanted = split or default
    named = choose_by_readme(filesystem, folder, wanted, place) if wanted else None
    if named is not None:
        patterns, note = named
        return Choice(_matching(filesystem, patterns), "" if split else note)
    found = list(_files_below(filesystem, folder))
    return choose_by_name(found, folder, split, default, place)


def _matching(filesystem: Any, patterns: list[str]) -> list[str]:
    found = {file for pattern in patterns for file in filesystem.glob(pattern)}
    return sorted(file for file in found if kind_of(file) and not filesystem.isdir(file))


def _subfolders(filesystem: Any, folder: str) -> list[str]:
    names = filesystem.ls(folder, detail=False)
    return [
        name
        for name in names
        if not name.rstrip("/").rsplit("/", 1)[-1].startswith(".") and filesystem.isdir(name)
    ]


def _files_of(filesystem: Any, folder: str) -> list[str]:
    names = filesystem.ls(folder, detail=False)
    return sorted(name for name in names if kind_of(name) and not filesystem.isdir(name))


def _files_below(filesystem: Any, folder: str) -> Iterator[str]:
    """Data files of a folder and of its subfolders named after splits; of `data` if it has none."""
    found = _files_of(filesystem, folder)
    below = _subfolders(filesystem, folder)
    for subfolder in sorted(below):
        if split_of(subfolder.rsplit("/", 1)[-1]):
            found += [name for name in sorted(filesystem.find(subfolder)) if kind_of(name)]
    if not found and f"{folder.rstrip('/')}/data" in below:
        return _files_below(filesystem, f"{folder.rstrip('/')}/data")
    return iter(found)


def _nothing_found(filesystem: Any, inner: str, place: str) -> UserError:
    if not filesystem.isdir(inner):
        return UserError(f"{place}: no such file, and no folder or glob with data files")
    below = [
        name.rsplit("/", 1)[-1]
        for name in sorted(_subfolders(filesystem, inner))
        if _files_of(filesystem, name)
    ]
    fix = f"name one of its folders with data files: {', '.join(below)}" if below else ""
    return UserError(f"{place}: a folder without data files", allowed=READABLE, fix=fix)


def _require_file(filesystem: Any, inner: str, place: str, *, local: bool) -> None:
    """Refuse a path that is no folder, no glob and no readable file."""
    if local and (Path(inner).is_symlink() or Path(inner).exists()):
        if not Path(inner).is_file():
            _require_readable(Path(inner), place)
    elif not filesystem.isfile(inner):
        raise UserError(
            f"{place}: no such file, and no folder or glob with data files", allowed=READABLE
        )
    if not kind_of(inner):
        raise UserError(f"{place}: unknown kind of file", allowed=READABLE)


def _require_readable(path: Path, key: str) -> None:
    """Refuse what would hang or end in the middle: links to nothing, pipes, locked files."""
    try:
        status = path.stat()
    except OSError as error:
        found = f"a symbolic link to {path.readlink()}" if path.is_symlink() else "a file"
        raise UserError(
            f"{key}: {path}: {found}, which cannot be reached ({error.strerror})",
            fix="mend or remove it",
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"{key}: {path}: a pipe, socket or device",
            allowed="regular files",
            fix="write its content to a file",
        )
    if not os.access(path, os.R_OK):
        raise UserError(f"{key}: {path}: this user may not read it", fix=f"chmod +r {path}")
    if 0 < status.st_size < 1024:
        with path.open("rb") as handle:
            if handle.read(len(_POINTER)) == _POINTER:
                raise UserError(
                    f"{key}: {path}: a pointer of git-lfs, not the data",
                    fix="run `git lfs pull` in its repository",
                )
