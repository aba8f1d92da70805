"""Read published weights into a model piece by piece, and hash the files they come from.

    for each piece (a layer, or a module outside of the layers):
        read its tensors -> rename, convert and cast as transformers does -> placement.take

A placement that partitions keeps its share of every piece, so no process ever holds the whole
model. `model_digests` identifies a model by every byte of its files: sizes and times would not show
that a weight changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from pipeline import comm
from pipeline.config import MODEL_PATHS, ModelConfig, model_fix, require_model_path
from pipeline.errors import UserError, blame, say_warning
from pipeline.model.export_folder import is_export

# The head of every language model; leaving it out needs no warning.
_LANGUAGE_HEAD = "lm_head."
# The names that transformers' classes give to parts that an embedder does not use.
_OUTSIDE = (
    *("cls", "classifier", "decoder", "head", "pooler", "predictions", "qa_outputs", "score"),
    *("v_head", "multi_modal_projector", "vision_tower", "vision_model", "audio_tower"),
)


class Placement:
    """The destination of weights as they are read: in this class they stay whole, on one device.

    Args:
        device: the device they are read to.
        together: context in which an error of one process is raised in all that build the model.

    Attributes:
        reads: True if this process reads; otherwise it allocates, and `take` fills in the weights.
        by_piece: True if `take` is called for every piece, False for the whole model at once.
    """

    reads = True
    by_piece = False

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.device = torch.device(device)
        self.together = together

    def take(self, parameters: list[nn.Parameter]) -> None:
        """Take over the weights of a piece; a collective call, with the same shapes everywhere."""


class WeightFiles:
    """The safetensors files of a folder or hub name, open only while something is read from them.

    Raises:
        UserError: there are no weights, or a file is missing or damaged.
    """

    def __init__(self, path: str, revision: str | None) -> None:
        self.path = path
        self.shapes: dict[str, torch.Size] = {}  # by the published name
        self._files: dict[str, str] = {}
        for file in _find_files(path, revision):
            with self._open(file) as handle:
                for name in handle.keys():  # noqa: SIM118 -- not a dict
                    self.shapes[name] = torch.Size(handle.get_slice(name).get_shape())
                    self._files[name] = file

    @property
    def paths(self) -> list[Path]:
        """The files, by name."""
        return [Path(file) for file in sorted(set(self._files.values()))]

    @contextmanager
    def slices(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Yield tensors by name, which are read from disk when they are indexed."""
        wanted = list(names)
        with ExitStack() as stack:
            files = dict.fromkeys(self._files[name] for name in wanted)
            handles = {file: stack.enter_context(self._open(file)) for file in files}
            yield {name: handles[self._files[name]].get_slice(name) for name in wanted}

    def _open(self, file: str) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"model.path: {file} cannot be read ({error})", fix=model_fix(self.path)
            ) from error


def _find_files(path: str, revision: str | None) -> list[str]:
    """Find the one file of a small model, or the files that a large model's index names."""
    try:
        return [cached_file(path, "model.safetensors", revision=revision)]
    except OSError:
        pass  # perhaps several files
    try:
        index = cached_file(path, "model.safetensors.index.json", revision=revision)
        with blame(f"model.path: {index}", fix=model_fix(path)):
            shards, _ = get_checkpoint_shard_files(path, index, revision=revision)
    except OSError as error:
        if others := sorted(file.name for file in Path(path).glob("*.safetensors")):
            raise UserError(
                f"model.path: {path} holds {others[0]}, but no index that names it",
                allowed="model.safetensors, or model.safetensors.index.json and the files it names",
                fix=model_fix(path),
            ) from error
        raise UserError(
            f"model.path: no safetensors weights in {path!r}",
            allowed="model.safetensors, or model.safetensors.index.json and the files it names "
            "(pickled *.bin files could run code)",
            fix="load it with transformers where you trust it, and save_pretrained it",
            docs="trouble.md#no-safetensors",
        ) from error
    return list(shards)


