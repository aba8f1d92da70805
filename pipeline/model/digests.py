"""Digests of the files that decide what a model computes, hashed by several ranks together.

Every byte counts, so equal digests mean equal weights; sizes and times of files would not show
that. The files are the ones that rank 0 sees; ranks on its host share the work block by block.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.utils import cached_file

from pipeline import comm
from pipeline.config import ModelConfig
from pipeline.config.declared import model_fix, require_model_place
from pipeline.errors import UserError
from pipeline.model.weights import WeightFiles

# Small enough that the ranks of a host finish together.
BLOCK = 2**26
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class _Block:
    """A part of a file."""

    name: str
    start: int
    path: str

    def hash(self) -> bytes:
        """SHA-256 of the block."""
        with Path(self.path).open("rb") as file:
            file.seek(self.start)
            return hashlib.sha256(file.read(BLOCK)).digest()


def model_digests(config: ModelConfig) -> dict[str, str]:
    """Return a digest of each file that the model is loaded from; a collective call.

    The keys name files within the model's folder, or `adapter N/FILE`, so that a folder may move.

    Raises:
        UserError: a file is missing or cannot be read, on all ranks alike.
    """
    blocks = comm.on_main(lambda: [*_blocks(config)])
    hosts = comm.all_gather_object(platform.node())
    sharing = [rank for rank, host in enumerate(hosts) if host == hosts[0]]
    own = blocks[sharing.index(comm.rank()) :: len(sharing)] if comm.rank() in sharing else []
    with comm.together():
        hashed = _hash(own, num_sharing=len(sharing))
    for part in comm.all_gather_object(hashed):
        hashed.update(part)
    return _by_file(blocks, hashed)


def model_digests_here(config: ModelConfig) -> dict[str, str]:
    """Return what `model_digests` returns, by this process alone.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    blocks = [*_blocks(config)]
    return _by_file(blocks, _hash(blocks, num_sharing=1))


def _hash(blocks: list[_Block], *, num_sharing: int) -> dict[_Block, bytes]:
    """Hash blocks on this process's share of the cores."""
    threads = max(1, min(4, (os.cpu_count() or 1) // num_sharing))
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(blocks, pool.map(_Block.hash, blocks), strict=True))


def _by_file(blocks: list[_Block], hashed: dict[_Block, bytes]) -> dict[str, str]:
    digests: dict[str, str] = {}
    for name in dict.fromkeys(block.name for block in blocks):
        parts = [digest for block, digest in sorted(hashed.items()) if block.name == name]
        digests[name] = hashlib.sha256(b"".join(parts)).hexdigest()
    return digests


def _blocks(config: ModelConfig) -> Iterator[_Block]:
    for name, path in _files(config):
        # A file without a byte is still a file: one empty block.
        for start in range(0, max(path.stat().st_size, 1), BLOCK):
            yield _Block(name, start, str(path))


def _files(config: ModelConfig) -> Iterator[tuple[str, Path]]:
    """Names and places of the base model's files, then of its adapters'."""
    yield from _files_of_base(config)
    adapters = [*config.all_merged]
    if config.adapter is not None and config.adapter not in adapters:
        adapters.append(config.adapter)
    for number, adapter in enumerate(adapters, 1):
        for name in _ADAPTER_FILES:
            if path := _cached(adapter, name, None):
                yield f"adapter {number}/{name}", path


def _files_of_base(config: ModelConfig) -> Iterator[tuple[str, Path]]:
    require_model_place(config.path, key="model.path")
    settings = _cached(config.path, "config.json", config.revision)
    if settings is None:
        raise UserError(
            f"model.path: cannot read a config.json from {config.path!r}",
            allowed="a folder in Hugging Face layout, or a model name in the local cache",
            fix=model_fix(config.path),
        )
    yield settings.name, settings
    if config.trust_remote_code:  # may load any of them
        patterns = ("*.py", "*.safetensors", "*.bin")
        paths = sorted({path for pattern in patterns for path in settings.parent.glob(pattern)})
    else:
        paths = WeightFiles(config.path, config.revision).paths
    for path in paths:
        yield path.name, path


def _cached(folder: str, name: str, revision: str | None) -> Path | None:
    """Path of a model's file; None where it has no such file."""
    try:
        found = cached_file(
            folder, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError:
        return None
    return Path(found) if found else None
