"""Rotary positions rescaled for longer texts, in config.json, where every reader finds it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from pipeline.config import RopeScaling
from pipeline.errors import UserError

# Layers that see the whole text; a sliding window never leaves the positions of training.
_FAR = "full_attention"


def scale_rope(hf_config: PretrainedConfig, scaling: RopeScaling) -> None:
    """Rescale in place; `max_position_embeddings` grows by the factor.

    There is no `dynamic` kind: it would turn positions by the longest row of a forward, and a
    vector would depend on its batch mates. `ntk` is that rule at the full length.

    Raises:
        UserError: the family has no rotary positions, or this model's are rescaled already.
    """
    everywhere: dict[str, Any] | None = getattr(hf_config, "rope_parameters", None)
    if not everywhere:
        raise UserError(
            f"model.rope_scaling: a {hf_config.model_type} model has no rotary positions",
            fix="remove model.rope_scaling, and keep texts within its learned positions",
        )
    rope = everywhere.get(_FAR, everywhere)
    if rope["rope_type"] != "default":
        raise UserError(
            f"model.rope_scaling: this model's positions are already {rope['rope_type']}",
            fix="remove model.rope_scaling",
        )
    trained = hf_config.max_position_embeddings
    if scaling.kind == "ntk":
        width = getattr(hf_config, "head_dim", None)
        width = width or hf_config.hidden_size // hf_config.num_attention_heads
        width = int(width * rope.get("partial_rotary_factor", 1.0))
        rope["rope_theta"] *= scaling.factor ** (width / (width - 2))
    else:
        rope.update(rope_type=scaling.kind, factor=scaling.factor)
        if scaling.kind == "yarn":
            rope["original_max_position_embeddings"] = trained
    hf_config.max_position_embeddings = int(trained * scaling.factor)
