"""Compare a run with its checkpoints: a resumed run must be the one that wrote them.

config, shards, model files --run_identity--> flat `key: value`, stored in state.json
resume   all keys equal, except `_FREE_KEYS` (steps, schedule, logging, folders)
export   only content and the keys that decide vectors
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import DataConfig, ModelConfig, TrainConfig, as_tree
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.run_folder import is_mirror

# Keys that may change when a run is resumed; any other would make it another run.
_FREE_KEYS = (
    "output_dir",
    "num_steps",
    "checkpoint",
    "evaluate",
    "chunks",
    "schedule",
    "log_every",
    "non_finite",
    "deterministic",
    "compile",
    "trackers",
)
# Also free, a key of a section: it decides memory and time alone. Earlier checkpoints hold it.
_CHECKPOINTING = "model.gradient_checkpointing"
# Not keys of the config, and not compared for equality alone.
_DATA, _WEIGHTS, _DECAY_END = "data.fingerprint", "model.weights", "optimizer.decay_end"
# Keys that decide the vectors of an export; weights may be read in another type.
_VECTOR_KEYS = ("loss.similarity", "model.")
_NO_VECTOR_KEYS = ("model.dtype", "model.attention_dropout", "model.lora.dropout")
# Paths of weights do not matter where digests of their files are known.
_PATHS = ("model.path", "model.revision", "model.adapter", "model.merged_adapters")


def run_identity(
    config: TrainConfig, dataset: Dataset | None, weights: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return the keys of a config that a resumed run may not change, as flat `key.sub: value`.

    Args:
        config: the run.
        dataset: its shards, known by their content; None where they are gone.
        weights: digests of the model's files (see `model_digests`).
    """
    identity = _keys(config)
    # The same shards in another folder are the same data.
    if dataset is not None:
        identity[_DATA] = dataset.fingerprint
    if weights is not None:
        identity[_WEIGHTS] = weights
    return identity


