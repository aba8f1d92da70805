"""Files that hold records: their kinds, the files meant by a path, and how one is opened."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa

from pipeline.data.sources.splits import Choice, choose_by_name, choose_by_readme, split_of
from pipeline.errors import UserError

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
