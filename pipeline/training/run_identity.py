"""What makes a run the run it is: what its checkpoints and whoever resumes it must agree on."""

from __future__ import annotations

from typing import Any

from pipeline.config import TrainConfig, as_tree
from pipeline.data.shards import Dataset

# What may change when a run is resumed; everything else would make it another run.
_FREE_KEYS = (
    "output_dir",
    "num_steps",
    "checkpoint",
    "evaluate",
    "chunks",
    "schedule",
    "log_every",
    "non_finite",
    "trackers",
)


def run_identity(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """The keys of a config that a resumed run may not change, as flat `key.sub: value`."""
    tree = as_tree(config)
    for key in _FREE_KEYS:
        tree.pop(key)
    for key in ("path", "prefetch"):
        tree["data"].pop(key)
    # The same shards in another folder are the same data.
    tree["data"]["fingerprint"] = dataset.fingerprint
    return _flatten(tree)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