class WeightReader:
    """Read weights into a model by transformers' own rules of renaming and conversion.

    Args:
        model: a transformers model on the meta device.
        files: where its weights are.
        keys: regular expressions over published names -> native names.
        device: where tensors are read to.

    Raises:
        UserError: weights are missing, unexpected or of another shape. The files' headers show it
            before any tensor is read.
    """

    def __init__(
        self, model: Any, files: WeightFiles, keys: dict[str, str], device: torch.device
    ) -> None:
        self._model, self._files, self._device = model, files, device
        self._rules = get_model_conversion_mapping(model, keys or None)
        self._check()
        self._sources = self._published_by_module()

    def read(self, names: list[str]) -> None:
        """Read the weights of these native names; they must be all weights of their modules.

        Raises:
            UserError: one cannot be read or converted.
        """
        # By module, because a rule may join several published tensors into one weight, or split it.
        modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
        wanted = [source for module in modules for source in self._sources.get(module, ())]
        with self._files.slices(wanted) as slices:
            info = self._load(slices, self._device)
        for name in names:
            weight = self._model.get_parameter(name)
            # What was not read is still on the meta device. (`info.missing_keys` also names the
            # weights of all other modules.)
            if not weight.is_meta and not _is_finite(weight):
                raise UserError(
                    f"model.path: {self._files.path}: {name} holds NaN or infinity",
                    fix=f"fetch {self._files.path} again, or take an earlier checkpoint of it",
                )
            if weight.is_meta:
                why = next(iter(info.conversion_errors.values()), "nothing becomes it")
                raise UserError(
                    f"model.path: {self._files.path}: {name} cannot be read: "
                    + str(why).strip().splitlines()[-1]
                )

    def _load(self, tensors: dict[str, Any], device: torch.device) -> Any:
        config = LoadStateDictConfig(
            device_map={"": device}, dtype=self._model.dtype, weight_mapping=self._rules
        )
        info, _ = convert_and_load_state_dict_in_model(
            model=self._model, state_dict=tensors, load_config=config
        )
        return info

    def _check(self) -> None:
        """Convert shapes only, to find all faults of names and shapes at once."""
        # Tensors on the meta device have shapes but no content, so this costs no memory.
        shapes = {k: torch.empty(size, device="meta") for k, size in self._files.shapes.items()}
        info = self._load(shapes, torch.device("meta"))
        # Drops what the model's class knows to ignore, such as buffers that old checkpoints stored.
        self._model._adjust_missing_and_unexpected_keys(info)
        heads = [key for key in info.unexpected_keys if self._is_outside(key)]
        faults = {
            "missing": info.missing_keys,
            "unexpected": [key for key in info.unexpected_keys if key not in heads],
            "of another shape": [
                f"{key} {[*found]} for {[*due]}" for key, found, due in info.mismatched_keys
            ],
        }
        if any(faults.values()):
            raise UserError(
                f"model.path: the weights of {self._files.path} do not fit "
                f"{self._model.config.model_type}: "
                + ", ".join(f"{what} {sorted(keys)[:3]}" for what, keys in faults.items() if keys),
                fix="give a complete checkpoint of a supported architecture",
            )
        unused = sorted(key for key in heads if not key.startswith(_LANGUAGE_HEAD))
        # An export keeps its base's heads for other readers, so they are expected there.
        if unused and comm.rank() == 0 and not is_export(Path(self._files.path)):
            say_warning(
                f"model.path: {self._files.path}: tensors outside of the backbone are not used "
                f"({len(unused)}, such as {unused[0]})"
            )

    def _is_outside(self, key: str) -> bool:
        """Return True for a tensor of a head, known by its name or by a place outside the backbone.

        An unknown tensor inside the backbone would change its vectors, so it is not a head.
        """
        prefix = f"{self._model.base_model_prefix}."
        # `model.pooler.` in a checkpoint with a head, `pooler.` in one of the backbone alone.
        inner = key.removeprefix(prefix)
        if inner.startswith((_LANGUAGE_HEAD, *(f"{part}." for part in _OUTSIDE))):
            return True
        own = {name for name, _ in self._model.named_children()}
        has_prefix = any(name.startswith(prefix) for name in self._files.shapes)
        return has_prefix and not key.startswith(prefix) and key.partition(".")[0] not in own

    def _published_by_module(self) -> dict[str, list[str]]:
        """Group published names by the native module that they become weights of."""
        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        shapes, prefix = self._model.state_dict(), self._model.base_model_prefix
        sources: dict[str, list[str]] = {}
        for name in self._files.shapes:
            native, _ = rename_source_key(name, renamings, converters, prefix, shapes)
            # A rule matched that should not have. The load makes the same exception.
            if native not in shapes and name in shapes:
                native = name
            sources.setdefault(native.rpartition(".")[0], []).append(name)
        return sources


