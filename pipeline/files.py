"""Write files atomically with hashes of their content, read files that may be damaged, and lock.

A file that this package writes appears whole, by a rename, or not at all. Small records carry a
hash of their content (they are sealed), so that a reader refuses a file that was changed or cut:

    JSON object          key "sha256"             write_sealed     read_record
    npz, several arrays  array "sha256"           save_arrays      load_arrays
    npy, one array       32 bytes after the array save_vectors     map_vectors
    Arrow file           metadata of every batch  batch_writer     read_batch

Records from before there were hashes are read without that check; arrays and batches are refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import UserError, blame, explain_os_error, name_full_disk

T = TypeVar("T")
# The key of a sealed record that holds the hash of everything else in it.
_SEAL = "sha256"
# Git LFS leaves a small text file in place of each large file that was not fetched.
_LFS = "version https://git-lfs.github.com/"


# --- write -----------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name in the folder of `path`; on success it is synced and renamed to it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random, because two nodes that share the folder may run processes of the same number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with name_full_disk(path):
            yield temporary
            # Before the rename: after a power failure, the name must not lead to missing bytes.
            sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Delete temporary files that killed writers of `path` left, while no process writes it."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write a whole JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on disk."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def sync_dir(path: Path) -> None:
    """Wait until the names in a folder are on disk."""
    # A folder is a file of names: without this, a rename may be lost in a power failure.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def resolve_target(folder: Path, *, key: str) -> Path:
    """Return the real path of a folder that is built next to it and renamed at the end.

    Args:
        folder: may not exist yet.
        key: the config key that names it, for the message.

    Raises:
        UserError: nothing can be renamed to it.
    """
    target = folder.resolve()
    if os.path.ismount(target):
        raise UserError(
            f"{key}: {folder} is where a file system is mounted", fix="name a folder inside it"
        )
    # Of the 255 bytes that file systems allow, less what the names of helper folders add.
    longest = 255 - len(".building-00000000-0000-000")
    if len(os.fsencode(target.name)) > longest:
        raise UserError(f"{key}: {folder}", allowed=f"a name of at most {longest} bytes")
    return target


def require_writable(folder: str | Path, *, key: str) -> None:
    """Check that files can be written below `folder`, before any work is done for it.

    Args:
        folder: may not exist yet; it is made, with its parents.
        key: the config key or flag that names it, for the message.

    Raises:
        UserError: the folder cannot be made or written to.
        MachineError: the disk is full or broken.
    """
    folder = Path(folder)
    probe = folder / f".writable.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
    except OSError as error:
        # Name the folder that the user gave instead of the probe.
        named = OSError(error.errno, os.strerror(error.errno or 0), str(folder))
        explained = explain_os_error(named)
        if explained is None:
            raise
        if isinstance(explained, UserError):
            fix = f"{explained.fix}, as {key}"
            raise UserError(f"{key}: {explained.found}", fix=fix) from error
        raise type(explained)(f"{key}: {explained}") from error
    finally:
        # A full disk takes the name of a file but not its content.
        with contextlib.suppress(OSError):
            probe.unlink()


# --- hash ------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_hash(*parts: str) -> str:
    """Return a short hash of some strings, for names."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hash_file(path) for path in paths}


FileState = tuple[int, int, int]


def file_state(path: str | Path) -> FileState:
    """Return size, time and number of a local file; zeros for anything else, such as a URL.

    As part of a cache's key they let one process notice that a file was written again.
    """
    try:
        status = Path(path).stat()
    except OSError:
        return 0, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ino


# A fingerprint reads all of a small file, and of a large one this many pages, evenly spread.
_PAGES = 64
_PAGE_BYTES = 4096


