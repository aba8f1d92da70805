"""Find the data files behind a path or hub name, choose the files of a split, and open them.

    path, folder, glob, URL        names, or the README of a hub repository, show splits
    or `hub:` name             ->  only files of the wanted split, with a note on the others

Names are compared as on the hub, so that a downloaded repository is read as it would be there.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import gzip
import io
import lzma
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import pyarrow as pa
import yaml

from pipeline.errors import UserError, blame

HUB = "hub:"
# The advice for damaged files.
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
_UNPACK: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_PACKED = (*_UNPACK, ".zst")
READABLE = (
    f"files named {', '.join(_KINDS)} (also with {', '.join(_PACKED)}) or {', '.join(_TABLES)}; "
    "a folder or a glob of them; a folder of save_to_disk; hub:OWNER/NAME[:CONFIG]"
)
# Metadata that `datasets` writes next to its data; never data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# By these `save_to_disk` marks the folder of a dataset, and of a dict of datasets.
_SAVED = ("state.json", "dataset_dict.json")
_POINTER = b"version https://git-lfs"
# Words that name splits, the same as on the hub.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
# Between separators, digits and ends only: "test" is in my-test2.jsonl, not in contest.jsonl.
_WORD = re.compile(rf"(?<![^-._ 0-9])({'|'.join(_SPLIT_OF_WORD)})(?![^-._ 0-9])")
# `NAME-00000-of-00003` is a file of the split NAME, whatever its name.
_NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}$")


@dataclasses.dataclass(frozen=True, slots=True)
class ChosenFiles:
    """Files to read, and a note on the files left out."""

    files: list[str]
    note: str = ""


def list_files(
    path: str, key: str, *, split: str | None = None, default_split: str = ""
) -> list[str]:
    """Return the data files of a path, a folder or a glob, in order.

    Args:
        path: a file, a folder, a glob, an fsspec URL, or `hub:...`.
        key: names the path in messages.
        split: the wanted split; files that show another one are left out.
        default_split: the wanted split of a folder or a glob where `split` is None; "" takes all
            files.

    Raises:
        UserError: there is no such file or split, or a file cannot be read.
    """
    return choose_files(path, key, split=split, default_split=default_split).files


def choose_files(
    path: str, key: str, *, split: str | None = None, default_split: str = ""
) -> ChosenFiles:
    """Return the files of `list_files`, with a note on the files left out."""
    if path.startswith(HUB):
        return ChosenFiles([path])
    with name_remote(path, f"{key}: {path}"):
        return _choose_files(path, key, split, default_split)


def _choose_files(path: str, key: str, split: str | None, default_split: str) -> ChosenFiles:
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise UserError(f"{key}: {path}: {error}", allowed=READABLE) from error
    local = not is_remote(path)
    label = f"{key}: {path}"
    if local and any(Path(inner, name).is_file() for name in _SAVED):
        # Read by `datasets`: state.json says which Arrow files of the folder belong to the dataset.
        return ChosenFiles([HUB + inner])
    if filesystem.isdir(inner):
        choice = _choose_in_folder(filesystem, inner, split, default_split, label)
    # A file whose own name has brackets is no glob.
    elif (magic := re.search(r"[*?\[]", inner)) and not filesystem.exists(inner):
        found = _matching(filesystem, [inner])
        root = inner[: magic.start()].rpartition("/")[0]
        choice = _choose_by_name(found, root, split, default_split, label)
    else:
        _require_file(filesystem, inner, label, local=local)
        choice = _choose_by_name([inner], inner.rpartition("/")[0], split, "", label)
    if not choice.files:
        raise _nothing_found(filesystem, inner, label)
    if local:
        for file in choice.files:
            _require_readable(Path(file), key)
        return choice
    return ChosenFiles([filesystem.unstrip_protocol(file) for file in choice.files], choice.note)


def _choose_in_folder(
    filesystem: Any, folder: str, split: str | None, default: str, label: str
) -> ChosenFiles:
    wanted = split or default
    # What the publisher declares comes first: names of files only hint at splits.
    named = _choose_by_readme(filesystem, folder, wanted, label) if wanted else None
    if named is not None:
        patterns, note = named
        # A split that the user names needs no note on the others.
        return ChosenFiles(_matching(filesystem, patterns), "" if split else note)
    return _choose_by_name(_files_below(filesystem, folder), folder, split, default, label)


def _choose_by_readme(
    filesystem: Any, folder: str, split: str, label: str
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
            f"{label}: its README.md has the configs {', '.join(configs)}",
            fix=f"choose one: hub:{folder}:{next(iter(configs))}",
        )
    splits = dict(_patterns((chosen or list(configs.values()))[0]["data_files"]))
    name = find_split(splits, split, missing=f"{label}: its README.md names no split {split!r}")
    others = [other for other in splits if other != name]
    note = f"only the split {name!r} is read; left out: {', '.join(others)}" if others else ""
    return [f"{folder.rstrip('/')}/{pattern}" for pattern in splits[name]], note


def _configs(filesystem: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Yield the entries of `configs` in the metadata at the top of a README.md."""
    path = f"{folder.rstrip('/')}/README.md"
    if not filesystem.isfile(path):
        return
    with filesystem.open(path, "rb") as handle:
        text = handle.read().decode(errors="replace").removeprefix("\ufeff")
    found = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    try:
        tree = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:  # a broken header: the names of the files decide
        return
    configs = tree.get("configs") if isinstance(tree, dict) else None
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict):
            yield config