def _is_finite(weight: Tensor) -> bool:
    """Check the smallest and the largest element, in one pass without a copy."""
    if not weight.numel() or not weight.is_floating_point():
        return True
    # A NaN anywhere makes both ends NaN.
    return all(math.isfinite(float(end)) for end in weight.detach().aminmax())


def load_weights(
    model: Any,
    *,
    layers: nn.ModuleList,
    open_reader: Callable[[], WeightReader],
    placement: Placement,
    finish: Callable[[nn.Module], None],
) -> None:
    """Give a model on the meta device its weights.

    Args:
        model: a transformers model; all of its weights are parameters.
        layers: its blocks, each of which is a piece.
        open_reader: called where the placement reads.
        placement: where the weights go.
        finish: called with every module whose own weights were just read, by the process that read
            them, before `take`.

    Raises:
        UserError: weights do not fit or cannot be read.
    """
    _compute_buffers(model, placement.device)
    with placement.together():
        reader = open_reader() if placement.reads else None
    # Only one piece at a time is whole in memory. A process that does not read allocates the same
    # shapes, because `take` is collective.
    for names in _pieces(model, layers) if placement.by_piece else [_names(model)]:
        with placement.together():
            if reader is None:
                _allocate(model, names, placement.device)
            else:
                reader.read(names)
                for module in dict.fromkeys(name.rpartition(".")[0] for name in names):
                    finish(model.get_submodule(module))
        placement.take([model.get_parameter(name) for name in names])


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _pieces(model: nn.Module, layers: nn.ModuleList) -> list[list[str]]:
    """Group the names of weights by piece, in the model's order."""
    prefix = next(name for name, module in model.named_modules() if module is layers) + "."
    pieces: dict[str, list[str]] = {}
    for name in _names(model):
        piece = name.rpartition(".")[0]  # the module; inside a layer, the layer
        if name.startswith(prefix):
            piece = prefix + name.removeprefix(prefix).partition(".")[0]
        pieces.setdefault(piece, []).append(name)
    return list(pieces.values())