def fingerprint_files(folder: Path, files: Iterable[Path]) -> str:
    """Return a short hash that changes whenever one of a folder's files is rewritten.

    Names, sizes, modification times and some pages represent the content: reading 15 GB of weights
    would take minutes. Pages are read because a copy may keep the time, and because some file
    systems give one time to all files.
    """
    lines = []
    for path in sorted(files):
        at = path.stat()
        pages = _hash_pages(path, at.st_size, at.st_mtime_ns, at.st_ctime_ns)
        lines.append(f"{path.relative_to(folder)} {at.st_size} {at.st_mtime_ns} {pages}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


@functools.lru_cache(maxsize=4096)
def _hash_pages(path: Path, size: int, *_: int) -> str:
    """Hash a file's pages; the times are part of the cache's key, so a changed file is reread."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _PAGES * _PAGE_BYTES:
            digest.update(file.read())
        else:
            for page in range(_PAGES):
                file.seek(page * (size - _PAGE_BYTES) // (_PAGES - 1))
                digest.update(file.read(_PAGE_BYTES))
    return digest.hexdigest()[:16]


# --- JSON ------------------------------------------------------------------------------------


def read_json(path: Path, *, fix: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        fix: advice for a file that cannot be read.

    Raises:
        UserError: it is missing, or not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", fix=fix) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged (not UTF-8, byte {error.start})", fix=fix) from error
    return parse_json(text, where=str(path), fix=fix)


def read_json_lines(path: Path, kind: type[Any], *, fix: str) -> list[tuple[str, dict[str, Any]]]:
    """Read a growing JSON-lines file: each whole line with its object, checked to be a `kind`.

    A killed writer may leave half a last line, which is left out.

    Raises:
        UserError: a line is not a JSON object of this kind; the message names it.
    """
    try:
        # Not `splitlines`: a JSON string may contain Unicode's line separators.
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", fix=fix) from error
    found = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: damaged (not UTF-8)", fix=fix) from error
        tree = parse_json(text, where=where, fix=fix)
        check_kind(tree, kind, where=where, fix=fix)
        found.append((text, tree))
    return found


def parse_json(text: str, *, where: str, fix: str) -> Any:
    """Parse JSON, and refuse an object that gives a key twice.

    Args:
        text: the JSON text.
        where: file, or file and line, for the message.
        fix: advice for text that cannot be parsed.

    Raises:
        UserError: it is not JSON.
    """
    if text.startswith(_LFS):
        raise UserError(f"{where}: a Git LFS pointer, not the file", fix="run `git lfs pull`")
    try:
        return json.loads(text, object_pairs_hook=_object_of_distinct_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: damaged ({error})", fix=fix) from error


def _object_of_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python's parser would silently keep the last of two values.
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return tree


def check_kind(tree: Any, kind: type[T], *, where: str, fix: str) -> T:
    """Return a JSON tree as `kind`: a dataclass, a TypedDict, or any type that pydantic knows.

    Raises:
        UserError: a key is missing or a value has another type; the message names it.
    """
    try:
        # Strict as JSON is: a list may be a tuple, but "1" is not a number and true is not 1.
        return TypeAdapter(kind).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{where}: damaged ({key}: {first['msg']})", fix=fix) from error


# --- sealed records --------------------------------------------------------------------------


def write_sealed(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON object atomically, with a hash of its content that `read_record` compares."""
    write_json(path, {**tree, _SEAL: _hash_tree(tree)})


def read_record(path: Path, kind: type[T], *, fix: str) -> T:
    """Read a JSON file that this package wrote, sealed or not, as `kind`.

    Raises:
        UserError: it is missing, not JSON, of another kind, or changed since it was sealed.
    """
    tree = unseal(read_json(path, fix=fix), path, fix=fix)
    return check_kind(tree, kind, where=str(path), fix=fix)


def unseal(tree: Any, path: Path, *, fix: str) -> Any:
    """Return the content of a sealed object, and anything else unchanged.

    Raises:
        UserError: the content was changed after it was sealed.
    """
    if not isinstance(tree, dict) or _SEAL not in tree:
        return tree
    content = {key: value for key, value in tree.items() if key != _SEAL}
    if tree[_SEAL] != _hash_tree(content):
        raise UserError(f"{path}: damaged (its content does not match its {_SEAL})", fix=fix)
    return content


def _hash_tree(tree: dict[str, Any]) -> str:
    # Through JSON once, so that tuples are lists and keys are strings, as a reader sees them.
    text = json.dumps(json.loads(json.dumps(tree)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Write arrays to an npz file atomically, with a hash of their content."""
    seal = np.frombuffer(_hash_arrays(arrays), dtype=np.uint8)
    sealed: dict[str, Any] = {**arrays, _SEAL: seal}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **sealed)


def load_arrays(path: Path, *names: str, fix: str) -> dict[str, NDArray[Any]]:
    """Read arrays of an npz file by name.

    Raises:
        UserError: the file is missing or damaged.
    """
    with blame(f"{path}: damaged", fix=fix), np.load(path) as file:
        found = {name: file[name] for name in names}
        seal = file[_SEAL].tobytes() if _SEAL in file else b""
    if _hash_arrays(found) != seal:
        raise UserError(f"{path}: damaged (its content does not match its {_SEAL})", fix=fix)
    return found


def _hash_arrays(arrays: dict[str, NDArray[Any]]) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        # With name and shape, so that swapped or reshaped arrays differ.
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())  # row by row, however the array is laid out in memory
    return digest.digest()


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write one array as an npy file atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def save_vectors(path: Path, vectors_ND: NDArray[Any]) -> None:
    """Write one array as an npy file atomically, followed by a hash, which numpy does not read."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, vectors_ND)
        # At the end, because other readers must find a plain npy file.
        file.write(hashlib.sha256(vectors_ND.tobytes()).digest())


def map_vectors(path: Path, *, fix: str) -> NDArray[Any]:
    """Map the array of an npy file into memory.

    Raises:
        UserError: the file is missing or damaged.
    """
    with blame(f"{path}: damaged", fix=fix):
        vectors_ND: Any = np.load(path, mmap_mode="r")
        end = vectors_ND.offset + vectors_ND.nbytes
        with path.open("rb") as file:
            file.seek(end)
            seal = file.read(64)  # more than a digest has, to notice what was appended
        whole = hashlib.sha256(vectors_ND.tobytes()).digest() == seal
        if not whole or vectors_ND.ndim != 2:
            raise UserError(f"{path}: damaged (its content does not match its hash)", fix=fix)
    return np.asarray(vectors_ND)


@contextlib.contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """Yield a writer of record batches to an Arrow IPC file, which appears when all are written."""
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pyarrow.ipc.new_file(file, schema) as writer,
    ):
        yield writer


@contextlib.contextmanager
def batch_writer(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """Yield a function that appends record batches, each with its hash, to a new Arrow file."""
    with table_writer(path, schema) as writer:
        yield lambda batch: writer.write_batch(batch, custom_metadata={_SEAL: _hash_batch(batch)})


def read_batch(path: Path, number: int, *, fix: str) -> pa.RecordBatch:
    """Read one record batch of an Arrow file, and no other.

    Raises:
        UserError: the file is missing or damaged.
    """
    with blame(f"{path}: damaged", fix=fix), pa.memory_map(str(path)) as file:
        # A memory map, so that a file of many batches costs the memory of one.
        batch, metadata = pyarrow.ipc.open_file(file).get_batch_with_custom_metadata(number)
        batch.validate(full=True)
        found = _hash_batch(batch).encode()
        seal = (metadata or {}).get(_SEAL.encode())
    if seal != found:
        raise UserError(f"{path}: damaged (batch {number} does not match its {_SEAL})", fix=fix)
    return batch


def _hash_batch(batch: pa.RecordBatch) -> str:
    """Hash the values, because buffers may be padded or slices of longer ones."""
    digest = hashlib.sha256(str(batch.schema.names).encode())
    for column in batch.columns:
        if pa.types.is_fixed_size_list(column.type):  # vectors: as Python numbers far too slow
            digest.update(column.flatten().to_numpy().tobytes())
        else:
            digest.update(repr(column.to_pylist()).encode())
    return digest.hexdigest()


# --- locks -----------------------------------------------------------------------------------
# The operating system frees a lock however its process ends. Some network disks have no locks:
# there, every process gets them.


def try_lock(file: TextIO) -> bool:
    """Lock an open file unless another process holds it; return True if this process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a disk without locks
    return True


def sign_lock(lock: TextIO) -> None:
    """Write into a held lock file which process holds it."""
    # Opened for appending, so the next write begins at the new end.
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}\n")
    lock.flush()


@contextlib.contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Hold a lock file, which stays, inside this block; wait while another process holds it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def hold_lock(path: Path, *, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold a signed lock file inside this block, and remove it at the end.

    Args:
        path: the lock file; its folder is made if missing.
        tell: called once with the holder's process and machine, if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        reported = False
        while True:
            file = stack.enter_context(path.open("a+"))
            while not try_lock(file):
                if not reported:
                    file.seek(0)
                    tell(file.read().strip())
                    reported = True
                time.sleep(0.5)
            # The holder may have removed the file that this process waited for.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
        stack.callback(path.unlink, missing_ok=True)
        sign_lock(file)
        yield
