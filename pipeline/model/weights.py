"""Read published weights into a model piece by piece, and hash the files that decide them.

    for each piece (a layer, or a module outside of the layers):
        read its tensors -> rename, convert and cast as transformers does -> placement.take

A placement that shards keeps its share of every piece, so no process ever holds the whole model.

Every byte counts, so equal digests mean equal weights; sizes and times of files would not show
that. The files are the ones that rank 0 sees; ranks on its host share the work block by block.
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
from pipeline.config import ModelConfig
from pipeline.config.model import model_fix, require_model_place
from pipeline.errors import UserError, blame, say_warning
from pipeline.model.export_folder import is_export

# The head that every language model has, in silence.
_LANGUAGE_HEAD = "lm_head."
# Parts that an embedder does not use, as the classes of transformers call them.
_OUTSIDE = (
    *("cls", "classifier", "decoder", "head", "pooler", "predictions", "qa_outputs", "score"),
    *("v_head", "multi_modal_projector", "vision_tower", "vision_model", "audio_tower"),
)


class Placement:
    """Where weights go as they are read: here they stay whole, on one device.

    Args:
        device: the device they are read to.
        agreed: context of a block that ends the same way, well or badly, in all processes that
            build the model together.

    Attributes:
        reads: whether this process reads; otherwise it only makes room, and `take` brings weights.
        by_piece: whether `take` is called for every piece, or once for the whole model.
    """

    reads = True
    by_piece = False

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        agreed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.device = torch.device(device)
        self.agreed = agreed

    def take(self, parameters: list[nn.Parameter]) -> None:
        """Take over the weights of a piece; every process calls it, with the same shapes."""


class WeightFiles:
    """The safetensors files of a model, open only while something is read from them.

    Args:
        path: a folder or hub name.
        revision: of the hub name.

    Raises:
        UserError: there are none, or one is missing or damaged.
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
        """Tensors by name that are read from disk when they are indexed, inside of the block."""
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
    """The one file of a small model, or the shards that a large one's index names."""
    try:
        return [cached_file(path, "model.safetensors", revision=revision)]
    except OSError:
        pass  # not one file: perhaps several
    try:
        index = cached_file(path, "model.safetensors.index.json", revision=revision)
        with blame(f"model.path: {index}", fix=model_fix(path)):
            shards, _ = get_checkpoint_shard_files(path, index, revision=revision)
    except OSError as error:
        raise UserError(
            f"model.path: no safetensors weights in {path!r}",
            allowed="model.safetensors, or model.safetensors.index.json and what it names "
            "(pickled *.bin files could run code)",
            fix="load it with transformers where you trust it, and save_pretrained it",
        ) from error
    return list(shards)


class WeightReader:
    """Reads weights into a model by transformers' own rules of renaming and conversion.

    Args:
        model: a transformers model on the meta device.
        files: where its weights are.
        keys: regular expressions over published names -> native names.
        device: where tensors are read to.

    Raises:
        UserError: weights are missing, unexpected or of another shape; found out from the files'
            headers, before any tensor is read.
    """

    def __init__(
        self, model: Any, files: WeightFiles, keys: dict[str, str], device: torch.device
    ) -> None:
        self._model, self._files, self._device = model, files, device
        self._rules = get_model_conversion_mapping(model, keys or None)
        self._check()
        self._sources = self._published_by_module()

    def read(self, names: list[str]) -> None:
        """Put real tensors under these native names, all there are in their modules.

        Raises:
            UserError: one cannot be read or converted.
        """
        modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
        wanted = [source for module in modules for source in self._sources.get(module, ())]
        with self._files.slices(wanted) as slices:
            info = self._load(slices, self._device)
        for name in names:
            weight = self._model.get_parameter(name)
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
        """Go through the motions with shapes only."""
        shapes = {k: torch.empty(size, device="meta") for k, size in self._files.shapes.items()}
        info = self._load(shapes, torch.device("meta"))
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
        said = sorted(key for key in heads if not key.startswith(_LANGUAGE_HEAD))
        # An export keeps its base's heads for other readers; that is no news.
        if said and comm.rank() == 0 and not is_export(Path(self._files.path)):
            say_warning(
                f"model.path: {self._files.path}: tensors outside of the backbone are not used "
                f"({len(said)}, such as {said[0]})"
            )

    def _is_outside(self, key: str) -> bool:
        """Whether a tensor belongs to a head: by its name, or by lying beside the whole backbone.

        What lies inside the backbone would change its vectors, so it is no head.
        """
        prefix = f"{self._model.base_model_prefix}."
        inner = key.removeprefix(prefix)
        if inner.startswith((_LANGUAGE_HEAD, *(f"{part}." for part in _OUTSIDE))):
            return True
        own = {name for name, _ in self._model.named_children()}
        has_prefix = any(name.startswith(prefix) for name in self._files.shapes)
        return has_prefix and not key.startswith(prefix) and key.partition(".")[0] not in own

    def _published_by_module(self) -> dict[str, list[str]]:
        """Published names by the native module that they become weights of."""
        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        shapes, prefix = self._model.state_dict(), self._model.base_model_prefix
        sources: dict[str, list[str]] = {}
        for name in self._files.shapes:
            native, _ = rename_source_key(name, renamings, converters, prefix, shapes)
            if native not in shapes and name in shapes:  # a rule that should not have matched
                native = name
            sources.setdefault(native.rpartition(".")[0], []).append(name)
        return sources


def _is_finite(weight: Tensor) -> bool:
    """Tell by the smallest and the largest element, in one pass without a copy."""
    if not weight.numel() or not weight.is_floating_point():
        return True
    return all(math.isfinite(float(end)) for end in weight.detach().aminmax())


def fill(
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
        finish: called with every module whose own weights were just read, where they were read.

    Raises:
        UserError: weights do not fit or cannot be read.
    """
    _compute_buffers(model, placement.device)
    with placement.agreed():
        reader = open_reader() if placement.reads else None
    for names in _pieces(model, layers) if placement.by_piece else [_names(model)]:
        with placement.agreed():
            if reader is None:
                _make_room(model, names, placement.device)
            else:
                reader.read(names)
                for module in dict.fromkeys(name.rpartition(".")[0] for name in names):
                    finish(model.get_submodule(module))
        placement.take([model.get_parameter(name) for name in names])


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _pieces(model: nn.Module, layers: nn.ModuleList) -> list[list[str]]:
    """Names of weights by piece, in the model's order."""
    prefix = next(name for name, module in model.named_modules() if module is layers) + "."
    pieces: dict[str, list[str]] = {}
    for name in _names(model):
        piece = name.rpartition(".")[0]
        if name.startswith(prefix):
            piece = prefix + name.removeprefix(prefix).partition(".")[0]
        pieces.setdefault(piece, []).append(name)
    return list(pieces.values())


def _make_room(model: nn.Module, names: list[str], device: torch.device) -> None:
    """Put tensors of undefined content where another process reads weights."""
    for name in names:
        module, _, attribute = name.rpartition(".")
        room = torch.empty_like(model.get_parameter(name), device=device)
        setattr(model.get_submodule(module), attribute, nn.Parameter(room))


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Compute what no file holds, such as rotary frequencies, as `from_pretrained` does."""
    computed = dict(model.named_non_persistent_buffers())
    assert not set(model.state_dict()) - set(_names(model)), "a buffer that is stored"
    for name, buffer in computed.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, torch.empty_like(buffer, device=device))
    model.initialize_weights()  # of the weights there are only shapes, which draw nothing


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