def _allocate(model: nn.Module, names: list[str], device: torch.device) -> None:
    """Allocate tensors without content; another process reads the weights."""
    for name in names:
        module, _, attribute = name.rpartition(".")
        empty = torch.empty_like(model.get_parameter(name), device=device)
        setattr(model.get_submodule(module), attribute, nn.Parameter(empty))


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Compute buffers that no file holds, such as rotary frequencies, as `from_pretrained` does."""
    computed = dict(model.named_non_persistent_buffers())
    # Weights are read by the names of parameters, so a stored buffer would stay uninitialised.
    assert not set(model.state_dict()) - set(_names(model)), "a buffer that is stored"
    for name, buffer in computed.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, torch.empty_like(buffer, device=device))
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # a file holds it: drawing it takes half the time here
    model.initialize_weights()


# Ranks of a host share the hashing by blocks of this size, 64 MiB: small enough to finish together.
# A file's digest is the hash of its blocks' hashes: with another size no earlier run could resume.
BLOCK_BYTES = 2**26
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class _FileBlock:
    """One block of a file; blocks sort by file and position."""

    name: str
    start: int
    path: str

    def hash(self) -> bytes:
        """Return the SHA-256 of the block."""
        with Path(self.path).open("rb") as file:
            file.seek(self.start)
            return hashlib.sha256(file.read(BLOCK_BYTES)).digest()


def model_digests(config: ModelConfig) -> dict[str, str]:
    """Return a digest of each file that the model is loaded from; a collective call.

    The keys name files within the model's folder, or `adapter N/FILE`, so that a folder may move.

    Raises:
        UserError: a file is missing or cannot be read; raised on all ranks.
    """
    # The files that rank 0 sees, hashed by the ranks of its host: other hosts may have other disks.
    blocks = comm.on_main(lambda: [*_blocks(config)])
    hosts = comm.all_gather_object(platform.node())
    sharing = [rank for rank, host in enumerate(hosts) if host == hosts[0]]
    own = blocks[sharing.index(comm.rank()) :: len(sharing)] if comm.rank() in sharing else []
    with comm.together():
        hashed = _hash(own, num_sharing=len(sharing))
    for others in comm.all_gather_object(hashed):
        hashed.update(others)
    return _by_file(blocks, hashed)


def model_digests_here(config: ModelConfig) -> dict[str, str]:
    """Like `model_digests`, but by this process alone.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    blocks = [*_blocks(config)]
    return _by_file(blocks, _hash(blocks, num_sharing=1))


def _hash(blocks: list[_FileBlock], *, num_sharing: int) -> dict[_FileBlock, bytes]:
    """Hash blocks on this process's share of the cores."""
    # Threads, because hashlib releases Python's lock.
    threads = max(1, min(4, (os.cpu_count() or 1) // num_sharing))
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(blocks, pool.map(_FileBlock.hash, blocks), strict=True))


def _by_file(blocks: list[_FileBlock], hashed: dict[_FileBlock, bytes]) -> dict[str, str]:
    digests: dict[str, str] = {}
    for name in dict.fromkeys(block.name for block in blocks):
        # In the order of the file, however the blocks were shared.
        own = [digest for block, digest in sorted(hashed.items()) if block.name == name]
        digests[name] = hashlib.sha256(b"".join(own)).hexdigest()
    return digests


def _blocks(config: ModelConfig) -> Iterator[_FileBlock]:
    for name, path in _files(config):
        # An empty file has one empty block, so that it has a digest.
        for start in range(0, max(path.stat().st_size, 1), BLOCK_BYTES):
            yield _FileBlock(name, start, str(path))


def _files(config: ModelConfig) -> Iterator[tuple[str, Path]]:
    """Yield name and path of each file of the base model, then of the adapters."""
    yield from _base_files(config)
    adapters = [*config.all_merged]
    # One that is continued is not merged, and decides the run's result all the same.
    if config.adapter is not None and config.adapter not in adapters:
        adapters.append(config.adapter)
    for number, adapter in enumerate(adapters, 1):
        for name in _ADAPTER_FILES:
            if path := _file_or_none(adapter, name, None):
                yield f"adapter {number}/{name}", path


def _base_files(config: ModelConfig) -> Iterator[tuple[str, Path]]:
    require_model_path(config.path, key="model.path")
    settings = _file_or_none(config.path, "config.json", config.revision)
    if settings is None:
        raise UserError(
            f"model.path: cannot read a config.json from {config.path!r}",
            allowed=MODEL_PATHS,
            fix=model_fix(config.path),
            docs="trouble.md#no-model",
        )
    yield settings.name, settings
    if config.trust_remote_code:  # its code may load any of them
        patterns = ("*.py", "*.safetensors", "*.bin")
        paths = sorted({path for pattern in patterns for path in settings.parent.glob(pattern)})
    else:
        paths = WeightFiles(config.path, config.revision).paths
    for path in paths:
        yield path.name, path


def _file_or_none(folder: str, name: str, revision: str | None) -> Path | None:
    """Return the path of a model's file; None where it has no such file."""
    try:
        found = cached_file(
            folder, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError:
        return None
    return Path(found) if found else None
