"""The config.json of an export, so that older readers take it for the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.run_dir import write_json

# How families with two kinds of layers called their two bases before they had one dictionary.
_TWO_BASES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
}


def finish_config(path: Path) -> None:
    """Rewrite a config.json that transformers saved.

    The names of code that a published model asked for are dropped: the folder has no such code.
    Rotary positions are written in the form before transformers 5, too. Earlier versions, and
    servers built on them, ignore `rope_parameters` and would turn by the family's default base,
    without an error.
    """
    tree = json.loads(path.read_text())
    tree.pop("auto_map", None)
    write_json(path, {**tree, **old_rope_keys(tree)})


def old_rope_keys(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Return what older readers look for instead of `rope_parameters`."""
    rope = hf_config.get("rope_parameters")
    if not rope:
        return {}
    kind = hf_config["model_type"]
    if kind in _TWO_BASES:
        far, near = rope["full_attention"], rope["sliding_attention"]
        bases = dict(zip(_TWO_BASES[kind], (far["rope_theta"], near["rope_theta"]), strict=True))
    else:
        far, bases = rope, {"rope_theta": rope["rope_theta"]}
    rest = {key: value for key, value in far.items() if key != "rope_theta"}
    if "partial_rotary_factor" in rest:
        bases["partial_rotary_factor"] = rest.pop("partial_rotary_factor")
    # ModernBERT never read `rope_scaling`; newer versions would rescale all of its layers by it.
    plain = rest.get("rope_type") == "default" or kind == "modernbert"
    return bases if plain else {**bases, "rope_scaling": rest}
