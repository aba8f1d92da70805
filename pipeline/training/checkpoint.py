"""Checkpoints that appear whole or not at all, and resume on any number of ranks.

    checkpoints/step-000020/state.json                     step, sizes and SHA-256 of every file
                            tensors-00000-of-00002.safetensors   rank 0's share of the tensors
    checkpoints/latest                                     name of the newest whole checkpoint

Tensors are stored whole, by parameter name: weight, exp_avg and exp_avg_sq in fp32. A checkpoint
therefore does not depend on the ZeRO stage or the world size that wrote it, and frozen weights
(LoRA's base) are not in it. Dropout masks and data order are functions of (seed, step, rank), so
there is no other state to save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from pipeline import comm
from pipeline.errors import UserError
from pipeline.files import check_kind, read_json, unseal
from pipeline.run_dir import checkpoint_step, read_latest, write_latest
from pipeline.training.run_identity import require_same_run
from pipeline.training.shares import read_share

FORMAT_VERSION = 1
# What is stored of each parameter.
KEYS = ("weight", "exp_avg", "exp_avg_sq")


class State(TypedDict):
    """The content of `state.json`."""

    format_version: int
    step: int
    optimizer_steps: int
    world_size: int
    identity: dict[str, Any]
    parameters: list[str]
    extra: dict[str, Any]
    files: dict[str, dict[str, Any]]


class Stateful(Protocol):
    """What a checkpoint needs of an engine."""

    @property
    def parameter_names(self) -> list[str]:
        """Names of the trainable parameters, the same on every rank."""

    @property
    def optimizer_steps(self) -> int:
        """How many updates the optimizer has made."""

    def gather_state(self, name: str) -> dict[str, torch.Tensor]:
        """The whole state of a parameter in tensors of its own; a collective call."""

    def prepare_restore(self, optimizer_steps: int) -> None:
        """Make room for state to restore."""

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a whole parameter."""

    def share_of(self, name: str) -> range:
        """The flat elements of a parameter whose state this rank keeps."""

    def restore_state(self, name: str, share: dict[str, torch.Tensor]) -> None:
        """Take this rank's elements of a parameter's state; a collective call."""


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, if there is one.

    Raises:
        UserError: `latest` names a checkpoint that is not there.
    """
    name = read_latest(folder)
    if name is None:
        return None
    if not (folder / name).is_dir():
        raise UserError(
            f"{folder}/latest names {name}, which does not exist",
            allowed=", ".join(names(folder)) or "no checkpoint is left",
            fix=f"`diffembed rewind {folder.parent} NAME`, or delete {folder}/latest to start anew",
        )
    return folder / name


def steps_by_name(folder: Path) -> dict[str, int]:
    """How many steps each whole checkpoint holds, by its name, oldest first."""
    found = sorted(path.name for path in folder.glob("*"))
    return {name: step for name in found if (step := checkpoint_step(name)) is not None}


def names(folder: Path) -> list[str]:
    """Names of the whole checkpoints, oldest first."""
    return list(steps_by_name(folder))


def rewind(folder: Path, name: str) -> Path:
    """Let the run go on from an older checkpoint than its newest; nothing is deleted.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    if name not in names(folder):
        raise UserError(
            f"{folder}: no checkpoint {name!r}",
            allowed=", ".join(names(folder)) or "no checkpoint is left",
        )
    verify(folder / name)
    write_latest(folder / name)
    return folder / name


def read_state(path: Path) -> State:
    """Read and check a checkpoint's `state.json`.

    Raises:
        UserError: it is missing, damaged, or of a newer format.
    """
    file, fix = path / "state.json", _cure(path)
    tree = read_json(file, fix=fix)
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{path}: checkpoint format {version}",
            allowed=f"up to {FORMAT_VERSION}",
            fix="update diffembed",
        )
    return check_kind(unseal(tree, file, fix=fix), State, where=str(file), fix=fix)


def verify(path: Path, part: slice = slice(None)) -> State:
    """Check every file of a checkpoint by size and SHA-256; returns its state.

    Args:
        path: the checkpoint.
        part: which files to check, in the order of their names, where processes share the work.

    Raises:
        UserError: names the first file that is missing or damaged.
    """
    state = read_state(path)
    for name in sorted(state["files"])[part]:
        if not (path / name).is_file():
            raise _damaged(path, f"{name} is missing")
        if describe_file(path / name) != state["files"][name]:
            raise _damaged(path, f"{name} differs from its recorded size or SHA-256")
    return state


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"checkpoint {path}: {what}", fix=_cure(path))


def _cure(path: Path) -> str:
    older = [name for name in names(path.parent) if name < path.name]
    if older:
        return f"`diffembed rewind {path.parent.parent} {older[-1]}` to continue from an older one"
    return "train again in another output_dir"


def load(path: Path, engine: Stateful, identity: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Restore the engine; returns the next step to run and `extra`. A collective call.

    Raises:
        UserError: the checkpoint is damaged or belongs to another run, on all ranks alike.
    """

    def check() -> State:
        state = read_state(path)
        require_same_run(path, state, identity)
        return state

    state = comm.on_main(check)
    with comm.together():
        verify(path, slice(comm.rank(), None, comm.world_size()))
    if odd := sorted(set(state["parameters"]) ^ set(engine.parameter_names)):
        raise UserError(
            f"checkpoint {path} and the model differ in {len(odd)} parameters, first {odd[0]}",
            fix="resume with the model section that the run began with",
        )
    with comm.together():
        _check_shapes(path, engine)
    engine.prepare_restore(state["optimizer_steps"])
    for file, names in _parameters_by_file(path).items():
        with _open(path, file) as tensors:
            for name in names:
                elements = engine.share_of(name)
                share = {
                    key: read_share(tensors.get_slice(f"{name}/{key}"), elements) for key in KEYS
                }
                engine.restore_state(name, share)
    return state["step"], state["extra"]


def _check_shapes(path: Path, engine: Stateful) -> None:
    """Compare the shapes of parameters, which flat elements no longer show.

    Raises:
        UserError: names the first one that differs.
    """
    for file, names in _parameters_by_file(path).items():
        with _open(path, file) as tensors:
            for name in names:
                found = tuple(tensors.get_slice(f"{name}/weight").get_shape())
                if found != engine.shape_of(name):
                    raise UserError(
                        f"checkpoint {path}: {name} has shape {list(found)}",
                        allowed=f"{list(engine.shape_of(name))}, as the model has",
                        fix="resume with the model section that the run began with",
                    )


def iterate_tensors(path: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield (parameter name, its whole state) in a fixed order; needs no engine."""
    for file, names in _parameters_by_file(path).items():
        with _open(path, file) as tensors:
            for name in names:
                yield name, {key: tensors.get_tensor(f"{name}/{key}") for key in KEYS}


def _parameters_by_file(path: Path) -> dict[str, list[str]]:
    """Names of parameters by the file that holds them, in an order that all ranks share."""
    found = {}
    for file in sorted(read_state(path)["files"]):
        with _open(path, file) as tensors:
            keys = tensors.keys()
            found[file] = list(dict.fromkeys(key.rpartition("/")[0] for key in keys))
    return found


@contextmanager
def _open(path: Path, file: str) -> Iterator[Any]:
    """Open a checkpoint's file of tensors.

    Raises:
        UserError: it, or what is read from it inside of the block, is damaged.
    """
    try:
        with safe_open(path / file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise _damaged(path, f"{file} cannot be read ({error})") from error


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