def _patterns(data_files: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield (split, globs), in whichever of the hub's ways `data_files` is written."""
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


def _choose_by_name(
    files: list[str], root: str, split: str | None, default: str, label: str
) -> ChosenFiles:
    """Choose the files of a split; leave out files whose names show another one.

    Files that show no split are taken, unless both the wanted split and other splits have files:
    then their split is unknown.

    Args:
        files: all data files found.
        root: the folder that their names are relative to; the name of `root` shows nothing.
        split: the wanted split, or None.
        default: the wanted split where `split` is None; "" for all files.
        label: names the path in messages.

    Raises:
        UserError: the names show splits, but not the wanted one.
    """
    files = sorted(files)
    wanted = canonical(split or default)
    if not files or not wanted:
        return ChosenFiles(files)
    shown = {file: _split_of(file.removeprefix(root).lstrip("/")) for file in files}
    found = set(shown.values()) - {""}
    if wanted in found:
        others = found - {wanted}
        taken = [f for f in files if shown[f] == wanted or (not shown[f] and not others)]
    elif split is not None:
        taken = [file for file in files if stem_of(file) == split]
        # Files that name no split at all are the training split, as on the hub.
        if not taken and not found and wanted == "train":
            taken = files
    else:
        taken = [file for file in files if not shown[file]]
    if not taken:
        names = sorted(found) or sorted({stem_of(file) for file in files})
        raise UserError(
            f"{label}: no file of the split {wanted!r}",
            allowed=f"the splits found: {', '.join(names)}",
            fix="set `split`, or give the path of the files",
        )
    return ChosenFiles(taken, _note(files, taken, shown, wanted) if split is None else "")


def _note(files: list[str], taken: list[str], shown: dict[str, str], wanted: str) -> str:
    left = sorted(set(files) - set(taken))
    if not left:
        return ""
    splits = ", ".join(sorted({shown[file] or "no split" for file in left}))
    names = ", ".join(file.rsplit("/", 1)[-1] for file in left[:3])
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return f"only files of the split {wanted!r} are read; left out ({splits}): {names}{more}"


def canonical(split: str) -> str:
    """Return one name for all spellings of a split."""
    return _SPLIT_OF_WORD.get(split.lower(), split)


def _split_of(name: str) -> str:
    """Return the split that the words of a file's path name; empty if they name none."""
    # The file's own name decides before its folders.
    for part in reversed(name.lower().split("/")):
        if word := _WORD.search(part):
            return _SPLIT_OF_WORD[word[1]]
    return ""


def stem_of(file: str) -> str:
    """Return a file's name before `-00000-of-00001`, or without its extensions."""
    stem = file.rsplit("/", 1)[-1].split(".")[0]
    numbered = _NUMBERED.match(stem)
    return numbered[1] if numbered else stem


def find_split(names: Collection[str], wanted: str, *, missing: str) -> str:
    """Return the one of the splits found that is the wanted one, in any spelling.

    Raises:
        UserError: there is no such split; `missing` is the message.
    """
    for name in names:
        if canonical(name) == canonical(wanted):
            return name
    allowed = f"the splits found: {', '.join(names)}"
    raise UserError(missing, allowed=allowed, fix="set `split`")


def _matching(filesystem: Any, patterns: list[str]) -> list[str]:
    found = {file for pattern in patterns for file in filesystem.glob(pattern)}
    return sorted(file for file in found if kind_of(file) and not filesystem.isdir(file))


def _files_below(filesystem: Any, folder: str) -> list[str]:
    """Return data files in a folder and its subfolders named after splits; else those in `data`."""
    found = _files_of(filesystem, folder)
    below = _subfolders(filesystem, folder)
    for subfolder in sorted(below):
        if _split_of(subfolder.rsplit("/", 1)[-1]):
            found += [name for name in sorted(filesystem.find(subfolder)) if kind_of(name)]
    data = f"{folder.rstrip('/')}/data"
    return _files_below(filesystem, data) if not found and data in below else found


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


def _nothing_found(filesystem: Any, inner: str, label: str) -> UserError:
    if not filesystem.isdir(inner):
        return UserError(f"{label}: no such file, and no folder or glob with data files")
    below = [
        name.rsplit("/", 1)[-1]
        for name in sorted(_subfolders(filesystem, inner))
        if _files_of(filesystem, name)
    ]
    fix = f"name one of its folders with data files: {', '.join(below)}" if below else ""
    return UserError(f"{label}: a folder without data files", allowed=READABLE, fix=fix)


def _require_file(filesystem: Any, inner: str, label: str, *, local: bool) -> None:
    """Refuse a path that is neither a folder, nor a glob, nor a readable file."""
    # A broken link or a pipe exists as a name: its fault is told better than "no such file".
    if local and (Path(inner).is_symlink() or Path(inner).exists()):
        if not Path(inner).is_file():
            _require_readable(Path(inner), label)
    elif not filesystem.isfile(inner):
        raise UserError(
            f"{label}: no such file, and no folder or glob with data files", allowed=READABLE
        )
    if not kind_of(inner):
        raise UserError(
            f"{label}: unknown kind of file", allowed=READABLE, docs="trouble.md#file-kinds"
        )


def _require_readable(path: Path, key: str) -> None:
    """Refuse files that would hang or fail halfway: broken links, pipes, unreadable files."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        # Neither a recipe nor a message can hold it.
        raise UserError(
            f"{key}: {str(path)!r}: a name that is not UTF-8", fix="rename the file or folder"
        ) from error
    try:
        status = path.stat()
    except OSError as error:
        found = f"a symbolic link to {path.readlink()}" if path.is_symlink() else "a file"
        raise UserError(
            f"{key}: {path}: {found}, which cannot be reached ({error.strerror})",
            fix="repair or remove it",
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"{key}: {path}: a pipe, socket or device",
            allowed="regular files",
            fix="write its content to a file",
        )
    if not os.access(path, os.R_OK):
        raise UserError(f"{key}: {path}: this user may not read it", fix=f"chmod +r {path}")
    # A pointer has about 130 bytes; larger files are not opened here.
    if 0 < status.st_size < 1024:
        with path.open("rb") as handle:
            if handle.read(len(_POINTER)) == _POINTER:
                raise UserError(
                    f"{key}: {path}: a pointer of git-lfs, not the data",
                    fix="run `git lfs pull` in its repository",
                    docs="trouble.md#git-lfs",
                )


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
    """Return whether a file is compressed, so that it can be read only from its start."""
    return not file.startswith(HUB) and file.lower().endswith(_PACKED)


def counts_rows(file: str) -> bool:
    """Return whether the blocks of a file count rows, not bytes."""
    return kind_of(file) in ("parquet", "arrow", "hub")


def is_remote(path: str) -> bool:
    """Return whether a path is a URL."""
    return "://" in path


@contextlib.contextmanager
def name_remote(path: str, label: str) -> Iterator[None]:
    """Turn any error about a URL into one line; errors about local paths are left alone.

    Libraries for networks have errors of their own, most of them no OSError.
    """
    if not is_remote(path):
        yield
        return
    fix = "check the address, your access and the network, or give the path of a downloaded copy"
    with blame(f"{label}: cannot be read", fix=fix):
        yield


class _RemoteFile(io.RawIOBase):
    """A file behind a URL, whose errors name it.

    `io.BufferedReader` gives it the methods of a local file: fsspec's own `readline` takes no
    limit.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        with name_remote(url, url):
            self._handle: Any = fsspec.open(url, "rb").open()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._handle.seekable())

    def readinto(self, buffer: Any) -> int:
        with name_remote(self._url, self._url):
            data = self._handle.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with name_remote(self._url, self._url):
            return int(self._handle.seek(offset, whence))

    def tell(self) -> int:
        return int(self._handle.tell())

    def close(self) -> None:
        if not self.closed:
            self._handle.close()
        super().close()