def require_same_run(path: Path, state: Mapping[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to continue a checkpoint as another run than the one that wrote it.

    Args:
        path: the checkpoint.
        state: its `state.json`.
        wanted: the identity of the run that would continue it.

    Raises:
        UserError: names every key that differs.
    """
    saved, run = state["identity"], _run_of(path)
    _require_same_shards(run, saved, wanted)
    _refuse_changed(run, _changed_files(saved, wanted))
    other = "output_dir" if run != path.parent else f"checkpoint.mirror: {run} has an earlier run"
    differ = _differing(saved, wanted)
    if differ:
        key = differ[0]
        others = f" (also different: {', '.join(differ[1:])})" if differ[1:] else ""
        raise UserError(
            f"{key} is {wanted.get(key)!r}{others}",
            allowed=f"{saved.get(key)!r}, which the run in {run} started with",
            fix=f"set {key} back to resume, or for a new run choose another {other}",
            docs="trouble.md#changed-run",
        )
    _require_same_schedule(run, state["step"], saved, wanted)


def require_same_model(
    path: Path, state: Mapping[str, Any], config: TrainConfig, dataset: Dataset
) -> list[str]:
    """Refuse to read a checkpoint's weights into another model than the run trained.

    Compares the files of the base model and its adapters, the shards with their template and
    tokenizer, and the keys that decide vectors; how the run was trained does not matter.

    Args:
        path: the checkpoint.
        state: its `state.json`.
        config: the config that would be exported.
        dataset: its shards.

    Returns:
        Files of weights that changed since the run started, where all of its weights were trained.
        `require_own_weights` decides once the model is built if they matter.

    Raises:
        UserError: names what differs.
    """
    # Here, because a login node compares runs without torch.
    from pipeline.model.weights import model_digests_here

    saved, run = state["identity"], _run_of(path)
    # One process exports: other ranks, if there are any, take no part in this.
    wanted = run_identity(config, dataset, model_digests_here(config.model))
    _require_same_shards(run, saved, wanted)
    changed = _changed_files(saved, wanted)
    adapter = config.model.adapter is not None and config.model.adapter_use == "continue"
    if adapter or config.model.lora is not None or not all(map(_holds_weights, changed)):
        _refuse_changed(run, changed)
    for key in _differing(saved, wanted):
        if key.startswith(_VECTOR_KEYS) and key not in _NO_VECTOR_KEYS:
            raise UserError(
                f"{key} is {wanted.get(key)!r}",
                allowed=f"{saved.get(key)!r}, which the run in {run} was trained with",
                fix="export with the config and the shards of the run",
            )
    return changed


def require_own_weights(path: Path, changed: list[str], from_base: list[str]) -> None:
    """Refuse changed files of a base model if an export takes tensors from them, else warn.

    Args:
        path: the checkpoint.
        changed: the files.
        from_base: tensors of the export that the checkpoint does not hold.

    Raises:
        UserError: the export would mix the trained tensors with others than they belong to.
    """
    if changed and from_base:
        _refuse_changed(_run_of(path), changed)
    if changed:
        print(
            f"export: {', '.join(changed[:3])} changed since the run started; not needed, because "
            f"{path.name} holds every tensor of the export",
            file=sys.stderr,
        )


def _run_of(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's run, or the mirror that holds it."""
    folder = checkpoint.parent
    return folder if is_mirror(folder) else folder.parent


def _keys(config: TrainConfig) -> dict[str, Any]:
    tree = as_tree(config)
    for key in _FREE_KEYS:
        tree.pop(key)
    # Neither changes the examples or their order.
    for key in ("path", "prefetch"):
        tree["data"].pop(key)
    # Whole, because a section without a value would have no key.
    candidates = tree["data"].pop("candidates")
    # Two keys set the end of the decay: their effect is compared.
    end = tree["optimizer"].pop("decay_steps") or config.num_steps
    keys = {**_flatten(tree), "data.candidates": candidates}
    del keys[_CHECKPOINTING]
    keys[_DECAY_END] = None if config.optimizer.decay == "constant" else end
    return keys


def _differing(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """List keys of different values; a key that the checkpoint lacks has its default."""
    first = TrainConfig(
        output_dir=Path(), num_steps=1, model=ModelConfig(path=""), data=DataConfig(path=Path())
    )
    before = {**_keys(first), **saved}
    ignored = {_DATA, _WEIGHTS, _DECAY_END, _CHECKPOINTING, "optimizer.decay_steps"}
    if _WEIGHTS in saved and _WEIGHTS in wanted:
        ignored.update(_PATHS)
    # Sections that one of the two leaves out: their keys are in the other alone.
    keys = [key for key in {**wanted, **saved} if key not in ignored]
    return [key for key in keys if before.get(key) != wanted.get(key)]


def _require_same_shards(run: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse other shards than the run started with."""
    if _DATA in saved and saved[_DATA] != wanted.get(_DATA, saved[_DATA]):
        raise UserError(
            f"data.path: the run in {run} started with other shards than these",
            fix="set data.path back, or prepare the shards again with the same config and files",
        )


def _changed_files(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """List the model's files that changed since the run started."""
    before, now = saved.get(_WEIGHTS), wanted.get(_WEIGHTS)
    if before is None or now is None:  # a checkpoint of an earlier version has no digests
        return []
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def _holds_weights(name: str) -> bool:
    """True unless a model's file decides its architecture; adapters were merged by training."""
    return name.startswith("adapter ") or not name.endswith((".json", ".py"))


def _refuse_changed(run: Path, different: list[str]) -> None:
    """Refuse changed files of the model, if there are any."""
    if different:
        key = "model.adapter" if different[0].startswith("adapter ") else "model.path"
        raise UserError(
            f"{key}: {', '.join(different[:3])} changed since the run in {run} started: its "
            "checkpoints belong to the earlier weights",
            fix=f"set {key} back to the earlier files, or choose another output_dir to start a "
            "new run",
        )


def _require_same_schedule(
    run: Path, step: int, saved: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """Refuse an end of the decay that would change learning rates of steps already done."""
    before, now = saved.get(_DECAY_END), wanted.get(_DECAY_END)
    if before is None or now is None or before == now:
        return
    if step <= wanted["optimizer.warmup_steps"]:  # the decay has not started
        return
    fix = f"set optimizer.decay_steps: {before}"
    if now > before:
        fix = (
            f"set num_steps back to {before}; to train longer, export the run and start a new one "
            "from it (model.path)"
        )
    raise UserError(
        f"num_steps: the learning rate would decay until step {now}, but the run in {run} has "
        f"made {step} steps of a decay until step {before}: it would jump",
        allowed=f"a decay until step {before}",
        fix=fix,
    )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