# The least number of bytes to request from a URL.
_REMOTE_BUFFER = 2**20


def open_bytes(file: str) -> IO[bytes]:
    """Open a file or URL for reading, decompressed.

    Raises:
        UserError: it cannot be opened; later, a URL cannot be read any further.
    """
    try:
        raw: IO[bytes]
        if is_remote(file):
            raw = io.BufferedReader(_RemoteFile(file), _REMOTE_BUFFER)
        else:
            raw = Path(file).open("rb")  # noqa: SIM115 -- the caller closes what it is given
        if file.lower().endswith(".zst"):
            # Arrow includes the codec, reads several frames, and refuses one that is cut off.
            return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
        if not is_packed(file):
            return raw
        return cast(IO[bytes], _UNPACK[Path(file.lower()).suffix](raw, "rb"))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def file_size(file: str) -> int:
    """Return the stored bytes of a file; 0 for a hub dataset, which has no single file.

    Raises:
        UserError: the server of a URL does not answer, or does not know the size.
    """
    if file.startswith(HUB):
        return 0
    filesystem, inner = fsspec.core.url_to_fs(file)
    with name_remote(file, file):
        size = filesystem.size(inner)
    if size is None:
        raise UserError(
            f"{file}: its server does not tell its size",
            fix="download it, and give the path of the copy",
        )
    return int(size)
